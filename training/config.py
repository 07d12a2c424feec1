"""One YAML file, typed sections: a wrong key, type or value stops here, with where it came from."""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from training.errors import ConfigError, clear_write_errors

# Of the trainer section, what a run's saved config should always tell.
_TRAINER_DEFAULTS = {"epochs": 3, "resume": "auto", "seed": 42}

# Fields that the trainer section does not set, and what to do instead.
_SET_ELSEWHERE = {
    "num_train_epochs": "set trainer.epochs instead",
    "learning_rate": "set optimization.lr instead",
    "weight_decay": "set optimization.weight_decay instead",
    "adam_beta1": "set optimization.betas instead",
    "adam_beta2": "set optimization.betas instead",
    "max_grad_norm": "set optimization.max_grad_norm instead",
    "warmup_steps": "set optimization.warmup_ratio instead",
    "per_device_train_batch_size": "set dataset.batch_size instead",
    "dataloader_drop_last": "leave it out; training takes whole batches, and evaluation every sample",
    "hub_token": "leave it out, it would be saved with the run; log in with `hf auth login` instead",
    "resume_from_checkpoint": "leave it out; a run goes on from what is in trainer.output_dir",
    "push_to_hub_token": "leave it out, it would be saved with the run; log in with `hf auth login` instead",
    "remove_unused_columns": "leave it out; the collator makes the model's inputs",
}

# ${oc.env:TOKEN} and its like would read the environment of whoever runs a stranger's config, and save it.
_RESOLVER = re.compile(r"\$\{(?![A-Za-z0-9_.]+\})[^}:]*:?")


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
    max_image_pixels: int = 40_000_000  # width x height; larger pictures count as bad
    cache: str = "off"  # of frozen towers, computed once: disk keeps tokens, pooled what pooling starts as | off
    cache_dir: str | None = None  # None: edgeglass/ in Hugging Face's cache directory, HF_HOME
    cache_dtype: str = "float16"  # float16 | bfloat16 | int8, which has a scale per token
    cache_views: int = 0  # random views of a picture that are kept, one drawn per epoch; 0: evaluation's own alone
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
    pooling_type: str = "simple"  # simple | multihead | statistics
    feature_layers: list[int] = field(
        default_factory=lambda: [-1]
    )  # pooled side by side, from -1, the last, backwards
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
    """The start; then AdamW, warm-up, cosine to zero."""

    init: str = "random"  # of the projections: random | spectral, the closed form after one pass over the pairs
    spectral_ridge: Any = "auto"  # two numbers, vision and text, by the mean variance; auto: by pairs held out
    spectral_power: Any = "auto"  # of the correlations that weight directions; auto: by pairs held out
    lr: float = 2.0e-4  # peak learning rate
    weight_decay: float = 0.01  # of weight matrices alone
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    warmup_ratio: float = 0.1  # 0..1, share of the steps
    tower_chunk_size: int | None = None  # pairs that pass the towers at once; less memory, twice their time; None: all
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


Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, in words, and whether one is


def at_least(lowest: float) -> Rule:
    """Numbers from `lowest` on; neither infinite nor NaN."""
    return f"{lowest} or more", lambda value: lowest <= value < math.inf


def one_of(*names: str) -> Rule:
    """One of some words."""
    *before, last = names
    return f"{', '.join(before)} or {last}", lambda value: value in names


def _or_null(rule: Rule) -> Rule:
    words, fits = rule
    return f"{words}, or null", lambda value: value is None or fits(value)


def _are_paths(value: Any) -> bool:
    paths = value if OmegaConf.is_list(value) else [value]
    return len(paths) > 0 and all(isinstance(path, str) and path.strip() for path in paths)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _are_two(value: Any) -> bool:
    return OmegaConf.is_list(value) and len(value) == 2 and all(map(_is_number, value))


_ABOVE_ZERO: Rule = "above 0", lambda value: 0 < value < math.inf
_SHARE: Rule = "in 0..1", lambda value: 0 <= value <= 1
_BELOW_ONE: Rule = "in 0..1 and below 1", lambda value: 0 <= value < 1
_BETAS: Rule = "two numbers in 0..1 and below 1", lambda value: len(value) == 2 and all(map(_BELOW_ONE[1], value))
_RIDGE: Rule = "auto, or two numbers of 0 or more", lambda value: value == "auto" or _are_two(value)
_POWER: Rule = "auto, or 0 or more", lambda value: value == "auto" or _is_number(value)
_LAYERS: Rule = "a list of -1, -2 or less", lambda value: len(value) > 0 and max(value) < 0
_PATHS: Rule = "a file, a glob, or a list of them", _are_paths
POOLING = one_of("simple", "multihead", "statistics")  # POOLING_TYPES of modeling_edgeglass, which would import torch

_RULES = {
    "dataset.train_parquet": _PATHS,
    "dataset.val_parquet": _PATHS,
    "dataset.test_parquet": _or_null(_PATHS),
    "dataset.batch_size": at_least(1),
    "dataset.text_dropout_prob": _SHARE,
    "dataset.max_text_length": at_least(1),
    "dataset.image_size": _or_null(at_least(8)),
    "dataset.on_bad_sample": one_of("replace", "raise"),
    "dataset.max_bad_fraction": _SHARE,
    "dataset.max_image_pixels": at_least(1),
    "dataset.cache": one_of("off", "disk", "pooled"),
    "dataset.cache_dtype": one_of("float16", "bfloat16", "int8"),  # DTYPES of training.feature_cache
    "dataset.cache_views": at_least(0),
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
    "optimization.lr": _ABOVE_ZERO,
    "optimization.weight_decay": at_least(0),
    "optimization.betas": _BETAS,
    "optimization.max_grad_norm": at_least(0),
    "optimization.warmup_ratio": _BELOW_ONE,
    "optimization.tower_chunk_size": _or_null(at_least(1)),
    "optimization.on_nan": one_of("stop", "skip"),
    "optimization.early_stopping_patience": _or_null(at_least(1)),
    "trainer.output_dir": ("a directory", lambda value: isinstance(value, str) and value.strip() != ""),
}


