"""EdgeGlassModel: two towers, one Matryoshka space."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .backbones import build_backbone, load_backbone
from .captions import hash_captions
from .chunking import run_in_chunks
from .configuration_edgeglass import EdgeGlassConfig, refuse_unknown_fields
from .encoders import TextEncoder, VisionEncoder
from .losses import AlignmentLoss
from .matryoshka import truncate_embeds
from .pooling import AttentionPooling, SimpleAttentionPooling

# CLIP (arXiv:2103.00020, sec. 2.5) caps the scale at 100; above it training diverges.
MAX_LOGIT_SCALE = 100.0

# Sets of names that `PreTrainedModel.post_init` collects from the children of a model.
_INHERITED_SETS = (
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_load_missing",
)


@dataclass
class EdgeGlassOutput(ModelOutput):
    """What `EdgeGlassModel` returns.

    Args:
        loss: `contrastive_weight * loss_clip + mrl_weight * loss_mrl`; with `return_loss=True`, as the next two.
        loss_clip: Symmetric InfoNCE at the full size.
        loss_mrl: The same at the Matryoshka size of this step, or its mean over all sizes.
        logits_per_image: Scaled cosines (images, texts) at the full size; None in train mode with a loss, which
            needs no such matrix.
        logits_per_text: Their transpose.
        image_embeds: Unit vectors (B, projection_dim), float32.
        text_embeds: Unit vectors (B, projection_dim), float32.
        vision_model_output: What the vision backbone returned, where its hidden states or attentions were asked for.
        text_model_output: Likewise of the text backbone.
    """

    loss: Tensor | None = None
    loss_clip: Tensor | None = None
    loss_mrl: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    vision_model_output: ModelOutput | None = None
    text_model_output: ModelOutput | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """All that is not None, as transformers' own dual encoders give it."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class EdgeGlassPreTrainedModel(PreTrainedModel):
    """What every EdgeGlass model shares: its config, and how new weights start."""

    config: EdgeGlassConfig
    config_class = EdgeGlassConfig
    base_model_prefix = "edgeglass"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True  # passed on to the backbones by transformers
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # With **kwargs in forward and labels in a batch, Trainer would not divide by the accumulation steps.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start a layer of ours; transformers calls this for weights that no checkpoint holds."""
        if isinstance(module, SimpleAttentionPooling | AttentionPooling | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)  # CLIP's choice for its projections
            nn.init.zeros_(module.bias)
        elif isinstance(module, EdgeGlassModel):
            nn.init.constant_(module.logit_scale, self.config.logit_scale_init_value)


