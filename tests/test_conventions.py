"""What users of transformers expect of any model, on ours: its own common tests, as far as they are about us."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForZeroShotImageClassification, ViTConfig

from modeling_edgeglass import EdgeGlassConfig, EdgeGlassModel
from modeling_edgeglass.pooling import SimpleAttentionPooling
from tests.towers import TINY


def test_hidden_states_and_attentions_are_the_backbones_own(model: EdgeGlassModel, batch: dict[str, Tensor]):
    model.set_attn_implementation("eager")  # the only one that has weights to show
    plain = model.eval()(**batch)
    assert plain.vision_model_output is None
    assert plain.text_model_output is None
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    for found, expected in (
        (output.vision_model_output, model.vision_encoder.backbone(batch["pixel_values"], **wanted)),
        (
            output.text_model_output,
            model.text_encoder.backbone(batch["input_ids"], attention_mask=batch["attention_mask"], **wanted),
        ),
    ):
        torch.testing.assert_close(found.to_tuple(), expected.to_tuple(), rtol=0, atol=0)
        assert len(found.hidden_states) == TINY["num_hidden_layers"] + 1
        assert found.attentions[0].shape[:2] == (6, TINY["num_attention_heads"])
    assert torch.equal(output.image_embeds, plain.image_embeds)
    assert torch.equal(output.text_embeds, plain.text_embeds)
    assert torch.equal(
        model(**batch, output_hidden_states=True, return_loss=True).loss, model(**batch, return_loss=True).loss
    )


def test_a_config_can_ask_for_hidden_states_and_a_call_can_decline(model: EdgeGlassModel, batch: dict[str, Tensor]):
    model.config.output_hidden_states = True
    assert model(**batch).text_model_output.hidden_states is not None
    assert model(**batch, output_hidden_states=False).text_model_output is None


@pytest.mark.parametrize("options", [{}, {"return_loss": True}, {"output_hidden_states": True}])
def test_return_dict_false_gives_the_same_values_as_a_tuple(model: EdgeGlassModel, batch, options: dict):
    model.eval()
    as_dict, as_tuple = model(**batch, **options), model(**batch, **options, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple, as_dict.to_tuple(), rtol=0, atol=0)
    model.config.return_dict = False
    torch.testing.assert_close(model(**batch, **options), as_tuple, rtol=0, atol=0)


def test_one_of_the_two_is_enough_without_a_loss(model: EdgeGlassModel, batch: dict[str, Tensor]):
    both = model.eval()(**batch)
    pictures = model(pixel_values=batch["pixel_values"])
    assert torch.equal(pictures[0], both.image_embeds)  # what the pipeline for features of pictures takes
    assert list(pictures) == ["image_embeds"]
    captions = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(captions[0], both.text_embeds)
    for missing in ({}, {"return_loss": True, "pixel_values": batch["pixel_values"]}):
        with pytest.raises(ValueError, match="without a loss one of the two is enough"):
            model(**missing)
    with pytest.raises(ValueError, match="give pixel_values or image_features"):
        model(pixel_values=batch["pixel_values"], image_features=both.image_embeds)


@pytest.mark.parametrize("freeze", [True, False])
def test_the_vocabulary_can_grow(config: EdgeGlassConfig, batch: dict[str, Tensor], freeze: bool, tmp_path: Path):
    config.text_freeze = freeze
    model = EdgeGlassModel(config).eval()
    before = model(**batch).text_embeds
    model.resize_token_embeddings(105)
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size == 105
    assert torch.equal(model(**batch).text_embeds, before)
    new_token = model.get_text_features(torch.tensor([[104, 3]]))
    model.save_pretrained(tmp_path)
    loaded = EdgeGlassModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.get_text_features(torch.tensor([[104, 3]])), new_token)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert loaded.get_input_embeddings().weight.requires_grad is not freeze
    assert model.train().get_input_embeddings().weight.requires_grad is not freeze


def test_every_attention_gives_the_same_embeddings(model: EdgeGlassModel, batch: dict[str, Tensor]):
    model.eval()
    found = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.vision_encoder.backbone.config._attn_implementation == attention
        assert model.text_encoder.backbone.config._attn_implementation == attention
        found[attention] = model(**batch)
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(found["eager"][name], found["sdpa"][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling_type", ["simple", "multihead", "statistics"])
def test_a_sample_does_not_depend_on_its_batch(config: EdgeGlassConfig, batch: dict[str, Tensor], pooling_type: str):
    config.vision_pooling_type = config.text_pooling_type = pooling_type
    torch.manual_seed(0)
    model = EdgeGlassModel(config).eval()
    together = model(**batch)
    for i, length in enumerate(batch["attention_mask"].sum(dim=1)):
        alone = model(batch["pixel_values"][[i]], batch["input_ids"][[i], :length])  # and without its padding
        torch.testing.assert_close(alone.image_embeds[0], together.image_embeds[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone.text_embeds[0], together.text_embeds[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone.logits_per_image[0, 0], together.logits_per_image[i, i], rtol=1e-4, atol=1e-5)


def test_every_field_of_a_config_survives_saving(tmp_path: Path):
    changed = {
        "vision_config": ViTConfig(**TINY, image_size=16, patch_size=8),
        "projection_dim": 77,
        "mrl_dimensions": [33, 5],
        "vision_feature_layers": [-1, -2],
        "text_pooling_type": "statistics",
        "text_freeze": False,
        "contrastive_weight": 0.5,
        "sample_single_mrl_dim": False,
        "logit_scale_init_value": 1.5,
        "text_name_or_path": "somebody/tower",
    }
    config = EdgeGlassConfig(**changed)
    config.save_pretrained(tmp_path)
    loaded = EdgeGlassConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.vision_config, ViTConfig)


def test_fields_of_another_model_are_refused_instead_of_filled_with_random_weights(vision_dir: str):
    with pytest.raises(ValueError, match="this is a model of type 'vit', and not of 'edgeglass'; AutoModel loads any"):
        EdgeGlassModel.from_pretrained(vision_dir)


def test_auto_classes_give_our_class(model: EdgeGlassModel, tmp_path: Path):
    model.save_pretrained(tmp_path)
    for auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
        assert type(auto_class.from_pretrained(tmp_path)) is EdgeGlassModel
        assert type(auto_class.from_pretrained(tmp_path, trust_remote_code=True)) is EdgeGlassModel


def test_new_layers_start_again_where_a_checkpoint_lacks_them(model: EdgeGlassModel):
    """As transformers does it, by `_init_weights`: not with whatever lay in memory."""
    pooling = model.vision_encoder.pooling
    assert isinstance(pooling, SimpleAttentionPooling)
    torch.nn.init.ones_(pooling.score)
    model._init_weights(pooling)
    assert not pooling.score.any()
