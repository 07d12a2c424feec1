"""Tiny towers, tiny parquet files; no network, nothing outside the test's own folders."""

import io
import os
import random
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="edgeglass-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, EfficientNetConfig, PreTrainedTokenizerFast, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_edgeglass import EdgeGlassConfig, EdgeGlassModel

transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny: threads would mostly wait for each other

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE_SIZE = 32  # pixels
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
SHAPES = ("dot", "bar", "ring", "cross", "box", "line", "star", "moon")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words are split into letters: every text has tokens, every letter is known."""
    letters = [chr(code) for code in range(33, 127)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def tiny_efficientnet() -> EfficientNetConfig:
    """With weights large enough that a signal passes through the random network."""
    return EfficientNetConfig(width_coefficient=0.025, depth_coefficient=0.1, hidden_dim=32, initializer_range=0.5)


@pytest.fixture(scope="session")
def vision_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny ViT with its image processor."""
    path = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**TINY, image_size=IMAGE_SIZE, patch_size=8)).save_pretrained(path)
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT with 64 positions and its tokenizer."""
    path = tmp_path_factory.mktemp("text")
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    BertModel(BertConfig(**TINY, vocab_size=len(tokenizer), max_position_embeddings=64)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def config() -> EdgeGlassConfig:
    """A tiny model with random weights: D = 64, Matryoshka sizes 32, 16 and 8."""
    return EdgeGlassConfig(
        vision_config={"model_type": "vit", **TINY, "image_size": IMAGE_SIZE, "patch_size": 8},
        text_config={"model_type": "bert", **TINY, "vocab_size": 99, "max_position_embeddings": 64},
        projection_dim=64,
        mrl_dimensions=[32, 16, 8],
    )


@pytest.fixture
def model(config: EdgeGlassConfig) -> EdgeGlassModel:
    torch.manual_seed(0)
    return EdgeGlassModel(config)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Six pairs of noise, captions padded on the right."""
    generator = torch.Generator().manual_seed(0)
    attention_mask = torch.arange(10) < torch.tensor([[10], [4], [7], [10], [5], [8]])
    return {
        "pixel_values": torch.randn(6, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "input_ids": torch.randint(1, 99, (6, 10), generator=generator) * attention_mask,
        "attention_mask": attention_mask.long(),
    }


def picture(caption: str, size: int = 24) -> bytes:
    """A PNG of nine coloured squares that the caption decides; a crop of it can still be told from another."""
    squares = Image.frombytes("RGB", (3, 3), random.Random(caption).randbytes(27))
    return png(squares.resize((size, size), Image.Resampling.NEAREST))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_pairs(path: Path, num_rows: int, first: int = 0) -> Path:
    """A parquet in PixMo's layout whose captions all differ."""
    captions = [f"{COLORS[i % 8]} {SHAPES[i // 8 % 8]} number {i}" for i in range(first, first + num_rows)]
    table = {
        "image_bytes": [picture(caption) for caption in captions],
        "caption": captions,
        "sample_id": [f"id-{i}" for i in range(first, first + num_rows)],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=4)
    return path


@pytest.fixture
def run_config(vision_dir: str, text_dir: str, tmp_path: Path) -> Path:
    """The YAML of a tiny run: 20 training pairs, 10 val pairs, D = 64, batches of 4."""
    write_pairs(tmp_path / "train.parquet", 20)
    write_pairs(tmp_path / "val.parquet", 10, first=20)
    encoder = {"projection_dim": 64, "mrl_dimensions": [32, 16]}
    config = {
        "dataset": {
            "train_parquet": f"{tmp_path}/train.parquet",
            "val_parquet": f"{tmp_path}/val.parquet",
            "batch_size": 4,
            "max_text_length": 32,
        },
        "vision_encoder": {"model_name": vision_dir, **encoder},
        "text_encoder": {"model_name": text_dir, **encoder},
        "optimization": {"lr": 0.01},
        "trainer": {"output_dir": f"{tmp_path}/run", "epochs": 2, "logging_steps": 1, "use_cpu": True},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
