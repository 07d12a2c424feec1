"""Tokens of several layers of a backbone, side by side.

The last layer forgets what its own training did not need; earlier ones still have it. LLaVA in transformers joins
layers the same way (`vision_feature_layer`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .backbones import hidden_size

LAST = -1


def layer_sizes(backbone: PreTrainedModel, layers: Sequence[int]) -> list[int]:
    """Width of the tokens of each of some layers.

    Args:
        backbone: A vision or a text backbone.
        layers: As `join_layers` takes them.

    Raises:
        ValueError: It has no such layer, or their tokens cannot be joined.
    """
    if tuple(layers) == (LAST,):
        return [hidden_size(backbone.config)]
    outputs = _trial(backbone) if backbone.main_input_name == "pixel_values" else None
    depth = backbone.config.num_hidden_layers + 1 if outputs is None else len(outputs.get("hidden_states") or [LAST])
    if missing := [layer for layer in layers if layer < -depth]:
        name = type(backbone).__name__
        raise ValueError(f"{name} has no layer {missing[0]}; use feature_layers from -1, its last, to {-depth}")
    if outputs is None:  # all layers of a transformer are as wide
        return [hidden_size(backbone.config)] * len(layers)
    return [tokens.shape[-1] for tokens in _aligned(outputs, layers)]


def _trial(backbone: PreTrainedModel) -> Any:
    """Outputs without values for a picture: no config tells the widths of a convolutional backbone's layers."""
    side = backbone.config.to_dict().get("image_size") or 224
    height, width = side if isinstance(side, list | tuple) else (side, side)
    with torch.device("meta"), torch.no_grad():  # takes neither memory nor time
        twin = type(backbone)(backbone.config).eval()
        return twin(pixel_values=torch.empty(1, 3, height, width), output_hidden_states=True)


def join_layers(outputs: Any, layers: Sequence[int]) -> Tensor:
    """Tokens (B, N, D) of some layers, joined along D; feature maps shrink to the last layer's grid.

    Args:
        outputs: What a backbone returned, with `hidden_states` unless the last layer alone is wanted.
        layers: Counted from the end; -1 is `last_hidden_state`, -2 and so on are `hidden_states`.

    Raises:
        ValueError: A layer has another number of tokens.
    """
    tokens = _aligned(outputs, layers)
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=-1)


def _aligned(outputs: Any, layers: Sequence[int]) -> list[Tensor]:
    """Tokens (B, N, D) of each layer, with the last one's N."""
    last = outputs["last_hidden_state"]
    found = [last if layer == LAST else outputs["hidden_states"][layer] for layer in layers]
    if last.ndim == 4:  # feature maps (B, D, H, W)
        grid = last.shape[2:]
        maps = [tokens if tokens.shape[2:] == grid else F.adaptive_avg_pool2d(tokens, grid) for tokens in found]
        return [tokens.flatten(2).mT for tokens in maps]
    for layer, tokens in zip(layers, found, strict=True):
        if tokens.shape[1] != last.shape[1]:
            raise ValueError(
                f"layer {layer} gives {tokens.shape[1]} tokens and the last {last.shape[1]}: they cannot stand side "
                "by side; name a later layer in feature_layers"
            )
    return found
