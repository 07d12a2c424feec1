"""Tiny towers, tiny parquet files; no network, nothing outside the test's own folders."""

import io
import os
import random
import tempfile
from collections.abc import Iterator
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

from modeling_edgeglass import EdgeGlassConfig, EdgeGlassModel, EdgeGlassProcessor
from tests.hub_server import HubServer
from tests.language_models import save_tiny_language_model
from tests.towers import IMAGE_SIZE, TINY, save_tiny_text_tower, save_tiny_vision_tower

transformers.logging.disable_progress_bar()

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
SHAPES = ("dot", "bar", "ring", "cross", "box", "line", "star", "moon")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The models are tiny: threads would mostly wait for each other. A run in this process sets more than one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vision_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny ViT with its image processor."""
    return save_tiny_vision_tower(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT with 64 positions and its tokenizer."""
    return save_tiny_text_tower(tmp_path_factory.mktemp("text"))


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


@pytest.fixture
def parts(model: EdgeGlassModel, text_dir: str, vision_dir: str, tmp_path: Path) -> tuple[str, str]:
    """A saved alignment and a saved language model."""
    model.save_pretrained(tmp_path / "alignment")
    EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir).save_pretrained(tmp_path / "alignment")
    return str(tmp_path / "alignment"), save_tiny_language_model(tmp_path / "language")


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
    return write_run_config(tmp_path, vision_dir, text_dir)


def write_run_config(folder: Path, vision_dir: str, text_dir: str) -> Path:
    """The YAML of a tiny run: 20 training pairs, 10 val pairs, D = 64, batches of 4."""
    write_pairs(folder / "train.parquet", 20)
    write_pairs(folder / "val.parquet", 10, first=20)
    encoder = {"projection_dim": 64, "mrl_dimensions": [32, 16]}
    config = {
        "dataset": {
            "train_parquet": f"{folder}/train.parquet",
            "val_parquet": f"{folder}/val.parquet",
            "batch_size": 4,
            "max_text_length": 32,
        },
        "vision_encoder": {"model_name": vision_dir, **encoder},
        "text_encoder": {"model_name": text_dir, **encoder},
        "optimization": {"lr": 0.01},
        "trainer": {"output_dir": f"{folder}/run", "epochs": 2, "logging_steps": 1, "use_cpu": True},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub of this process, too."""
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight pictures or captions to a file of a feature cache."""
    monkeypatch.setattr("training.feature_cache.ENTRIES_PER_SHARD", 8)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
