"""Configurations: two backbones and the space that they share; a language model that reads from it."""

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

POOLING_TYPES = ("simple", "multihead", "statistics")
LANGUAGE_TRAININGS = ("frozen", "lora", "full")


def refuse_unknown_fields(kind: type[PreTrainedConfig], names: Iterable[str]) -> None:
    """Raise a ValueError unless a config has all these fields; transformers would keep any other as a stray value."""
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(names) - known):
        nearest = get_close_matches(unknown[0], known, n=2)
        raise ValueError(f"there is no config field {unknown[0]!r}; did you mean {' or '.join(nearest) or 'another'}?")


class _OwnTypeConfig(PreTrainedConfig):
    """A config that refuses the fields of another model, of which transformers would make one with random weights."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As for any config.

        Raises:
            ValueError: The fields are those of another type of model.
        """
        if (found := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"this is a model of type {found!r}, and not of {cls.model_type!r}; AutoModel loads any type"
            )
        return super().from_dict(config_dict, **kwargs)


class EdgeGlassConfig(_OwnTypeConfig):
    """Two backbones, how each is pooled and projected, and how the pair is trained.

    Args:
        vision_config: Config of the vision backbone, or its dict with a `model_type`; None is a default ViT.
        text_config: Config of the text backbone, likewise; None is a default BERT.
        projection_dim: Size D of the full embedding.
        mrl_dimensions: Matryoshka sizes that are trained besides `projection_dim`, each below it; kept in
            falling order. Any other size works too, these are the ones that the loss sees.
        vision_use_attention_pooling: Learned pooling over the vision tokens; False takes the backbone's own
            pooled output, or the mean of its tokens where it has none.
        vision_pooling_type: `"simple"` (one layer of attention), `"multihead"` (several learned queries) or
            `"statistics"` (attention-weighted mean and deviation, maximum, and CLS token where there is one).
        vision_feature_layers: Layers of the vision backbone whose tokens are pooled side by side, counted from the
            end: -1 is its `last_hidden_state`, -2 and so on are its `hidden_states`.
        vision_freeze: Keep the vision backbone as it was pretrained: no gradients, always in eval mode.
        vision_name_or_path: Where the vision backbone came from, for the record.
        vision_revision: Commit, tag or branch that it was loaded from.
        text_use_attention_pooling: As for vision.
        text_pooling_type: As for vision.
        text_feature_layers: As for vision.
        text_freeze: As for vision.
        text_name_or_path: As for vision.
        text_revision: As for vision.
        contrastive_weight: Weight of the CLIP loss at `projection_dim`.
        mrl_weight: Weight of the loss at the Matryoshka sizes.
        sample_single_mrl_dim: One Matryoshka size per training step instead of all.
        mask_equal_captions: Equal captions of a batch are not each other's negatives.
        mrl_seed: Seed of the sampled Matryoshka sizes.
        logit_scale_init_value: Log of 1 / temperature at the start; the default is ln(1 / 0.07), as in CLIP.

    Raises:
        ValueError: A size, a Matryoshka dimension or a pooling type is not possible.
    """

    model_type = "edgeglass"
    sub_configs_defaults = {  # noqa: RUF012 - PreTrainedConfig's own form
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    vision_config: Any = None  # a dict or None when given, always a PreTrainedConfig afterwards
    text_config: Any = None
    projection_dim: int = 4096
    mrl_dimensions: list[int] | tuple[int, ...] = (2048, 1024, 512, 256, 128)
    vision_use_attention_pooling: bool = True
    vision_pooling_type: str = "simple"
    vision_feature_layers: list[int] | tuple[int, ...] = (-1,)
    vision_freeze: bool = True
    vision_name_or_path: str | None = None
    vision_revision: str | None = None
    text_use_attention_pooling: bool = True
    text_pooling_type: str = "simple"
    text_feature_layers: list[int] | tuple[int, ...] = (-1,)
    text_freeze: bool = True
    text_name_or_path: str | None = None
    text_revision: str | None = None
    contrastive_weight: float = 0.25
    mrl_weight: float = 1.0
    sample_single_mrl_dim: bool = True
    mask_equal_captions: bool = True
    mrl_seed: int = 42
    logit_scale_init_value: float = 2.6592

    def __post_init__(self, **kwargs: Any) -> None:
        self.mrl_dimensions = sorted(self.mrl_dimensions, reverse=True)
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim must be positive, got {self.projection_dim}")
        for dimension in self.mrl_dimensions:
            if not 0 < dimension < self.projection_dim:
                raise ValueError(f"mrl_dimensions must lie in 1..{self.projection_dim - 1}, got {dimension}")
        for pooling_type in (self.vision_pooling_type, self.text_pooling_type):
            if pooling_type not in POOLING_TYPES:
                raise ValueError(f"pooling_type must be one of {', '.join(POOLING_TYPES)}, got {pooling_type!r}")
        for side in ("vision", "text"):
            layers = list(getattr(self, f"{side}_feature_layers"))
            setattr(self, f"{side}_feature_layers", layers)
            if not layers or max(layers) > -1:
                raise ValueError(f"{side}_feature_layers must be -1, -2 or less, got {layers}")
            if layers != [-1] and not getattr(self, f"{side}_use_attention_pooling"):
                raise ValueError(f"{side}_feature_layers want {side}_use_attention_pooling: true, got {layers}")
        super().__post_init__(**kwargs)


class EdgeGlassDecodingConfig(_OwnTypeConfig):
    """An alignment, a language model, and the bridge between them.

    Args:
        alignment_config: Config of the alignment that embeds, or its dict.
        text_config: Config of the causal language model that describes, or its dict with a `model_type`; None is a
            default Qwen3. The name is the one that transformers' generation looks for.
        num_prefix_tokens: Soft tokens that the bridge makes of an embedding.
        language_training: `"frozen"`, `"lora"` (the language model's adapters train) or `"full"`.
        lora_rank: Rank of the adapters.
        lora_alpha: Their output is scaled by `lora_alpha / lora_rank`.
        lora_target_modules: Names of the layers that get one, as peft reads them; `"all-linear"` takes all but the
            output layer.
        decoding_seed: Seed of the sizes that are drawn in training.
        alignment_name_or_path: Where the alignment came from.
        alignment_revision: Commit, tag or branch that it was loaded from.
        language_name_or_path: Where the language model came from.
        language_revision: As for the alignment.

    Raises:
        ValueError: A value is not possible.
    """

    model_type = "edgeglass_decoding"
    sub_configs_defaults = {  # noqa: RUF012 - PreTrainedConfig's own form
        "alignment_config": SubConfigSpec(config_class=EdgeGlassConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen3"),
    }

    alignment_config: Any = None  # a dict or None when given, always a config afterwards
    text_config: Any = None
    num_prefix_tokens: int = 16
    language_training: str = "frozen"
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_target_modules: list[str] | str = "all-linear"
    decoding_seed: int = 42
    alignment_name_or_path: str | None = None
    alignment_revision: str | None = None
    language_name_or_path: str | None = None
    language_revision: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("num_prefix_tokens", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.language_training not in LANGUAGE_TRAININGS:
            known = ", ".join(LANGUAGE_TRAININGS)
            raise ValueError(f"language_training must be one of {known}, got {self.language_training!r}")
        super().__post_init__(**kwargs)

    @property
    def sizes(self) -> list[int]:
        """Sizes of an embedding that the bridge is trained to read, the full one first."""
        return [self.alignment_config.projection_dim, *self.alignment_config.mrl_dimensions]

    @property
    def max_text_tokens(self) -> int | None:
        """Tokens of prompt and answer that the language model has positions for behind the prefix; None: no limit."""
        positions = getattr(self.text_config, "max_position_embeddings", None)
        return None if positions is None else positions - self.num_prefix_tokens
