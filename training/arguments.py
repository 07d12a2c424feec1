"""From a run's config to `transformers.TrainingArguments`."""

import difflib
import importlib.util
import os
import types
import typing
from dataclasses import fields
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments

from training.config import AlignmentConfig
from training.errors import ConfigError

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


def build_training_arguments(config: AlignmentConfig) -> TrainingArguments:
    """Arguments of a run: what the sections say, our defaults, and the `trainer` section over both.

    On a machine without accelerator `use_cpu` is set: without it, processes that torchrun started would each
    train the whole run alone.

    Raises:
        ConfigError: A trainer key is unknown, set elsewhere or of a wrong type, or the launcher started more
            processes than train together.
    """
    options = dict(config.trainer)
    epochs = options.pop("epochs", 3)
    if options.pop("resume", "auto") not in ("auto", "never"):
        raise ConfigError(f"trainer.resume: wants auto or never, got {config.trainer['resume']!r}")
    _check_type("trainer.epochs", epochs, float)
    _check_options(options)
    _check_reporting(options.get("report_to"))
    eval_strategy = options.get("eval_strategy", "epoch")
    save_strategy = options.get("save_strategy", eval_strategy if eval_strategy != "no" else "epoch")
    if eval_strategy == "no" and config.optimization.early_stopping_patience is not None:
        raise ConfigError("optimization.early_stopping_patience: nothing is evaluated with trainer.eval_strategy=no")
    both_frozen = config.vision_encoder.freeze and config.text_encoder.freeze
    beta1, beta2 = config.optimization.betas
    defaults = {
        "eval_strategy": eval_strategy,
        "save_strategy": save_strategy,
        # The best model is one that was evaluated and saved.
        **({"save_steps": options["eval_steps"]} if "eval_steps" in options else {}),
        "save_total_limit": 2,
        "load_best_model_at_end": "no" not in (eval_strategy, save_strategy),
        "metric_for_best_model": "loss",
        "logging_steps": 10,
        "project": "edgeglass",
        "run_name": os.path.basename(os.path.abspath(str(options.get("output_dir", "")))),
        "logging_nan_inf_filter": False,  # it would hide a loss that is NaN
        "lr_scheduler_type": "cosine",
        "restore_callback_states_from_checkpoint": True,  # the patience of early stopping
        "per_device_eval_batch_size": config.dataset.batch_size,
        "ddp_find_unused_parameters": False if both_frozen else None,  # a trained backbone may have a spare pooler
        **_device_options(),
    }
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
    arguments = _checked(defaults | options | owned)
    if arguments.train_batch_size * arguments.world_size < 2:
        raise ConfigError("dataset.batch_size: one pair has no negative to tell apart; set 2 or more")
    return arguments


def build_evaluation_arguments(output_dir: str, batch_size: int) -> TrainingArguments:
    """Arguments that evaluate alone.

    Args:
        output_dir: Trainer wants one; nothing is written.
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


def _check_reporting(names: Any) -> None:
    """Trackers are named after their packages; Trainer would end in a traceback."""
    for name in [names] if isinstance(names, str) else names or []:
        if name not in ("none", "all") and importlib.util.find_spec(name) is None:
            raise ConfigError(f"trainer.report_to: {name} is not installed: pip install {name}")


def _device_options() -> dict[str, Any]:
    has_accelerator = torch.accelerator.is_available()
    return {"dataloader_pin_memory": has_accelerator, "use_cpu": not has_accelerator}


def _checked(options: dict[str, Any]) -> TrainingArguments:
    """The arguments, unless a value is not possible or the processes that were started do not train together."""
    try:
        arguments = TrainingArguments(**options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != arguments.world_size:
        raise ConfigError(
            f"{launched} processes were started, but each would train alone ({arguments.world_size} in its group); "
            "set trainer.use_cpu=true where there is no accelerator, or start one process per accelerator"
        )
    return arguments


def _check_options(options: dict[str, Any]) -> None:
    """Refuse unknown keys, keys that belong elsewhere and wrong types; spell a bare YAML `no` as a strategy."""
    hints = typing.get_type_hints(TrainingArguments)
    names = [field.name for field in fields(TrainingArguments) if field.init]
    for key, value in options.items():
        if key in _SET_ELSEWHERE:
            raise ConfigError(f"trainer.{key}: {_SET_ELSEWHERE[key]}")
        if key not in names:
            nearest = difflib.get_close_matches(key, [*names, "epochs", "resume"], n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "see transformers.TrainingArguments"
            raise ConfigError(f"trainer.{key}: there is no such key; {hint}")
        if value is False and "Strategy" in str(hints[key]):
            options[key] = "no"
        else:
            _check_type(f"trainer.{key}", value, hints[key])


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Refuse a plain value where the annotation names other plain types; transformers itself checks none."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,)
    accepted: set[type] = {member for member in members if isinstance(member, type)}
    if float in accepted:
        accepted.add(int)
    is_plain = accepted <= {int, float, str, bool, type(None)} or any(issubclass(member, Enum) for member in accepted)
    if any(issubclass(member, Enum) for member in accepted):
        accepted.add(str)
    if is_plain and accepted and type(value) not in accepted:
        wanted = " or ".join(sorted(member.__name__ for member in accepted if member is not type(None)))
        raise ConfigError(f"{key}: wants {wanted}, got {value!r}")
