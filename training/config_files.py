"""One YAML file, typed sections: a wrong key, type or value stops here, with where it came from.

A run's sections are a dataclass of dataclasses; its `trainer` section is a mapping.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from training.errors import ConfigError, clear_write_errors

Sections = TypeVar("Sections")

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
    **dict.fromkeys(
        ("hub_strategy", "hub_always_push", "hub_revision"), "leave it out; a finished run is pushed in one commit"
    ),
    "remove_unused_columns": "leave it out; the collator makes the model's inputs",
}

# ${oc.env:TOKEN} and its like would read the environment of whoever runs a stranger's config, and save it.
_RESOLVER = re.compile(r"\$\{(?![A-Za-z0-9_.]+\})[^}:]*:?")


Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, in words, and whether one is


def at_least(lowest: float) -> Rule:
    """Numbers from `lowest` on; neither infinite nor NaN."""
    return f"{lowest} or more", lambda value: lowest <= value < math.inf


def one_of(*names: str) -> Rule:
    """One of some words."""
    *before, last = names
    return f"{', '.join(before)} or {last}", lambda value: value in names


def or_null(rule: Rule) -> Rule:
    """The same, or nothing."""
    words, fits = rule
    return f"{words}, or null", lambda value: value is None or fits(value)


def _are_paths(value: Any) -> bool:
    paths = value if OmegaConf.is_list(value) else [value]
    return len(paths) > 0 and all(isinstance(path, str) and path.strip() for path in paths)


ABOVE_ZERO: Rule = "above 0", lambda value: 0 < value < math.inf
SHARE: Rule = "in 0..1", lambda value: 0 <= value <= 1
BELOW_ONE: Rule = "in 0..1 and below 1", lambda value: 0 <= value < 1
PATHS: Rule = "a file, a glob, or a list of them", _are_paths

OPTIMIZATION_RULES = {
    "optimization.lr": ABOVE_ZERO,
    "optimization.weight_decay": at_least(0),
    "optimization.betas": (
        "two numbers in 0..1 and below 1",
        lambda value: len(value) == 2 and all(map(BELOW_ONE[1], value)),
    ),
    "optimization.max_grad_norm": at_least(0),
    "optimization.warmup_ratio": BELOW_ONE,
    "optimization.on_nan": one_of("stop", "skip"),
    "optimization.early_stopping_patience": or_null(at_least(1)),
}
_OUTPUT_DIR: Rule = "a directory", lambda value: isinstance(value, str) and value.strip() != ""


def load_sections(
    kind: type[Sections], rules: Mapping[str, Rule], path: str | os.PathLike[str], overrides: Iterable[str] = ()
) -> Sections:
    """Read a run's config: defaults, then the file, then `key=value` overrides.

    Args:
        kind: The dataclass of its sections.
        rules: What values must be, besides of the type that `kind` says.
        path: A YAML file with these sections.
        overrides: Such as `optimization.lr=1e-3` or `trainer.max_steps=4`.

    Returns:
        The config with attribute access (`config.dataset.train_parquet`), an OmegaConf `DictConfig` that has
        the keys and types of `kind`.

    Raises:
        ConfigError: The file is missing or no YAML, or a key, a type or a value is wrong.
    """
    sections = [section.name for section in fields(cast(Any, kind))]
    config = OmegaConf.structured(kind)
    origins = {"": str(path)}  # of a key that nobody set
    for origin, changes in [(str(path), _read_file(path, sections)), *map(_read_override, overrides)]:
        config = _merge(config, changes, origin)
        origins |= {f"{section}.{name}": origin for section in sections for name in changes.get(section, ())}
    for key, value in _TRAINER_DEFAULTS.items():
        config.trainer.setdefault(key, value)
    object.__setattr__(config, "_origins", origins)  # beside the keys, not one of them
    _resolve(config)
    if config.dataset.cache == "False":  # a bare YAML `off`
        config.dataset.cache = "off"
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise key_error(config, missing[0], "is not set")
    for key, rule in rules.items():
        check_value(config, key, OmegaConf.select(config, key), rule)
    _check_trainer(config)
    return cast(Sections, config)


def key_error(config: Any, key: str, reason: str) -> ConfigError:
    """An error about `key` that begins with where it was last set: the file, or an override."""
    origins = vars(config).get("_origins", {})  # a config that was made without a file has none
    origin = origins.get(key) or origins.get("")
    return ConfigError(f"{origin}: {key}: {reason}" if origin else f"{key}: {reason}")


def check_value(config: Any, key: str, value: Any, rule: Rule) -> None:
    """Refuse the value of `key` unless it is as `rule` says.

    Raises:
        ConfigError: Names where the key was set, and what it must be.
    """
    words, fits = rule
    if not fits(value):
        raise key_error(config, key, f"must be {words}, got {value!r}")


def save_config(config: Any, path: str | os.PathLike[str]) -> None:
    """Write the resolved config as YAML that `load_sections` reads back."""
    with clear_write_errors(Path(path)):
        OmegaConf.save(config, os.fspath(path), resolve=True)


def _read_file(path: str | os.PathLike[str], sections: Sequence[str]) -> DictConfig:
    try:
        content = OmegaConf.load(os.fspath(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no YAML: it is not in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: holds no sections; it wants {', '.join(sections)}")
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


def _check_trainer(config: Any) -> None:
    """What the trainer section says in words of ours; its other keys are for `TrainingArguments` to know."""
    trainer = config.trainer
    if "output_dir" not in trainer:
        raise key_error(config, "trainer.output_dir", "is not set")
    check_value(config, "trainer.output_dir", trainer.output_dir, _OUTPUT_DIR)
    for name in trainer:
        if name in _SET_ELSEWHERE:
            raise key_error(config, f"trainer.{name}", _SET_ELSEWHERE[name])
    if trainer.resume not in ("auto", "never"):
        raise key_error(config, "trainer.resume", f"wants auto or never, got {trainer.resume!r}")
    if type(trainer.epochs) not in (int, float):
        raise key_error(config, "trainer.epochs", f"wants float or int, got {trainer.epochs!r}")
    never_evaluates = trainer.get("eval_strategy") in ("no", False)  # which YAML makes of a bare no
    if never_evaluates and config.optimization.early_stopping_patience is not None:
        reason = "nothing is evaluated with trainer.eval_strategy=no"
        raise key_error(config, "optimization.early_stopping_patience", reason)


def has_max_steps(config: Any) -> bool:
    """Whether the trainer section counts steps, which decide in the place of the epochs."""
    max_steps = config.trainer.get("max_steps")
    return isinstance(max_steps, int) and max_steps > 0
