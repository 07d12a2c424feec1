"""Tokens of several layers: told apart, joined, pooled each by itself."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, SwinConfig, SwinModel, ViTConfig, ViTModel

from modeling_edgeglass import EdgeGlassConfig, EdgeGlassModel, TextEncoder, VisionEncoder
from modeling_edgeglass.backbones import has_first_token, hidden_size, load_backbone
from modeling_edgeglass.feature_layers import join_layers, layer_sizes
from modeling_edgeglass.pooling import StatisticsPooling
from tests.test_backbones import TEXT_MODELS, TINY, VISION, VISION_MODELS

PICTURES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def vit() -> ViTModel:
    return ViTModel(ViTConfig(**TINY, **VISION)).eval()


@pytest.mark.parametrize("name", sorted(set(VISION_MODELS) - {"clip", "siglip"}))  # whose halves are ViTs
def test_every_layer_of_every_family_is_as_wide_as_told(name: str):
    whole = VISION_MODELS[name]().eval()
    backbone = whole.base_model
    outputs = backbone(pixel_values=PICTURES, output_hidden_states=True)
    for layer in range(-len(outputs.hidden_states), 0):
        layers = (-1, layer) if layer < -1 else (-1,)
        sizes = layer_sizes(backbone, layers)
        tokens = join_layers(outputs, layers)
        assert tokens.shape[-1] == sum(sizes)
        encoder = VisionEncoder(backbone, 8, pooling_type="statistics", feature_layers=layers).eval()
        torch.testing.assert_close(encoder.features(PICTURES), tokens)


def test_layers_of_a_transformer_stand_side_by_side():
    backbone = vit()
    outputs = backbone(pixel_values=PICTURES, output_hidden_states=True)
    joined = join_layers(outputs, [-1, -2])
    assert torch.equal(joined, torch.cat([outputs.last_hidden_state, outputs.hidden_states[-2]], dim=2))
    assert torch.equal(join_layers(outputs, [-1]), outputs.last_hidden_state)


def test_a_larger_feature_map_is_averaged_to_the_grid_of_the_last():
    last, earlier = torch.randn(2, 3, 2, 2), torch.randn(2, 5, 4, 4)
    outputs = {"last_hidden_state": last, "hidden_states": (earlier, last)}
    joined = join_layers(outputs, [-1, -2])
    assert joined.shape == (2, 4, 8)
    torch.testing.assert_close(joined[:, 1, :3], last[:, :, 0, 1])
    torch.testing.assert_close(joined[:, 1, 3:], earlier[:, :, :2, 2:].mean(dim=(2, 3)))


def test_statistics_of_joined_layers_are_those_of_each_layer():
    """No layer's scale drowns another: parts of the earlier one stay the same when it is ten times as large."""
    tokens, earlier = torch.randn(3, 5, 8), torch.randn(3, 5, 4)
    joined = StatisticsPooling(12, layer_sizes=[8, 4])(torch.cat([tokens, 10 * earlier], dim=2))
    parts = zip(
        StatisticsPooling(8)(tokens).split(8, dim=1), StatisticsPooling(4)(earlier).split(4, dim=1), strict=True
    )
    torch.testing.assert_close(
        joined, F.normalize(torch.cat([piece for pair in parts for piece in pair], dim=1), dim=1)
    )


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_layers_of_every_text_family_stand_side_by_side(name: str, tmp_path):
    TEXT_MODELS[name]().save_pretrained(tmp_path)
    backbone = load_backbone("text", str(tmp_path)).eval()
    input_ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    outputs = backbone(input_ids=input_ids, output_hidden_states=True)
    encoder = TextEncoder(backbone, 8, pooling_type="statistics", feature_layers=[-1, -2]).eval()
    features, _ = encoder.features(input_ids)
    expected = torch.cat([outputs.last_hidden_state, outputs.hidden_states[-2]], dim=2)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert encoder.pooled_size == (3 + has_first_token(backbone)) * 2 * hidden_size(backbone.config)
    assert encoder(input_ids=input_ids).shape == (2, 8)


def test_a_model_of_several_layers_survives_saving(config: EdgeGlassConfig, batch: dict[str, torch.Tensor], tmp_path):
    layers = {
        f"{side}_{key}": value
        for side in ("vision", "text")
        for key, value in {"feature_layers": [-1, -2], "pooling_type": "statistics"}.items()
    }
    model = EdgeGlassModel(EdgeGlassConfig(**config.to_dict() | layers)).eval()
    model.save_pretrained(tmp_path)
    loaded = EdgeGlassModel.from_pretrained(tmp_path)
    assert loaded.config.vision_feature_layers == [-1, -2]
    assert loaded.vision_encoder.pooling.layer_sizes == model.vision_encoder.pooling.layer_sizes
    torch.testing.assert_close(loaded(**batch).logits_per_image, model(**batch).logits_per_image)


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="ViTModel has no layer -9; use feature_layers from -1, its last, to -3"):
        VisionEncoder(vit(), 8, feature_layers=[-1, -9])
    with pytest.raises(ValueError, match="BertModel has no layer -4; use feature_layers from -1, its last, to -3"):
        TextEncoder(BertModel(BertConfig(**TINY)), 8, feature_layers=[-4])


def test_layers_whose_tokens_differ_in_number_cannot_be_joined():
    swin = SwinModel(
        SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    )
    with pytest.raises(ValueError, match="layer -3 gives 256 tokens and the last 64: they cannot stand side by side"):
        layer_sizes(swin, [-1, -3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layers": [0]}, "must be -1, -2 or less, got "),
        ({"vision_feature_layers": []}, "must be -1, -2 or less, got "),
        (
            {"vision_feature_layers": [-1, -2], "vision_use_attention_pooling": False},
            "want vision_use_attention_pooling: true",
        ),
    ],
)
def test_impossible_layers_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        EdgeGlassConfig(**changes)
