"""What a run finds and leaves in its output directory."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import ProcessorMixin

from training.checkpoints import newest_checkpoint
from training.errors import ConfigError, clear_write_errors
from training.identity import check_same_run

CONFIG = "config.yaml"
FINAL_METRICS = "final_metrics.json"
MODEL_FOLDER = "model"
PREEMPTED = "preempted.json"
PREEMPTED_STATUS = 75  # of the process: EX_TEMPFAIL of sysexits.h, "try again later"


def checkpoint_to_resume(trainer: Mapping[str, Any], identity: Mapping[str, Any]) -> Path | None:
    """The checkpoint that a run goes on from; None where it starts anew.

    Args:
        trainer: That section of the run's config.
        identity: As `run_identity` gives it.

    Raises:
        ConfigError: The run is finished, or `trainer.resume` is never and the directory is not empty.
        CheckpointError: The directory holds a run with other settings.
    """
    output_dir = Path(trainer["output_dir"])
    if trainer.get("resume", "auto") == "never" and output_dir.exists() and any(output_dir.iterdir()):
        raise ConfigError(f"{output_dir} is not empty, and trainer.resume=never starts only in an empty directory")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"trainer.output_dir {output_dir} cannot be made: {error.strerror}") from error
    checkpoint = newest_checkpoint(output_dir)
    if checkpoint is not None:
        check_same_run(checkpoint, identity)
    if (output_dir / FINAL_METRICS).exists() and not (checkpoint and _is_longer(trainer, output_dir)):
        extend = "raise trainer.epochs to extend it, " if checkpoint else ""
        raise ConfigError(
            f"{output_dir} holds a finished run; {extend}set trainer.output_dir to another directory, "
            "or remove this one"
        )
    return checkpoint


def _is_longer(trainer: Mapping[str, Any], output_dir: Path) -> bool:
    """Whether a config asks for more than the finished run in a directory did."""
    finished: Any = OmegaConf.to_container(OmegaConf.load(output_dir / CONFIG))  # written by us, nothing to resolve
    return any(trainer.get(key, 0) > finished["trainer"].get(key, 0) for key in ("epochs", "max_steps"))


def clear_marks(output_dir: str | os.PathLike[str]) -> None:
    """A run that goes on is neither finished nor preempted."""
    for name in (FINAL_METRICS, PREEMPTED):
        (Path(output_dir) / name).unlink(missing_ok=True)


def mark_preempted(output_dir: str | os.PathLike[str], step: int) -> None:
    """Leave word that the run was stopped by a signal after it had saved, and goes on when it is started again."""
    save_metrics({"step": step}, Path(output_dir) / PREEMPTED)


def save_model(write: Callable[[Path], object], processor: ProcessorMixin, output_dir: str | os.PathLike[str]) -> None:
    """Write a model, its config and its processor to `output_dir`/model, for `from_pretrained`; whole or not at all.

    Args:
        write: Writes the model and its config into a directory, as `model.save_pretrained` does.
        processor: What makes its inputs.
        output_dir: The run's.

    Raises:
        OutputError: The disk is full, or the directory cannot be written.
    """
    folder = Path(output_dir) / MODEL_FOLDER
    aside, replaced = (folder.with_name(f"{word}-{MODEL_FOLDER}") for word in ("unfinished", "replaced"))
    for leftover in (aside, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with clear_write_errors(folder):
            write(aside)
            processor.save_pretrained(aside)
            if folder.exists():
                folder.rename(replaced)
            aside.rename(folder)
    finally:
        for leftover in (aside, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def save_metrics(metrics: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write metrics as JSON, whole or not at all.

    Raises:
        OutputError: The disk is full, or the directory cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with clear_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(json.dumps(dict(metrics), indent=2) + "\n")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