class EdgeGlassModel(EdgeGlassPreTrainedModel):
    """A vision and a text tower whose embeddings of a picture and its caption meet.

    Every prefix of an embedding, cut and scaled to unit length, is an embedding of its own.

    Args:
        config: The configuration of both towers.
        vision_backbone: Backbone to use; None makes one with random weights from `config.vision_config`.
        text_backbone: Likewise for text.
    """

    def __init__(
        self,
        config: EdgeGlassConfig,
        vision_backbone: PreTrainedModel | None = None,
        text_backbone: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        vision_backbone = vision_backbone or build_backbone("vision", config.vision_config)
        text_backbone = text_backbone or build_backbone("text", config.text_config)
        # One config object each, so that a later change of the attention implementation reaches the backbone.
        config.vision_config, config.text_config = vision_backbone.config, text_backbone.config
        self.vision_encoder = VisionEncoder(
            vision_backbone,
            config.projection_dim,
            config.vision_use_attention_pooling,
            config.vision_pooling_type,
            freeze=config.vision_freeze,
            feature_layers=config.vision_feature_layers,
        )
        self.text_encoder = TextEncoder(
            text_backbone,
            config.projection_dim,
            config.text_use_attention_pooling,
            config.text_pooling_type,
            freeze=config.text_freeze,
            feature_layers=config.text_feature_layers,
        )
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.alignment_loss = AlignmentLoss(
            config.contrastive_weight,
            config.mrl_weight,
            config.mrl_dimensions,
            config.sample_single_mrl_dim,
            mask_equal_captions=config.mask_equal_captions,
            seed=config.mrl_seed,
        )
        self.post_init()

    def post_init(self) -> None:
        """As for any model. What transformers asks the children of a model for, the towers take from their backbone.

        Without it a T5 backbone would lose its tied embedding when loaded, and its float32 layers in fp16.
        """
        for encoder in (self.vision_encoder, self.text_encoder):
            backbone = encoder.backbone
            handed_up: dict[str, Any] = {name: getattr(backbone, name) for name in _INHERITED_SETS}
            handed_up["all_tied_weights_keys"] = {
                f"backbone.{key}": f"backbone.{source}" for key, source in backbone.all_tied_weights_keys.items()
            }
            handed_up["_keys_to_ignore_on_save"] = {
                f"backbone.{key}" for key in backbone._keys_to_ignore_on_save or ()
            }
            for name, value in handed_up.items():
                setattr(encoder, name, value)
        super().post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        *,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        vision_trust_remote_code: bool = False,
        text_trust_remote_code: bool = False,
        dtype: torch.dtype | str = torch.float32,
        **config: Any,
    ) -> "EdgeGlassModel":
        """Join two pretrained backbones; pooling and projections are new and want training.

        Args:
            vision: Model id or directory of the vision backbone; of CLIP and its kin the vision half is taken.
            text: Model id or directory of the text backbone; of CLIP and its kin the text half is taken.
            vision_revision: Commit, tag or branch on the Hub.
            text_revision: Commit, tag or branch on the Hub.
            vision_trust_remote_code: Run model code that comes with the vision checkpoint.
            text_trust_remote_code: Run model code that comes with the text checkpoint.
            dtype: Precision of the backbones. New layers are float32.
            **config: Fields of `EdgeGlassConfig`.

        Raises:
            ValueError: A backbone does not exist or cannot be used, or a field has no possible value.
        """
        refuse_unknown_fields(EdgeGlassConfig, config)
        vision_backbone = load_backbone(
            "vision", vision, revision=vision_revision, trust_remote_code=vision_trust_remote_code, dtype=dtype
        )
        text_backbone = load_backbone(
            "text", text, revision=text_revision, trust_remote_code=text_trust_remote_code, dtype=dtype
        )
        return cls(
            EdgeGlassConfig(
                vision_config=vision_backbone.config.to_dict(),
                text_config=text_backbone.config.to_dict(),
                vision_name_or_path=vision,
                vision_revision=getattr(vision_backbone.config, "_commit_hash", None) or vision_revision,
                text_name_or_path=text,
                text_revision=getattr(text_backbone.config, "_commit_hash", None) or text_revision,
                **config,
            ),
            vision_backbone,
            text_backbone,
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As for any model; our code goes with it, for machines where this package is not installed."""
        name = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
        self.config.auto_map = {"AutoModel": name, "AutoModelForZeroShotImageClassification": name}
        super().save_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The text backbone's."""
        return self.text_encoder.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Exchange the text backbone's, as `resize_token_embeddings` does."""
        self.text_encoder.backbone.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, truncate_dim: int | None = None) -> Tensor:
        """Embed pictures `pixel_values` (B, 3, S, S) as unit vectors (B, truncate_dim), in float32.

        Args:
            pixel_values: Pictures as `EdgeGlassProcessor` makes them.
            truncate_dim: Numbers kept of each embedding, 1..projection_dim; None keeps all.
        """
        return truncate_embeds(self.vision_encoder(pixel_values), truncate_dim)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, truncate_dim: int | None = None
    ) -> Tensor:
        """Embed token ids (B, L) as unit vectors (B, truncate_dim), in float32.

        Args:
            input_ids: Token ids as `EdgeGlassProcessor` makes them.
            attention_mask: 1 for a real token, 0 for padding (B, L).
            truncate_dim: Numbers kept of each embedding, 1..projection_dim; None keeps all.
        """
        return truncate_embeds(self.text_encoder(input_ids, attention_mask), truncate_dim)

    def trained_state_dict(self) -> dict[str, Tensor]:
        """The weights that training changes: all but those of frozen backbones, and a tied weight once.

        safetensors refuses a weight that has two names, such as the embedding of T5.
        """
        frozen = tuple(f"{name}.backbone." for name, encoder in self._encoders() if encoder.freeze)
        distinct = {name for named in (self.named_parameters(), self.named_buffers()) for name, _ in named}
        return {
            name: value
            for name, value in self.state_dict().items()
            if name in distinct and not name.startswith(frozen or ("-",))
        }

    def load_trained_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `trained_state_dict` gave.

        Raises:
            ValueError: A weight is missing or is none of this model's.
        """
        if wrong := sorted(set(state) ^ set(self.trained_state_dict())):
            raise ValueError(f"the weights are not this model's: {wrong[0]} and {len(wrong) - 1} others differ")
        self.load_state_dict(state, strict=False)

    def _encoders(self) -> tuple[tuple[str, VisionEncoder], tuple[str, TextEncoder]]:
        return ("vision_encoder", self.vision_encoder), ("text_encoder", self.text_encoder)

    def capped_logit_scale(self) -> Tensor:
        """1 / temperature, at most 100."""
        with torch.no_grad():  # the parameter itself is capped: clamping its exponential would end its gradient
            self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        return self.logit_scale.exp()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
        step: int | None = None,
        *,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        caption_ids: Tensor | None = None,
        tower_chunk_size: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> EdgeGlassOutput:
        """Embed pictures and captions, compare all with all, and score the pairs; or embed one of the two.

        Args:
            pixel_values: Pictures (B, 3, S, S).
            input_ids: Token ids of their captions (B, L).
            attention_mask: 1 for a real token, 0 for padding (B, L).
            return_loss: Also return the loss of the pairs (picture i, caption i).
            step: Optimizer step, which decides the Matryoshka size; None counts the training calls instead.
            image_features: What `vision_encoder.features` gave (B, N, D), or `pool` of it, in the place of
                `pixel_values`.
            text_features: What `text_encoder.features` gave (B, L, D), or `pool` of it, in the place of
                `input_ids`; `attention_mask` is then of these.
            caption_ids: One integer per caption (B,), equal where the captions are; None takes hashes of `input_ids`.
            tower_chunk_size: Samples that pass a tower at once; see `run_in_chunks`. None takes all.
            output_hidden_states: Also return the backbones' outputs with their hidden states; None asks the config.
            output_attentions: Likewise with their attentions.

        Raises:
            ValueError: `return_loss` with a single pair; or an input is missing, or given twice.
        """
        pictures, captions = (pixel_values, image_features), (input_ids, text_features)
        given = [sum(value is not None for value in values) for values in (pictures, captions)]
        if max(given) > 1 or sum(given) < (2 if return_loss else 1):
            raise ValueError(
                "give pixel_values or image_features, and input_ids or text_features; without a loss one of the two "
                "is enough"
            )
        if return_loss and caption_ids is None and input_ids is not None:
            caption_ids = hash_captions(input_ids, attention_mask)
        output = EdgeGlassOutput()
        if inner := self._asked_for(output_hidden_states=output_hidden_states, output_attentions=output_attentions):
            if pixel_values is not None:
                output.vision_model_output = self.vision_encoder.look_at(pixel_values, **inner)
                image_features, _ = self.vision_encoder.to_be_pooled(output.vision_model_output)
            if input_ids is not None:
                output.text_model_output = self.text_encoder.read(input_ids, attention_mask, **inner)
                text_features, attention_mask = self.text_encoder.to_be_pooled(
                    output.text_model_output, attention_mask
                )
        if given[0]:
            output.image_embeds = run_in_chunks(self.vision_encoder, tower_chunk_size, pixel_values, image_features)
        if given[1]:
            output.text_embeds = run_in_chunks(
                self.text_encoder, tower_chunk_size, input_ids, attention_mask, text_features
            )
        if all(given):
            self._compare(output, return_loss, caption_ids, step)
        return output

    def _compare(
        self, output: EdgeGlassOutput, return_loss: bool, caption_ids: Tensor | None, step: int | None
    ) -> None:
        """Put logits and losses beside the embeddings."""
        assert output.image_embeds is not None
        assert output.text_embeds is not None
        logit_scale = self.capped_logit_scale()
        if not (return_loss and self.training):
            output.logits_per_image = logit_scale * output.image_embeds @ output.text_embeds.T  # (images, texts)
            output.logits_per_text = output.logits_per_image.T
        if return_loss:
            losses = self.alignment_loss(
                output.image_embeds,
                output.text_embeds,
                logit_scale=logit_scale,
                caption_ids=caption_ids,
                step=step,
            )
            output.loss, output.loss_clip, output.loss_mrl = losses.loss, losses.loss_clip, losses.loss_mrl

    def _asked_for(self, **inner: bool | None) -> dict[str, bool]:
        """What a backbone is to return besides its tokens."""
        asked = {name: getattr(self.config, name) if value is None else value for name, value in inner.items()}
        return {name: True for name, value in asked.items() if value}
