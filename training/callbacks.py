"""What a run says and leaves while it goes on: progress, history files, figures."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from training.data import PixmoParquetImageTextDataset
from training.history import HistoryFiles, history_rows, logged_names
from training.retrieval import EncodedPairs
from training.visualization import (
    Described,
    draw_run,
    remove_descriptions,
    remove_sample,
    sample_evaluation,
    save_descriptions,
    save_sample,
)
from training.visualization.style import thumbnail

logger = logging.getLogger(__name__)

_SHOWN = (
    "train/epoch",
    "train/loss",
    "train/loss_clip",
    "train/loss_mrl",
    "train/lr",
    "val/loss",
    "val/perplexity",
    "val/i2t_r1",
    "val/t2i_r1",
)


def log_line(state: TrainerState, logs: Mapping[str, Any]) -> str | None:
    """A log in one short line: losses, perplexity or R@1 both ways; None where it has neither."""
    named = logged_names(logs)
    shown = [f"{name} {named[name]:.4g}" for name in _SHOWN if name in named]
    return f"step {state.global_step}/{state.max_steps}  " + "  ".join(shown) if len(shown) > 1 else None


class AlignmentProgressCallback(ProgressCallback):
    """Trainer's progress bars; the bar of training tells loss, R@1 and samples/s, and logs are lines above it."""

    def __init__(self) -> None:
        super().__init__()
        self.training_bar: Any
        self._shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar where the run stands: steps of earlier sessions say nothing about the speed of this one."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
        self.current_step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move on."""
        if state.is_world_process_zero:
            samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            bar = self.training_bar.format_dict
            done = state.global_step - bar["initial"]
            steps_per_second = bar["rate"] or done / max(bar["elapsed"], 1e-9)  # a new bar has no rate yet
            speed = {"samples/s": f"{steps_per_second * samples:.0f}"}
            self.training_bar.set_postfix(self._shown | speed, refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line above the bar."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self._shown["loss"] = f"{logs['loss']:.3f}"
        if "eval_i2t_r1" in logs:
            self._shown["R@1"] = f"{100 * logs['eval_i2t_r1']:.1f}/{100 * logs['eval_t2i_r1']:.1f}"
        if line := log_line(state, logs):
            self.training_bar.write(line)


class LogLineCallback(PrinterCallback):
    """One line per log, for files and dumb terminals (`trainer.disable_tqdm=true`)."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line."""
        if state.is_world_process_zero and logs and (line := log_line(state, logs)):
            tqdm.write(line)


class HistoryCallback(TrainerCallback):
    """Keeps `metrics.csv` and `training_history.json` in the output directory up to date.

    What Trainer remembers is the truth: a session that goes on from a checkpoint writes both anew from there, so that
    no step stands in them twice.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what earlier sessions logged."""
        self._files: HistoryFiles | None = HistoryFiles(str(args.output_dir)) if state.is_world_process_zero else None
        self._write(lambda files: files.write(history_rows(state.log_history)))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what was logged now."""
        self._write(lambda files: files.add(logged_names(state.log_history[-1])))

    def _write(self, write: Callable[[HistoryFiles], None]) -> None:
        if self._files is None:
            return
        try:
            write(self._files)
        except OSError as error:  # a full disk: checkpoints are what must not fail in silence, and they say so
            self._files = None
            logger.warning(
                "metrics.csv and training_history.json end here (%s); the next session completes them", error
            )


class FiguresCallback(TrainerCallback):
    """Draws the figures and the report after every evaluation; training goes on whatever becomes of them.

    Args:
        trainer: Whose evaluations they show.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer
        self._has_warned = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep what the figures show of the evaluation, and draw."""
        if not state.is_world_process_zero or not self.is_shown():
            return
        output_dir, failed = str(args.output_dir), {}
        try:
            self.keep(metrics or {}, output_dir, state.global_step)
        except Exception as error:  # a run must not end because of a picture of it
            failed["evaluation sample"] = error
        try:
            failed |= draw_run(output_dir)
        except Exception as error:  # likewise
            failed["no figure"] = error
        if failed and not self._has_warned:
            self._has_warned = True
            reasons = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failed.items())
            logger.warning(
                "not everything could be drawn (%s); training goes on, further failures are not told", reasons
            )

    def is_shown(self) -> bool:
        """Whether the evaluation is a matter of the run: another set is none."""
        raise NotImplementedError

    def keep(self, metrics: dict[str, float], output_dir: str, step: int) -> None:
        """Write a sample of the evaluation to the output directory."""
        raise NotImplementedError


class VisualizationCallback(FiguresCallback):
    """The figures of an `AlignmentTrainer`, which keeps the pairs that it encoded last."""

    def is_shown(self) -> bool:
        """Of the trainer's own set."""
        encoded: EncodedPairs | None = self._trainer.encoded
        return encoded is not None and encoded.dataset is self._trainer.eval_dataset

    def keep(self, metrics: dict[str, float], output_dir: str, step: int) -> None:
        """Embeddings, pictures, captions and finds of a few pairs."""
        remove_sample(output_dir)  # an old one would look like this evaluation's
        encoded: EncodedPairs = self._trainer.encoded
        if isinstance(encoded.dataset, PixmoParquetImageTextDataset):
            seed = self._trainer.args.seed
            save_sample(sample_evaluation(encoded, metrics, self._trainer.model, step=step, seed=seed), output_dir)


class DescriptionsCallback(FiguresCallback):
    """The figures of a `DecodingTrainer`, which keeps what it said of a few pictures last."""

    def is_shown(self) -> bool:
        """Of the trainer's own set."""
        return self._trainer.evaluated is self._trainer.eval_dataset

    def keep(self, metrics: dict[str, float], output_dir: str, step: int) -> None:
        """Pictures with what was said of them."""
        remove_descriptions(output_dir)  # old ones would look like this evaluation's
        dataset: PixmoParquetImageTextDataset = self._trainer.evaluated
        described = self._trainer.described
        if described:
            pictures = (thumbnail(dataset.pair(row)[0]) for row, *_ in described)
            save_descriptions(
                [Described(picture, *words) for picture, (_, *words) in zip(pictures, described, strict=True)],
                output_dir,
            )
