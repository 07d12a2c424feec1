import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel

from modeling_edgeglass import EdgeGlassConfig, EdgeGlassModel, EdgeGlassProcessor, VisionEncoder
from modeling_edgeglass.backbones import build_backbone
from tests.towers import TINY, tiny_efficientnet
from training.build import load_model
from training.errors import ConfigError


def test_saving_and_loading_gives_the_same_model(model: EdgeGlassModel, batch, tmp_path):
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = EdgeGlassModel.from_pretrained(tmp_path)
    expected = model(**batch, return_loss=True)
    output = loaded(**batch, return_loss=True)
    assert torch.equal(output.image_embeds, expected.image_embeds)
    assert torch.equal(output.text_embeds, expected.text_embeds)
    assert torch.equal(output.loss, expected.loss)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


def test_auto_classes_know_the_model(model: EdgeGlassModel, tmp_path):
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), EdgeGlassConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), EdgeGlassModel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling_type", ["simple", "multihead", "statistics"])
def test_every_precision_loads_and_gives_unit_vectors(
    config: EdgeGlassConfig, batch, pooling_type: str, dtype: torch.dtype, tmp_path
):
    config.vision_pooling_type = config.text_pooling_type = pooling_type
    torch.manual_seed(0)
    model = EdgeGlassModel(config)
    model.eval().save_pretrained(tmp_path)
    loaded = EdgeGlassModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    embeds = loaded.get_image_features(batch["pixel_values"], truncate_dim=16)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(6))
    cosines = (embeds * model.get_image_features(batch["pixel_values"], truncate_dim=16)).sum(dim=-1)
    assert cosines.min() > 0.99
    texts = loaded.get_text_features(batch["input_ids"], batch["attention_mask"])
    expected = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    assert (texts * expected).sum(dim=-1).min() > 0.99


def test_features_are_the_prefixes_of_the_embeddings(model: EdgeGlassModel, batch):
    model.eval()
    output = model(**batch)
    for truncate_dim in (None, 64, 32, 5, 1):
        images = model.get_image_features(batch["pixel_values"], truncate_dim)
        texts = model.get_text_features(batch["input_ids"], batch["attention_mask"], truncate_dim)
        for embeds, full in ((images, output.image_embeds), (texts, output.text_embeds)):
            torch.testing.assert_close(embeds, nn.functional.normalize(full[:, :truncate_dim], dim=-1))
    with pytest.raises(ValueError, match=r"truncate_dim must be in 1\.\.64, got 65"):
        model.get_image_features(batch["pixel_values"], 65)


def test_logits_are_scaled_cosines_and_each_others_transpose(model: EdgeGlassModel, batch):
    output = model.eval()(**batch)
    expected = model.logit_scale.exp() * output.image_embeds @ output.text_embeds.T
    torch.testing.assert_close(output.logits_per_image, expected)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    assert output.loss is None


def test_loss_is_weighted_as_configured(config: EdgeGlassConfig, batch):
    config.contrastive_weight, config.mrl_weight = 0.3, 0.7
    output = EdgeGlassModel(config)(**batch, return_loss=True)
    torch.testing.assert_close(output.loss, 0.3 * output.loss_clip + 0.7 * output.loss_mrl)


def test_equal_captions_are_told_by_their_tokens(model: EdgeGlassModel, batch):
    batch["input_ids"][1:], batch["attention_mask"][1:] = batch["input_ids"][0], batch["attention_mask"][0]
    assert model(**batch, return_loss=True).loss == 0


def test_the_step_decides_the_matryoshka_size(model: EdgeGlassModel, batch):
    losses = [model.train()(**batch, return_loss=True, step=step).loss_mrl.item() for step in range(12)]
    assert losses == [model(**batch, return_loss=True, step=step).loss_mrl.item() for step in range(12)]
    assert len(set(losses)) == 3


def test_a_batch_of_one_embeds_but_has_no_loss(model: EdgeGlassModel, batch):
    single = {key: value[:1] for key, value in batch.items()}
    assert model(**single).logits_per_image.shape == (1, 1)
    with pytest.raises(ValueError, match="needs two pairs or more in a batch, got one"):
        model(**single, return_loss=True)


@pytest.mark.parametrize("pooling_type", ["simple", "multihead"])
def test_64_pairs_can_be_learned_by_heart(config: EdgeGlassConfig, pooling_type: str):
    """Both poolings let the gradient through from the first step: nothing stays at chance, log(64) = 4.16."""
    config.vision_pooling_type = config.text_pooling_type = pooling_type
    config.sample_single_mrl_dim = False
    torch.manual_seed(0)
    model = EdgeGlassModel(config).train()
    inputs = {"pixel_values": torch.randn(64, 3, 32, 32), "input_ids": torch.randint(1, 99, (64, 8))}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(**inputs, return_loss=True).loss.backward()
        optimizer.step()
    assert model.eval()(**inputs, return_loss=True).loss < 0.1


def test_logit_scale_is_capped_at_100_and_can_come_back(model: EdgeGlassModel, batch):
    with torch.no_grad():
        model.logit_scale.fill_(50.0)
    output = model(**batch, return_loss=True)
    assert model.capped_logit_scale().item() == pytest.approx(100.0)
    assert model(**batch).logits_per_image.abs().max() <= 100.001
    output.loss.backward()
    assert model.logit_scale.grad is not None
    assert model.logit_scale.grad != 0
    assert model.logit_scale.item() == pytest.approx(math.log(100))


