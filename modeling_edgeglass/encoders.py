"""The two towers: backbone -> pooling -> projection -> unit length."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .backbones import SUPPORTED_BACKBONES, Modality, has_first_token
from .feature_layers import LAST, join_layers, layer_sizes
from .matryoshka import truncate_embeds
from .pooling import build_pooling, masked_mean

# Tokens without a place in the picture: CLS, distillation, registers.
MAX_PREFIX_TOKENS = 16


class _Encoder(nn.Module):
    """What both towers share: a backbone, frozen or not, and the way from its tokens to the embedding."""

    modality: Modality

    def __init__(
        self,
        backbone: PreTrainedModel,
        projection_dim: int = 4096,
        use_attention_pooling: bool = True,
        pooling_type: str = "simple",
        *,
        freeze: bool = True,
        feature_layers: Sequence[int] = (LAST,),
    ) -> None:
        super().__init__()
        sizes = layer_sizes(backbone, feature_layers)
        self.hidden_size, self.feature_layers = sum(sizes), tuple(feature_layers)
        self.freeze = freeze
        self.backbone = backbone
        self.pooling: Any = None
        if use_attention_pooling:
            self.pooling = build_pooling(pooling_type, *sizes, has_first_token=has_first_token(backbone))
        self.pooled_size = self.hidden_size if self.pooling is None else self.pooling.output_size
        self.projection = nn.Linear(self.pooled_size, projection_dim)
        self.train(self.training)

    def train(self, mode: bool = True) -> "_Encoder":
        """As for any module, but a frozen backbone stays frozen.

        That is in eval mode, because its batch-norm statistics must not move, and without gradients; here,
        because `from_pretrained` makes new parameters with gradients and ends in `eval()`.
        """
        super().train(mode)
        if self.freeze:
            self.backbone.eval().requires_grad_(False)
        return self

    def embed(self, features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pool and project features (B, N, hidden_size) to unit vectors (B, projection_dim), in float32.

        Args:
            features: What `features` gives, in any precision; or what `pool` gives (B, pooled_size).
            attention_mask: 1 for a real token, 0 for padding (B, N); None takes all as real.
        """
        pooled = self.pool(features, attention_mask).to(self.projection.weight.dtype)  # statistics are float32
        return truncate_embeds(self.projection(pooled), None)

    def pool(self, features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pool features (B, N, hidden_size) to one vector per sample (B, pooled_size); what is pooled stays so."""
        features = features.to(self.projection.weight.dtype)
        if features.ndim == 2:
            return features
        pool = masked_mean if self.pooling is None else self.pooling
        return pool(features, attention_mask)

    def _run_backbone(self, **inputs: Any) -> ModelOutput:
        """What the backbone returns, with the layers that are pooled."""
        if self.feature_layers != (LAST,):
            inputs["output_hidden_states"] = True
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            outputs: ModelOutput = self.backbone(**inputs)
        if "last_hidden_state" not in outputs:
            raise ValueError(
                f"{type(self.backbone).__name__} returns no last_hidden_state; "
                f"use {SUPPORTED_BACKBONES[self.modality]}"
            )
        return outputs

    def tokens(self, outputs: ModelOutput) -> Tensor:
        """The tokens (B, N, hidden_size) in what a backbone returned."""
        tokens = join_layers(outputs, self.feature_layers)
        if tokens.ndim != 3 or tokens.shape[-1] != self.hidden_size:
            raise ValueError(
                f"{type(self.backbone).__name__} returns tokens of shape {tuple(tokens.shape)}, where its config says "
                f"that they are {self.hidden_size} wide; use {SUPPORTED_BACKBONES[self.modality]}"
            )
        return tokens

    def to_be_pooled(self, outputs: ModelOutput, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The tokens (B, N, D) and their mask, or the backbone's own pooled output (B, 1, D) in their place."""
        tokens, pooler_output = self.tokens(outputs), self._pooler_output(outputs)
        if self.pooling is not None or pooler_output is None:
            return tokens, attention_mask
        return pooler_output.flatten(1).unsqueeze(1), None

    def _pooler_output(self, outputs: ModelOutput) -> Tensor | None:
        return outputs.get("pooler_output")


class VisionEncoder(_Encoder):
    """The vision tower.

    Args:
        backbone: Vision model whose `last_hidden_state` is tokens (B, N, D) or a feature map (B, D, H, W).
        projection_dim: Size of the full embedding.
        use_attention_pooling: Learned pooling; False takes the backbone's pooled output, or the tokens' mean.
        pooling_type: `"simple"`, `"multihead"` or `"statistics"`.
        freeze: Keep the backbone as it is: no gradients, always in eval mode.
        feature_layers: Layers whose tokens stand side by side, from -1, `last_hidden_state`, backwards through
            `hidden_states`; `hidden_size` is their width together.
    """

    modality = "vision"

    def forward(self, pixel_values: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Embed pictures as unit vectors (B, projection_dim), in float32.

        Learned positions are interpolated where S is not the size that the backbone was trained on.

        Args:
            pixel_values: The pictures (B, 3, S, S).
            features: What `features` or `pool` gave for them, in their place.
        """
        if features is None:
            assert pixel_values is not None
            features = self.features(pixel_values)
        return self.embed(features)

    def features(self, pixel_values: Tensor) -> Tensor:
        """What is pooled of pictures (B, 3, S, S): the backbone's tokens (B, N, D), or its pooled output (B, 1, D).

        A function of the picture alone where the backbone is frozen, so that it can be kept.
        """
        return self.to_be_pooled(self.look_at(pixel_values))[0]

    def look_at(self, pixel_values: Tensor, **inputs: Any) -> ModelOutput:
        """What the backbone returns for pictures (B, 3, S, S) of any size.

        Args:
            pixel_values: The pictures.
            **inputs: Further arguments of the backbone, such as `output_attentions`.
        """
        inputs["pixel_values"] = pixel_values.to(self.backbone.dtype)
        own_size = self.backbone.config.to_dict().get("image_size")
        own_sizes = tuple(own_size) if isinstance(own_size, list | tuple) else (own_size, own_size)
        can_interpolate = "interpolate_pos_encoding" in inspect.signature(self.backbone.forward).parameters
        # DINOv2 and its kin interpolate without being asked.
        if can_interpolate and tuple(pixel_values.shape[2:]) != own_sizes:
            inputs["interpolate_pos_encoding"] = True
        return self._run_backbone(**inputs)

    def attention_map(self, pixel_values: Tensor) -> Tensor:
        """Weights that the learned pooling gives to the places of pictures (B, 3, S, S), as (B, height, width).

        Those of a picture sum to 1, or to less where tokens without a place (CLS, registers) have the rest.

        Raises:
            ValueError: The pooling is not a learned one, or the tokens lie on no grid.
        """
        if self.pooling is None:
            raise ValueError("use_attention_pooling is false: there are no learned weights to show")
        tokens = self.tokens(self.look_at(pixel_values)).to(self.projection.weight.dtype)
        weights: Tensor = self.pooling.attention_weights(tokens)  # (B, N)
        height, width = self._grid(weights.shape[1], pixel_values.shape[2:])
        return weights[:, -height * width :].unflatten(1, (height, width))

    def _grid(self, num_tokens: int, image_size: torch.Size) -> tuple[int, int]:
        """Rows and columns that the last tokens of a picture (height, width) lie on; CLS and registers come first."""
        patch_size = self.backbone.config.to_dict().get("patch_size")
        if patch_size is not None:
            down, right = patch_size if isinstance(patch_size, list | tuple) else (patch_size, patch_size)
            height, width = image_size[0] // down, image_size[1] // right
            if 0 <= num_tokens - height * width <= MAX_PREFIX_TOKENS:
                return height, width
        side = math.isqrt(num_tokens)
        if side * side != num_tokens:
            raise ValueError(f"the {num_tokens} tokens of {type(self.backbone).__name__} lie on no grid")
        return side, side


class TextEncoder(_Encoder):
    """The text tower.

    Args:
        backbone: Text model whose `last_hidden_state` is tokens (B, N, D), an encoder or a causal model.
        projection_dim: Size of the full embedding.
        use_attention_pooling: Learned pooling; False takes the backbone's pooled output, or the masked mean.
        pooling_type: `"simple"`, `"multihead"` or `"statistics"`.
        freeze: Keep the backbone as it is: no gradients, always in eval mode.
        feature_layers: As for `VisionEncoder`.
    """

    modality = "text"

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, features: Tensor | None = None
    ) -> Tensor:
        """Embed captions as unit vectors (B, projection_dim), in float32.

        Args:
            input_ids: Token ids (B, L), padded left or right.
            attention_mask: 1 for a real token, 0 for padding (B, L); None takes all as real.
            features: What `features` or `pool` gave for them, in the place of `input_ids`; the mask is then theirs.
        """
        if features is None:
            assert input_ids is not None
            features, attention_mask = self.features(input_ids, attention_mask)
        return self.embed(features, attention_mask)

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is pooled of token ids (B, L): tokens (B, L, D) or the pooled output (B, 1, D); and the mask of that.

        A function of the caption alone where the backbone is frozen, so that it can be kept.
        """
        features, mask = self.to_be_pooled(self.read(input_ids, attention_mask), attention_mask)
        return features, input_ids.new_ones(features.shape[:2]) if mask is None else mask

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> ModelOutput:
        """What the backbone returns for token ids (B, L).

        Args:
            input_ids: The token ids.
            attention_mask: 1 for a real token, 0 for padding (B, L); None takes all as real.
            **inputs: Further arguments of the backbone, such as `output_attentions`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self._run_backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs)

    def _pooler_output(self, outputs: ModelOutput) -> Tensor | None:
        # SigLIP's reads the last token even where that is padding.
        return None if self.backbone.config.model_type.startswith("siglip") else super()._pooler_output(outputs)
