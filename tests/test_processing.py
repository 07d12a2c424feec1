import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, RobertaConfig, RobertaModel, T5Config, T5EncoderModel

from modeling_edgeglass import EdgeGlassModel, EdgeGlassProcessor
from modeling_edgeglass.backbones import load_backbone, max_positions
from tests.towers import TINY, tiny_tokenizer


@pytest.fixture
def processor(vision_dir: str, text_dir: str) -> EdgeGlassProcessor:
    return EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir, max_text_length=20)


def test_what_it_returns_goes_straight_into_the_model(processor: EdgeGlassProcessor, vision_dir, text_dir):
    model = EdgeGlassModel.from_vision_text_pretrained(vision_dir, text_dir, projection_dim=64, mrl_dimensions=[16])
    inputs = processor(images=[Image.new("RGB", (50, 30))] * 2, text=["a dog", "two very good dogs"])
    assert sorted(inputs) == ["attention_mask", "input_ids", "pixel_values"]
    assert model(**inputs).logits_per_image.shape == (2, 2)
    texts, pictures = processor(text="a dog"), processor(images=Image.new("RGB", (50, 30)))
    assert model.get_text_features(**texts, truncate_dim=16).shape == (1, 16)
    assert model.get_image_features(**pictures, truncate_dim=16).shape == (1, 16)


def test_saving_and_loading_changes_nothing(processor: EdgeGlassProcessor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, EdgeGlassProcessor)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    before, after = (p(images=picture, text="word " * 30) for p in (processor, loaded))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert after["input_ids"].shape == (1, 20)


def test_transparent_pictures_look_as_in_training_opened_or_by_path(processor: EdgeGlassProcessor, tmp_path):
    transparent, white = Image.new("RGBA", (40, 40), (0, 0, 0, 0)), Image.new("RGB", (40, 40), "white")
    assert torch.equal(processor(images=transparent)["pixel_values"], processor(images=white)["pixel_values"])
    transparent.save(tmp_path / "a.png")
    by_path = processor(images=str(tmp_path / "a.png"))["pixel_values"]
    assert torch.equal(by_path, processor(images=white)["pixel_values"])
    both = processor(images=[transparent, white])["pixel_values"]
    assert torch.equal(both[0], both[1])


def test_image_size_and_normalisation_are_the_vision_backbones_own(
    processor: EdgeGlassProcessor, vision_dir, text_dir
):
    assert processor(images=Image.new("RGB", (99, 50)))["pixel_values"].shape == (1, 3, 32, 32)
    white = processor(images=Image.new("RGB", (9, 9), "white"))["pixel_values"]
    torch.testing.assert_close(white, torch.ones_like(white))  # ViT: mean 0.5, std 0.5
    larger = EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir, image_size=48)
    assert larger(images=Image.new("RGB", (99, 50)))["pixel_values"].shape == (1, 3, 48, 48)


@pytest.fixture
def roberta_dir(tmp_path) -> str:
    """Its 22 positions are for 20 tokens, and its tokenizer knows no limit."""
    RobertaModel(RobertaConfig(**TINY, vocab_size=200, max_position_embeddings=22)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_captions_beyond_the_positions_are_cut_to_them_with_one_warning(
    vision_dir: str, roberta_dir: str, tmp_path, caplog
):
    positions = max_positions(load_backbone("text", str(tmp_path)))
    processor = EdgeGlassProcessor.from_vision_text_pretrained(
        vision_dir, str(tmp_path), max_text_length=512, max_positions=positions
    )
    assert processor.tokenizer.model_max_length == 20
    assert [record.getMessage() for record in caplog.records] == [
        f"max_text_length 512 is cut to the 20 tokens that {tmp_path} has positions for"
    ]


def test_positions_are_asked_for_where_the_tokenizer_knows_no_limit(vision_dir: str, roberta_dir: str, tmp_path):
    assert tiny_tokenizer().model_max_length > 10**20
    processor = EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, roberta_dir)
    assert processor.tokenizer.model_max_length == 20
    load_backbone("text", roberta_dir)(input_ids=processor(text="word " * 99)["input_ids"])  # the longest runs
    T5EncoderModel(T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)).save_pretrained(
        tmp_path
    )
    processor = EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, str(tmp_path))  # relative positions
    assert processor(text="word " * 99)["input_ids"].shape == (1, 4 * 99 + 2)
    assert processor.tokenizer.model_max_length < 2**31


def test_a_cut_says_which_limit_it_was_on_one_rank(vision_dir: str, text_dir: str, tmp_path, caplog, monkeypatch):
    shutil.copytree(text_dir, tmp_path / "text")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 20  # of 64 positions
    tokenizer.save_pretrained(tmp_path / "text")
    EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, str(tmp_path / "text"), max_text_length=99)
    assert [record.getMessage() for record in caplog.records] == [
        f"max_text_length 99 is cut to the 20 tokens that the tokenizer of {tmp_path}/text allows"
    ]
    monkeypatch.setattr("modeling_edgeglass.processing_edgeglass.rank", lambda: 1)
    EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, str(tmp_path / "text"), max_text_length=99)
    assert len(caplog.records) == 1


def test_a_tower_without_processor_or_tokenizer_is_named(vision_dir: str, text_dir: str, tmp_path):
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json: mean and std unknown"):
        EdgeGlassProcessor.from_vision_text_pretrained(text_dir, text_dir)
    with pytest.raises(ValueError, match=r"text tower .* has no tokenizer"):
        EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, vision_dir)
