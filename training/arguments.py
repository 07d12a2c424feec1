"""From a run's config to `transformers.TrainingArguments`."""

import difflib
import importlib.util
import logging
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, Literal, Union, cast

import torch
from omegaconf import OmegaConf
from transformers import TrainingArguments

from training.config import AlignmentConfig
from training.config_files import Rule, at_least, check_value, key_error
from training.errors import ConfigError
from training.retrieval import RECALL_KS

logger = logging.getLogger(__name__)

_SEED: Rule = "in 0..2^32-1", lambda value: 0 <= value < 2**32
_RULES = {
    "trainer.seed": _SEED,
    "trainer.gradient_accumulation_steps": at_least(1),
    "trainer.per_device_eval_batch_size": at_least(1),
    "trainer.dataloader_num_workers": at_least(0),
    "trainer.max_steps": at_least(-1),
}

# Of metrics, in whose names they are.
_LESS_IS_BETTER = ("loss", "medr", "bad_rows", "perplexity")

# Metrics of an alignment's evaluation, each also at every Matryoshka size but for the first row.
_LOSSES = ("loss", "loss_clip", "loss_mrl", "bad_rows")
_BY_SIZE = tuple(
    f"{way}_{name}" for way in ("i2t", "t2i") for name in (*(f"r{k}" for k in RECALL_KS), "medr", "map", "ndcg")
)


def build_training_arguments(config: AlignmentConfig) -> TrainingArguments:
    """Arguments of an alignment run; see `build_arguments`.

    Raises:
        ConfigError: A trainer key is unknown or of a wrong type, or the launcher started more processes than train
            together.
    """
    both_frozen = config.vision_encoder.freeze and config.text_encoder.freeze
    sizes = ["", *(f"@{dimension}" for dimension in config.vision_encoder.mrl_dimensions)]
    arguments = build_arguments(
        config,
        {
            "eval_on_start": config.optimization.init == "spectral",
            "ddp_find_unused_parameters": False if both_frozen else None,  # a trained backbone may have a spare pooler
        },
        metrics=[*_LOSSES, *(metric + size for size in sizes for metric in _BY_SIZE)],
    )
    if arguments.train_batch_size * arguments.world_size < 2:
        raise key_error(config, "dataset.batch_size", "one pair has no negative to tell apart; set 2 or more")
    accumulates = arguments.gradient_accumulation_steps > 1 and config.optimization.tower_chunk_size is None
    if accumulates and arguments.process_index == 0:
        logger.warning(
            "trainer.gradient_accumulation_steps: every small batch has its own negatives alone; for those of a large "
            "batch in the same memory raise dataset.batch_size and set optimization.tower_chunk_size"
        )
    return arguments


def build_arguments(config: Any, defaults: dict[str, Any], metrics: Sequence[str]) -> TrainingArguments:
    """Arguments of a run: what the sections say, our defaults, and the `trainer` section over both.

    On a machine without accelerator `use_cpu` is set: without it, processes that torchrun started would each
    train the whole run alone.

    Args:
        config: Has `dataset.batch_size` and the sections `optimization` and `trainer`.
        defaults: Of this kind of run.
        metrics: What an evaluation measures, to choose the best model by; `loss` is one of them.

    Raises:
        ConfigError: A trainer key is unknown or of a wrong type, or the launcher started more processes than train
            together.
    """
    options: Any = OmegaConf.to_container(cast(Any, config.trainer), resolve=True)
    epochs, _ = options.pop("epochs"), options.pop("resume")
    _check_options(config, options)
    options.pop("push_to_hub", None)  # Trainer would push checkpoints; the finished run is pushed
    _check_reporting(config, options.get("report_to"))
    best_metric = options.pop("metric_for_best_model", None) or "loss"
    _check_metric(config, best_metric, metrics)
    eval_strategy = options.get("eval_strategy", "epoch")
    save_strategy = options.get("save_strategy", eval_strategy if eval_strategy != "no" else "epoch")
    beta1, beta2 = config.optimization.betas
    defaults = {
        "eval_strategy": eval_strategy,
        "save_strategy": save_strategy,
        # The best model is one that was evaluated and saved.
        **({"save_steps": options["eval_steps"]} if "eval_steps" in options else {}),
        "save_total_limit": 2,
        "load_best_model_at_end": "no" not in (eval_strategy, save_strategy),
        "metric_for_best_model": best_metric,
        # Trainer takes what does not end in "loss" for a score.
        "greater_is_better": not any(part in best_metric for part in _LESS_IS_BETTER),
        "logging_steps": 10,
        "project": "edgeglass",
        "run_name": os.path.basename(os.path.abspath(str(options.get("output_dir", "")))),
        "logging_nan_inf_filter": False,  # it would hide a loss that is NaN
        "lr_scheduler_type": "cosine",
        "restore_callback_states_from_checkpoint": True,  # the patience of early stopping
        "per_device_eval_batch_size": config.dataset.batch_size,
        **defaults,
        **_device_options(),
    }
    defaults["eval_on_start"] = defaults.get("eval_on_start", False) and eval_strategy != "no"
    owned = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": config.dataset.batch_size,
        "learning_rate": config.optimization.lr,
        "weight_decay": config.optimization.weight_decay,
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "max_grad_norm": config.optimization.max_grad_norm,
        "warmup_steps": config.optimization.warmup_ratio,  # below 1 it is a share of the steps
        "remove_unused_columns": False,  # items become model inputs in our collator
    }
    if not options.get("dataloader_num_workers"):
        owned["dataloader_persistent_workers"] = False  # there are none to keep
    return _checked(defaults | options | owned)


