"""The sections of an alignment run."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf

from training.config_files import (
    ABOVE_ZERO,
    OPTIMIZATION_RULES,
    PATHS,
    SHARE,
    Rule,
    at_least,
    check_value,
    has_max_steps,
    key_error,
    load_sections,
    one_of,
    or_null,
)


@dataclass
class PairsConfig:
    """Parquet files of picture-caption pairs, and how they become batches."""

    train_parquet: Any = MISSING  # a file, a glob, or a list of them
    val_parquet: Any = MISSING
    test_parquet: Any = None  # never read in training; see training.evaluate
    batch_size: int = 64  # pairs per process and step
    max_text_length: int = 512  # tokens
    on_bad_sample: str = "replace"  # undecodable picture, empty caption: replace by another sample | raise
    max_bad_fraction: float = 0.05  # 0..1, share of a file's rows; more bad ones stop the run
    max_image_pixels: int = 40_000_000  # width x height; larger pictures count as bad
    cache: str = "off"  # of frozen towers, computed once: disk keeps tokens, pooled what pooling starts as | off
    cache_dir: str | None = None  # None: edgeglass/ in Hugging Face's cache directory, HF_HOME
    cache_dtype: str = "float16"  # float16 | bfloat16 | int8, which has a scale per token
    cache_views: int = 0  # random views of a picture that are kept, one drawn per epoch; 0: evaluation's own alone
    image_column: str | None = None  # None finds image_bytes, image or jpg
    caption_column: str | None = None  # None finds caption, text or txt
    sample_id_column: str | None = None  # None finds sample_id or key, else the row number


@dataclass
class DatasetConfig(PairsConfig):
    """Pairs that are aligned; `max_text_length` is cut to the positions of the text backbone."""

    text_dropout_prob: float = 0.1  # 0..1, share of training captions replaced by the empty one
    image_size: int | None = None  # pixels, side of the square input; None takes the vision backbone's own


@dataclass
class EncoderConfig:
    """One tower: its pretrained backbone, its pooling and its share of the projection."""

    model_name: str = MISSING  # id on the Hub, or a directory
    revision: str | None = None  # commit, tag or branch on the Hub
    trust_remote_code: bool = False  # run model code that comes with the checkpoint
    projection_dim: int = 4096  # size of the full embedding; both towers must agree
    mrl_dimensions: list[int] = field(default_factory=lambda: [2048, 1024, 512, 256, 128])  # both towers must agree
    use_attention_pooling: bool = True  # False: the backbone's own pooled output, or the mean of its tokens
    pooling_type: str = "simple"  # simple | multihead | statistics
    feature_layers: list[int] = field(default_factory=lambda: [-1])  # pooled side by side; -1 is the last one
    freeze: bool = True  # False also trains the backbone


@dataclass
class VisionEncoderConfig(EncoderConfig):
    """The vision tower."""

    model_name: str = "openai/clip-vit-large-patch14"


@dataclass
class TextEncoderConfig(EncoderConfig):
    """The text tower."""

    model_name: str = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass
class LossesConfig:
    """Weights and form of the loss."""

    contrastive: float = 0.25  # weight of CLIP at the full size
    mrl: float = 1.0  # weight of the Matryoshka sizes
    sample_single_mrl_dim: bool = True  # one size per step; False: the mean over all
    mask_equal_captions: bool = True  # equal captions of a batch are not each other's negatives


@dataclass
class AdamWConfig:
    """AdamW, warm-up, cosine to zero."""

    lr: float = 2.0e-4  # peak learning rate
    weight_decay: float = 0.01  # of weight matrices alone
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    warmup_ratio: float = 0.1  # 0..1, share of the steps
    on_nan: str = "stop"  # a loss or gradient that is NaN or infinite: stop the run | skip the step
    early_stopping_patience: int | None = None  # evaluations without a lower val loss before stopping; None: never


@dataclass
class OptimizationConfig(AdamWConfig):
    """The start of an alignment, then its training."""

    init: str = "random"  # of the projections: random | spectral, the closed form after one pass over the pairs
    spectral_ridge: Any = "auto"  # two numbers, vision and text, by the mean variance; auto: by pairs held out
    spectral_power: Any = "auto"  # of the correlations that weight directions; auto: by pairs held out
    tower_chunk_size: int | None = None  # pairs that pass the towers at once; less memory, twice their time; None: all


@dataclass
class AlignmentConfig:
    """A whole run."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    vision_encoder: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    losses: LossesConfig = field(default_factory=LossesConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # epochs, output_dir, resume, fields of TrainingArguments


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _are_two(value: Any) -> bool:
    return OmegaConf.is_list(value) and len(value) == 2 and all(map(_is_number, value))


