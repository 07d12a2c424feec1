import pytest
import torch
from transformers import ConvNextConfig, Dinov2WithRegistersConfig, SiglipVisionConfig, ViTConfig

from modeling_edgeglass import AttentionPooling, SimpleAttentionPooling, VisionEncoder
from modeling_edgeglass.backbones import build_backbone
from tests.towers import IMAGE_SIZE, TINY, tiny_efficientnet


def random_pooling(kind: type, hidden_size: int = 16) -> torch.nn.Module:
    torch.manual_seed(0)
    pooling = kind(hidden_size)
    for parameter in pooling.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return pooling.eval()


@pytest.mark.parametrize("kind", [SimpleAttentionPooling, AttentionPooling])
def test_weights_sum_to_one_over_real_tokens_and_padding_has_none(kind: type):
    pooling, tokens = random_pooling(kind), torch.randn(3, 5, 16)
    attention_mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    weights = pooling.attention_weights(tokens, attention_mask)
    torch.testing.assert_close(weights.sum(dim=1), torch.tensor([1.0, 1.0, 0.0]))
    assert (weights[attention_mask == 0] == 0).all()
    torch.testing.assert_close(pooling.attention_weights(tokens[1:2, 1:3])[0], weights[1, 1:3])


def test_weights_are_those_of_the_weighted_mean():
    pooling, tokens = random_pooling(SimpleAttentionPooling), torch.randn(3, 5, 16)
    weighted = torch.einsum("bn,bnd->bd", pooling.attention_weights(tokens), tokens)
    torch.testing.assert_close(weighted, pooling(tokens))


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (ViTConfig(**TINY, image_size=IMAGE_SIZE, patch_size=8), (4, 4)),
        (SiglipVisionConfig(**TINY, image_size=IMAGE_SIZE, patch_size=16), (2, 2)),
        # Five tokens without a place before four with one: nine, which would be a square.
        (Dinov2WithRegistersConfig(**TINY, image_size=IMAGE_SIZE, patch_size=16, num_register_tokens=4), (2, 2)),
        (ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], patch_size=4), (1, 1)),
        (tiny_efficientnet(), (1, 1)),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "model_type") else "",
)
def test_a_map_has_the_weights_of_the_places(config, grid: tuple[int, int]):
    torch.manual_seed(0)
    encoder = VisionEncoder(build_backbone("vision", config), projection_dim=8).eval()
    torch.nn.init.normal_(encoder.pooling.score)
    pixel_values = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    attention = encoder.attention_map(pixel_values)
    assert attention.shape == (2, *grid)
    tokens = encoder.tokens(encoder.look_at(pixel_values))
    weights = encoder.pooling.attention_weights(tokens)
    torch.testing.assert_close(attention.flatten(1), weights[:, weights.shape[1] - grid[0] * grid[1] :])


def test_a_pooling_that_is_not_learned_has_no_map():
    backbone = build_backbone("vision", ViTConfig(**TINY, image_size=IMAGE_SIZE, patch_size=8))
    encoder = VisionEncoder(backbone, projection_dim=8, use_attention_pooling=False)
    with pytest.raises(ValueError, match="use_attention_pooling is false"):
        encoder.attention_map(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