def build_evaluation_arguments(output_dir: str, batch_size: int) -> TrainingArguments:
    """Arguments that evaluate alone.

    Args:
        output_dir: Where bad samples are listed.
        batch_size: Pairs per process and batch.
    """
    return _checked(
        {
            "output_dir": output_dir,
            "per_device_eval_batch_size": batch_size,
            "remove_unused_columns": False,
            **_device_options(),
        }
    )


def _check_reporting(config: Any, names: str | list[str] | None) -> None:
    """Trackers are named after their packages; Trainer would end in a traceback."""
    for name in [names] if isinstance(names, str) else names or []:
        if name not in ("none", "all") and importlib.util.find_spec(name) is None:
            raise key_error(config, "trainer.report_to", f"{name} is not installed: pip install {name}")


def _check_metric(config: Any, name: str, known: Sequence[str]) -> None:
    """Trainer would look for the metric after the first evaluation."""
    if name.removeprefix("eval_") not in known:
        base = [metric for metric in known if "@" not in metric]
        sizes = dict.fromkeys(f"@{metric.split('@')[1]}" for metric in known if "@" in metric)
        hint = _nearest(name, known) or "there are " + ", and ".join(filter(None, (", ".join(base), ", ".join(sizes))))
        raise key_error(config, "trainer.metric_for_best_model", f"there is no metric {name!r}; {hint}")


def _nearest(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else ""


def _device_options() -> dict[str, Any]:
    has_accelerator = torch.accelerator.is_available()
    return {"dataloader_pin_memory": has_accelerator, "use_cpu": not has_accelerator}


def _checked(options: dict[str, Any]) -> TrainingArguments:
    """The arguments, unless a value is not possible or the processes that were started do not train together."""
    try:
        arguments = TrainingArguments(**options)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != arguments.world_size:
        raise ConfigError(
            f"{launched} processes were started, but each would train alone ({arguments.world_size} in its group); "
            "set trainer.use_cpu=true where there is no accelerator, or start one process per accelerator"
        )
    return arguments


def _check_options(config: Any, options: dict[str, Any]) -> None:
    """Refuse unknown keys and wrong values; spell a bare YAML `no` as a strategy."""
    hints = typing.get_type_hints(TrainingArguments)
    names = [field.name for field in fields(TrainingArguments) if field.init]
    for name, value in options.items():
        key = f"trainer.{name}"
        if name not in names:
            hint = _nearest(name, [*names, "epochs", "resume"]) or "see transformers.TrainingArguments"
            raise key_error(config, key, f"there is no such key; {hint}")
        if value is False and "Strategy" in str(hints[name]):
            options[name] = "no"
        else:
            _check_type(config, key, value, hints[name])
        if key in _RULES:
            check_value(config, key, value, _RULES[key])


def _check_type(config: Any, key: str, value: Any, hint: Any) -> None:
    """Refuse a value that the annotation excludes; transformers itself checks none."""
    if _fits(value, hint):
        return
    members = [member for member in _members(hint) if member is not type(None)]
    wanted = " or ".join(sorted(map(_words, members)))
    names = [
        item.value for member in members if isinstance(member, type) and issubclass(member, Enum) for item in member
    ]
    nearest = _nearest(str(value), names)
    raise key_error(config, key, f"wants {wanted}, got {value!r}" + (f"; {nearest}" if nearest else ""))


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation allows; where text is the name of a member of an enum, the enum alone."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    enums = tuple(member for member in members if isinstance(member, type) and issubclass(member, Enum))
    return enums or members


def _fits(value: Any, hint: Any) -> bool:
    members = _members(hint)
    if len(members) > 1:
        return any(_fits(value, member) for member in members)
    (kind,) = members
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in [member.value for member in kind]
    return type(value) in ((int, float) if kind is float else (typing.get_origin(kind) or kind,))


def _words(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(str(member.value) for member in kind) if len(kind) < 10 else f"one of {kind.__name__}"
    return "float or int" if kind is float else str(kind) if typing.get_origin(kind) else kind.__name__