_RIDGE: Rule = "auto, or two numbers of 0 or more", lambda value: value == "auto" or _are_two(value)
_POWER: Rule = "auto, or 0 or more", lambda value: value == "auto" or _is_number(value)
_LAYERS: Rule = "a list of -1, -2 or less", lambda value: len(value) > 0 and max(value) < 0
POOLING = one_of("simple", "multihead", "statistics")  # POOLING_TYPES of modeling_edgeglass, which would import torch

PAIRS_RULES: dict[str, Rule] = {
    "dataset.train_parquet": PATHS,
    "dataset.val_parquet": PATHS,
    "dataset.test_parquet": or_null(PATHS),
    "dataset.batch_size": at_least(1),
    "dataset.max_text_length": at_least(1),
    "dataset.on_bad_sample": one_of("replace", "raise"),
    "dataset.max_bad_fraction": SHARE,
    "dataset.max_image_pixels": at_least(1),
    "dataset.cache": one_of("off", "disk", "pooled"),
    "dataset.cache_dtype": one_of("float16", "bfloat16", "int8"),  # DTYPES of training.feature_cache
    "dataset.cache_views": at_least(0),
}

_RULES: dict[str, Rule] = {
    **PAIRS_RULES,
    **OPTIMIZATION_RULES,
    "dataset.text_dropout_prob": SHARE,
    "dataset.image_size": or_null(at_least(8)),
    "vision_encoder.projection_dim": at_least(1),
    "vision_encoder.pooling_type": POOLING,
    "vision_encoder.feature_layers": _LAYERS,
    "text_encoder.projection_dim": at_least(1),
    "text_encoder.pooling_type": POOLING,
    "text_encoder.feature_layers": _LAYERS,
    "losses.contrastive": at_least(0),
    "losses.mrl": at_least(0),
    "optimization.init": one_of("random", "spectral"),
    "optimization.spectral_ridge": _RIDGE,
    "optimization.spectral_power": _POWER,
    "optimization.tower_chunk_size": or_null(at_least(1)),
}


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> AlignmentConfig:
    """Read the config of an alignment run; see `load_sections`.

    Args:
        path: A YAML file with the sections of `AlignmentConfig`.
        overrides: Such as `optimization.lr=1e-3` or `trainer.max_steps=4`.

    Raises:
        ConfigError: The file is missing or no YAML, or a key, a type or a value is wrong.
    """
    config = load_sections(AlignmentConfig, _RULES, path, overrides)
    _check(config)
    return config


def _check(config: Any) -> None:
    """Values that types alone do not catch."""
    vision, text = config.vision_encoder, config.text_encoder
    for key in ("projection_dim", "mrl_dimensions"):
        if vision[key] != text[key]:
            raise key_error(config, f"vision_encoder.{key}", f"{vision[key]} differs from text_encoder's {text[key]}")
    for dimension in vision.mrl_dimensions:
        if not 0 < dimension < vision.projection_dim:
            reason = f"must lie in 1..{vision.projection_dim - 1}, below projection_dim, got {dimension}"
            raise key_error(config, "vision_encoder.mrl_dimensions", reason)
    if config.dataset.cache != "off" and not (vision.freeze or text.freeze):
        raise key_error(config, "dataset.cache", "both towers train (freeze: false), so that nothing can be kept")
    if config.losses.contrastive == config.losses.mrl == 0:
        raise key_error(config, "losses.mrl", "both weights of the loss are 0, so that nothing is learned")
    if not has_max_steps(config):
        starts_trained = config.optimization.init == "spectral"
        check_value(config, "trainer.epochs", config.trainer.epochs, at_least(0) if starts_trained else ABOVE_ZERO)
        if config.trainer.epochs == 0 and not (vision.freeze and text.freeze):
            reason = "a tower that trains (freeze: false) wants epochs; without them freeze both"
            raise key_error(config, "trainer.epochs", reason)