_SECTIONS = [section.name for section in fields(AlignmentConfig)]


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
    origins = {"": str(path)}  # of a key that nobody set
    for origin, changes in [(str(path), _read_file(path)), *map(_read_override, overrides)]:
        config = _merge(config, changes, origin)
        origins |= {f"{section}.{name}": origin for section in _SECTIONS for name in changes.get(section, ())}
    for key, value in _TRAINER_DEFAULTS.items():
        config.trainer.setdefault(key, value)
    object.__setattr__(config, "_origins", origins)  # beside the keys, not one of them
    _resolve(config)
    if config.dataset.cache == "False":  # a bare YAML `off`
        config.dataset.cache = "off"
    _check(config)
    return cast(AlignmentConfig, config)


def key_error(config: AlignmentConfig, key: str, reason: str) -> ConfigError:
    """An error about `key` that begins with where it was last set: the file, or an override."""
    origins = vars(config).get("_origins", {})  # a config that was made without a file has none
    origin = origins.get(key) or origins.get("")
    return ConfigError(f"{origin}: {key}: {reason}" if origin else f"{key}: {reason}")


def check_value(config: AlignmentConfig, key: str, value: Any, rule: Rule) -> None:
    """Refuse the value of `key` unless it is as `rule` says.

    Raises:
        ConfigError: Names where the key was set, and what it must be.
    """
    words, fits = rule
    if not fits(value):
        raise key_error(config, key, f"must be {words}, got {value!r}")


def save_config(config: AlignmentConfig, path: str | os.PathLike[str]) -> None:
    """Write the resolved config as YAML that `load_config` reads back."""
    with clear_write_errors(Path(path)):
        OmegaConf.save(cast(Any, config), os.fspath(path), resolve=True)


def _read_file(path: str | os.PathLike[str]) -> DictConfig:
    try:
        content = OmegaConf.load(os.fspath(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no YAML: it is not in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: holds no sections; it wants {', '.join(_SECTIONS)}")
    return content


def _read_override(override: str) -> tuple[str, DictConfig]:
    key, separator, _ = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r}: an override looks like section.key=value")
    try:
        return override, OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{override}: its value is no YAML: {' '.join(str(error).split())}") from error


def _merge(config: DictConfig, changes: DictConfig, origin: str) -> DictConfig:
    if resolver := _RESOLVER.search(OmegaConf.to_yaml(changes)):
        raise ConfigError(
            f"{origin}: {resolver[0]}...: a config is data; of interpolations only ${{section.key}} is read"
        )
    for key, value in cast(dict[Any, Any], OmegaConf.to_container(changes)).items():
        if key in config and not isinstance(value, dict):
            raise ConfigError(f"{origin}: {key} is a section of keys, not the value {value!r}")
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


def _resolve(config: Any) -> None:
    """Put the values that interpolations name in their place."""
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise key_error(config, error.full_key or "", str(error).splitlines()[0]) from error


def _check(config: Any) -> None:
    """Values that types alone do not catch."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise key_error(config, missing[0], "is not set")
    if "output_dir" not in config.trainer:
        raise key_error(config, "trainer.output_dir", "is not set")
    for key, rule in _RULES.items():
        check_value(config, key, OmegaConf.select(config, key), rule)
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
    _check_trainer(config)


def _check_trainer(config: Any) -> None:
    """What the trainer section says in words of ours; its other keys are for `TrainingArguments` to know."""
    trainer = config.trainer
    for name in trainer:
        if name in _SET_ELSEWHERE:
            raise key_error(config, f"trainer.{name}", _SET_ELSEWHERE[name])
    if trainer.resume not in ("auto", "never"):
        raise key_error(config, "trainer.resume", f"wants auto or never, got {trainer.resume!r}")
    if type(trainer.epochs) not in (int, float):
        raise key_error(config, "trainer.epochs", f"wants float or int, got {trainer.epochs!r}")
    max_steps = trainer.get("max_steps")
    if not (isinstance(max_steps, int) and max_steps > 0):  # which would decide in the place of the epochs
        starts_trained = config.optimization.init == "spectral"
        check_value(config, "trainer.epochs", trainer.epochs, at_least(0) if starts_trained else _ABOVE_ZERO)
        if trainer.epochs == 0 and not (config.vision_encoder.freeze and config.text_encoder.freeze):
            reason = "a tower that trains (freeze: false) wants epochs; without them freeze both"
            raise key_error(config, "trainer.epochs", reason)
    never_evaluates = trainer.get("eval_strategy") in ("no", False)  # which YAML makes of a bare no
    if never_evaluates and config.optimization.early_stopping_patience is not None:
        reason = "nothing is evaluated with trainer.eval_strategy=no"
        raise key_error(config, "optimization.early_stopping_patience", reason)
