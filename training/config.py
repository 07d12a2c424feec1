"""One YAML file, typed sections: a wrong key or type stops here, with the nearest right one."""

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from training.errors import ConfigError

# Of the trainer section, what a run's saved config should always tell.
_TRAINER_DEFAULTS = {"epochs": 3, "resume": "auto", "seed": 42}

# ${oc.env:TOKEN} and its like would read the environment of whoever runs a stranger's config, and save it.
_RESOLVER = re.compile(r"\$\{[^}]*:")


@dataclass
class DatasetConfig:
    """Parquet files of picture-caption pairs, and how they become batches."""

    train_parquet: Any = MISSING  # a file, a glob, or a list of them
    val_parquet: Any = MISSING
    test_parquet: Any = None  # never read in training; see training.evaluate
    batch_size: int = 64  # pairs per process and step
    text_dropout_prob: float = 0.1  # 0..1, share of training captions replaced by the empty one
    max_text_length: int = 512  # tokens; cut to the positions of the text backbone
    image_size: int | None = None  # pixels, side of the square input; None takes the vision backbone's own
    on_bad_sample: str = "replace"  # undecodable picture, empty caption: replace by another sample | raise
    max_bad_fraction: float = 0.05  # 0..1, share of a file's rows; more bad ones stop the run
    max_image_pixels: int = 100_000_000  # width x height; larger pictures count as bad
    image_column: str | None = None  # None finds image_bytes, image or jpg
    caption_column: str | None = None  # None finds caption, text or txt
    sample_id_column: str | None = None  # None finds sample_id or key, else the row number


@dataclass
class EncoderConfig:
    """One tower: its pretrained backbone, its pooling and its share of the projection."""

    model_name: str = MISSING  # id on the Hub, or a directory
    revision: str | None = None  # commit, tag or branch on the Hub
    trust_remote_code: bool = False  # run model code that comes with the checkpoint
    projection_dim: int = 4096  # size of the full embedding; both towers must agree
    mrl_dimensions: list[int] = field(default_factory=lambda: [2048, 1024, 512, 256, 128])  # both towers must agree
    use_attention_pooling: bool = True  # False: the backbone's own pooled output, or the mean of its tokens
    pooling_type: str = "simple"  # simple | multihead
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
class OptimizationConfig:
    """AdamW, warm-up, then cosine to zero."""

    lr: float = 2.0e-4  # peak learning rate
    weight_decay: float = 0.01  # of weight matrices alone
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    warmup_ratio: float = 0.1  # 0..1, share of the steps
    on_nan: str = "stop"  # a loss or gradient that is NaN or infinite: stop the run | skip the step
    early_stopping_patience: int | None = None  # evaluations without a lower val loss before stopping; None: never


@dataclass
class AlignmentConfig:
    """A whole run."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    vision_encoder: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    losses: LossesConfig = field(default_factory=LossesConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # epochs, output_dir, resume, fields of TrainingArguments


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> AlignmentConfig:
    """Read a run's config: defaults, then the file, then `key=value` overrides.

    Args:
        path: A YAML file with the sections of `AlignmentConfig`.
        overrides: Such as `optimization.lr=1e-3` or `trainer.max_steps=4`.

    Returns:
        The config with attribute access (`config.dataset.train_parquet`), an OmegaConf `DictConfig` that has
        the keys and types of `AlignmentConfig`.

    Raises:
        ConfigError: The file is missing or no YAML, or a key, a type or a value is wrong.
    """
    config = OmegaConf.structured(AlignmentConfig)
    try:
        from_file = OmegaConf.load(os.fspath(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(from_file, DictConfig):
        raise ConfigError(f"{path}: holds no sections; it wants {', '.join(config)}")
    config = _merge(config, from_file, origin=str(path))
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override!r}: an override looks like section.key=value")
        config = _merge(config, OmegaConf.from_dotlist([override]), origin=override)
    for key, value in _TRAINER_DEFAULTS.items():
        config.trainer.setdefault(key, value)
    _check(config, origin=str(path))
    return cast(AlignmentConfig, config)


def save_config(config: AlignmentConfig, path: str | os.PathLike[str]) -> None:
    """Write the resolved config as YAML that `load_config` reads back."""
    OmegaConf.save(cast(Any, config), os.fspath(path), resolve=True)


def _merge(config: DictConfig, changes: Any, origin: str) -> DictConfig:
    if resolver := _RESOLVER.search(OmegaConf.to_yaml(changes)):
        raise ConfigError(
            f"{origin}: {resolver[0]}...: a config is data; of interpolations only ${{section.key}} is read"
        )
    for key in changes:
        if key in config and OmegaConf.is_config(config.get(key)) and not OmegaConf.is_dict(changes[key]):
            raise ConfigError(f"{origin}: {key} is a section of keys, not the value {changes[key]!r}")
    try:
        return cast(DictConfig, OmegaConf.merge(config, changes))
    except OmegaConfBaseException as error:
        key = (error.full_key or "").partition("[")[0]  # a[0] is a wrong value of the list a
        section, _, name = key.rpartition(".")
        valid = list(OmegaConf.select(config, section) if section else config)
        if name not in valid:
            nearest = difflib.get_close_matches(name, valid, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; valid keys: {', '.join(valid)}"
            raise ConfigError(f"{origin}: there is no key {key!r}{hint}") from error
        raise ConfigError(f"{origin}: {key}: {str(error).splitlines()[0]}") from error


def _check(config: Any, origin: str) -> None:
    """Values that types alone do not catch."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{origin}: {missing[0]} is not set")
    vision, text, dataset = config.vision_encoder, config.text_encoder, config.dataset
    for key in ("projection_dim", "mrl_dimensions"):
        if vision[key] != text[key]:
            raise ConfigError(f"{origin}: vision_encoder.{key} {vision[key]} differs from text_encoder's {text[key]}")
    if dataset.batch_size < 1:
        raise ConfigError(f"{origin}: dataset.batch_size must be positive, got {dataset.batch_size}")
    if not 0 <= dataset.text_dropout_prob <= 1:
        raise ConfigError(f"{origin}: dataset.text_dropout_prob must be in 0..1, got {dataset.text_dropout_prob}")
    if dataset.on_bad_sample not in ("replace", "raise"):
        raise ConfigError(f"{origin}: dataset.on_bad_sample must be replace or raise, got {dataset.on_bad_sample!r}")
    for key, lowest in (("max_text_length", 1), ("max_image_pixels", 1), ("image_size", 8)):
        if dataset[key] is not None and dataset[key] < lowest:
            raise ConfigError(f"{origin}: dataset.{key} must be {lowest} or more, got {dataset[key]}")
    if config.optimization.lr <= 0:
        raise ConfigError(f"{origin}: optimization.lr must be positive, got {config.optimization.lr}")
    if len(config.optimization.betas) != 2:
        raise ConfigError(f"{origin}: optimization.betas must be two numbers, got {config.optimization.betas}")
    if not 0 <= config.optimization.warmup_ratio < 1:
        raise ConfigError(
            f"{origin}: optimization.warmup_ratio must be in 0..1 and below 1, got {config.optimization.warmup_ratio}"
        )
    if config.optimization.on_nan not in ("stop", "skip"):
        raise ConfigError(f"{origin}: optimization.on_nan must be stop or skip, got {config.optimization.on_nan!r}")
    if "output_dir" not in config.trainer:
        raise ConfigError(f"{origin}: trainer.output_dir is not set")