def test_new_layers_start_as_documented_and_backbones_as_pretrained(vision_dir: str, text_dir: str):
    torch.manual_seed(0)
    model = EdgeGlassModel.from_vision_text_pretrained(vision_dir, text_dir)
    for modality, directory in (("vision", vision_dir), ("text", text_dir)):
        encoder = model.get_submodule(f"{modality}_encoder")
        pretrained = AutoModel.from_pretrained(directory).state_dict()
        assert all(torch.equal(value, pretrained[name]) for name, value in encoder.backbone.state_dict().items())
        assert encoder.projection.weight.std().item() == pytest.approx(32**-0.5, rel=0.02)
        assert not encoder.projection.bias.any()
        assert not encoder.pooling.score.any()
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-3)
    assert model.config.vision_name_or_path == vision_dir


def test_a_frozen_backbone_has_no_gradient_and_never_leaves_eval_mode():
    torch.manual_seed(0)
    config = tiny_efficientnet()
    encoder = VisionEncoder(build_backbone("vision", config), 48)
    before = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    encoder.train()
    for _ in range(3):
        encoder(torch.randn(4, 3, 64, 64) * 5 + 3).sum().backward()
    assert encoder.training
    assert not any(module.training for module in encoder.backbone.modules())
    assert all(torch.equal(value, before[name]) for name, value in encoder.backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.backbone.parameters())
    assert encoder.projection.weight.grad is not None


def test_freeze_false_trains_the_backbone():
    config = tiny_efficientnet()
    encoder = VisionEncoder(build_backbone("vision", config), 48, freeze=False).train()
    before = encoder.backbone.embeddings.batchnorm.running_mean.clone()
    (encoder(torch.randn(4, 3, 64, 64)) * torch.randn(4, 48)).sum().backward()
    assert encoder.backbone.embeddings.convolution.weight.grad.norm() > 0
    assert not torch.equal(encoder.backbone.embeddings.batchnorm.running_mean, before)


def test_gradient_checkpointing_reaches_the_backbones_and_changes_no_gradient(config: EdgeGlassConfig, batch):
    config.vision_freeze = config.text_freeze = False
    torch.manual_seed(0)
    model = EdgeGlassModel(config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch, return_loss=True, step=0).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable()
    assert model.vision_encoder.backbone.is_activation_checkpointing
    assert model.text_encoder.backbone.is_activation_checkpointing
    torch.testing.assert_close(gradients(), plain)


def test_bf16_autocast_trains_with_a_float32_loss(model: EdgeGlassModel, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, return_loss=True, step=0)
    assert output.loss.dtype == output.image_embeds.dtype == torch.float32
    torch.testing.assert_close(output.loss, model(**batch, return_loss=True, step=0).loss, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection_dim": 0}, "projection_dim must be positive, got 0"),
        ({"mrl_dimensions": [32, 64]}, r"mrl_dimensions must lie in 1\.\.63, got 64"),
        ({"mrl_dimensions": [0]}, r"mrl_dimensions must lie in 1\.\.63, got 0"),
        ({"vision_pooling_type": "max"}, "pooling_type must be one of simple, multihead, statistics, got 'max'"),
    ],
)
def test_impossible_configs_are_errors(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        EdgeGlassConfig(**({"projection_dim": 64, "mrl_dimensions": [16]} | change))


def test_a_misspelt_config_field_is_an_error(vision_dir: str, text_dir: str):
    with pytest.raises(
        ValueError, match="there is no config field 'pooling_type'; did you mean text_pooling_type or vis"
    ):
        EdgeGlassModel.from_vision_text_pretrained(vision_dir, text_dir, pooling_type="multihead")


@pytest.fixture
def saved(vision_dir: str, text_dir: str, tmp_path) -> Path:
    model = EdgeGlassModel.from_vision_text_pretrained(vision_dir, text_dir, projection_dim=64, mrl_dimensions=[16])
    model.save_pretrained(tmp_path / "saved")
    EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_model_that_lacks_weights_is_refused_rather_than_filled_up(saved: Path):
    load_model(str(saved))
    weights = load_file(saved / "model.safetensors")
    del weights["text_encoder.projection.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"saved: no whole .*: it lacks 1 weights, such as text_encoder\.projection"):
        load_model(str(saved))


@pytest.mark.parametrize("length", [0, 100, 10_000])
def test_a_saved_model_that_was_cut_short_is_one_line(saved: Path, length: int):
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:length])
    with pytest.raises(ConfigError, match=r"saved: no EdgeGlass model: .*header") as caught:
        load_model(str(saved))
    assert "\n" not in str(caught.value)


def test_a_directory_of_another_model_is_refused(vision_dir: str, tmp_path):
    with pytest.raises(ConfigError, match=r"its config\.json tells of a model of type vit"):
        load_model(vision_dir)
    with pytest.raises(ConfigError, match=r"no EdgeGlass model: its config\.json .* is not there"):
        load_model(str(tmp_path))


def test_config_survives_saving(config: EdgeGlassConfig, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = EdgeGlassConfig.from_pretrained(tmp_path)
    assert loaded.mrl_dimensions == [32, 16, 8]
    assert loaded.vision_config.hidden_size == TINY["hidden_size"]
    assert loaded.text_config.model_type == "bert"
