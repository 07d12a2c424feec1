"""W&B, trackio and TensorBoard: Trainer's own integrations, under our names, and what they can show besides.

Trainer's integrations insist on prefixes of their own (`eval/`). Here `training.history.logged_names` names
everything, and the integrations send it.
"""

import copy
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from training.errors import ConfigError
from training.history import STEP, logged_names
from training.results import CONFIG
from training.visualization import Described, EvaluationSample, load_descriptions, load_sample
from training.visualization.report import FIGURES

logger = logging.getLogger(__name__)

RUN_ID = "run_id.txt"


def run_id(output_dir: str | os.PathLike[str]) -> str:
    """A short id of the run in a directory, made at its first session: trackers know the run by it when it goes on."""
    path = Path(output_dir) / RUN_ID
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def name_as_we_do(trainer: Trainer) -> None:
    """Put our forms of the integrations in the places of those that `report_to` asked for."""
    for theirs, ours in _OURS.items():
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours())


class AlignmentTensorBoardCallback(TensorBoardCallback):
    """TensorBoard, in `tensorboard/` of the output directory: sessions of a run are one run there."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on behind the last step; what a killed session had written beyond it is hidden."""
        if state.is_world_process_zero:
            self.logging_dir = self.logging_dir or str(Path(str(args.output_dir)) / "tensorboard")
            self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Send under our names."""
        if self.tb_writer is not None:
            for name, value in (logged_names(logs or {}) | {STEP: state.global_step}).items():
                self.tb_writer.add_scalar(name, value, state.global_step)
            self.tb_writer.flush()


class AlignmentTrackioCallback(TrackioCallback):
    """trackio; a run that goes on is found again by its name, which ends in the run's id."""

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Start the run, or go on with the one that this output directory belongs to."""
        if state.is_world_process_zero:
            args = copy.copy(args)
            args.run_name = f"{args.run_name}-{run_id(str(args.output_dir))}"
        super().setup(args, state, model, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Send under our names."""
        if state.is_world_process_zero and self._initialized:
            self._trackio.log(logged_names(logs or {}) | {STEP: state.global_step}, step=state.global_step)


class AlignmentWandbCallback(WandbCallback):
    """W&B: metrics live, and after every evaluation the figures, recall over the size, and tables: what was found, or
    what was said of pictures.

    Its files lie in the output directory. `WANDB_MODE=offline` needs no account. Of the best model, which is evaluated
    once more after training, the path and the numbers (`best/i2t_r1`) are in the summary.
    """

    _is_trained = False

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Start the run, or go on with the one that this output directory belongs to.

        Raises:
            ConfigError: W&B does not let us in.
        """
        if state.is_world_process_zero and self._wandb.run is None:
            output_dir = str(args.output_dir)
            try:
                self._wandb.init(
                    project=os.environ.get("WANDB_PROJECT", args.project),
                    name=args.run_name,
                    id=run_id(output_dir),
                    resume="allow",
                    dir=output_dir,
                )
            except self._wandb.Error as error:
                raise ConfigError(
                    f"trainer.report_to: wandb: {str(error).splitlines()[0]}; run `wandb login`, or set "
                    "WANDB_MODE=offline to keep the run on this machine"
                ) from error
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            self._wandb.define_metric(STEP)
            self._wandb.define_metric("*", step_metric=STEP, step_sync=True)
            config = Path(str(args.output_dir)) / CONFIG
            if config.exists():
                self._wandb.config.update(OmegaConf.to_container(OmegaConf.load(config)), allow_val_change=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Send under our names."""
        self._send(state, lambda: self._wandb.log(logged_names(logs or {}) | {STEP: state.global_step}))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Send figures, recall over the size and the tables; of the final evaluation also the numbers, as summary."""
        named = logged_names(metrics or {})
        if "val/loss" in named:  # another set is no matter of the run
            self._send(state, lambda: self._send_evaluation(Path(str(args.output_dir)), named, state.global_step))

    def _send(self, state: TrainerState, send: Callable[[], None]) -> None:
        if not (state.is_world_process_zero and self._initialized):
            return
        try:
            send()
        except Exception as error:  # a lost connection, a full disk: training goes on without W&B
            self._initialized = False
            logger.warning("W&B gets no more of this session: %s: %s", type(error).__name__, error)

    def _send_evaluation(self, output_dir: Path, named: dict[str, Any], step: int) -> None:
        shown = {
            f"plots/{name}": self._wandb.Image(str(path))
            for name in FIGURES
            if (path := output_dir / f"{name}.png").exists()
        }
        sample = load_sample(output_dir)
        if sample is not None:
            shown["val/recall_by_dimension"] = self._recall_line(named, sample.image_embeds.shape[1])
            shown["val/gallery"] = self._gallery(sample)
        if described := load_descriptions(output_dir):
            shown["val/descriptions"] = self._descriptions(described)
        self._wandb.log(shown | {STEP: step})
        if self._is_trained:
            best = {name.replace("val/", "best/"): value for name, value in named.items() if name.startswith("val/")}
            self._wandb.run.summary.update(best)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, *rest: Any, **kwargs: Any) -> None:
        """What is evaluated from here on is the best model."""
        super().on_train_end(args, state, control, *rest, **kwargs)
        self._is_trained = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell where the best model is."""
        super().on_save(args, state, control, **kwargs)
        if best := state.best_model_checkpoint:
            self._send(state, lambda: self._wandb.run.summary.update({"best_model": best}))

    def _recall_line(self, metrics: dict[str, Any], full_dimension: int) -> Any:
        prefix = "val/i2t_r1@"
        sizes = sorted(int(name.removeprefix(prefix)) for name in metrics if name.startswith(prefix))
        recalls = [
            [metrics[f"val/{way}_r1@{size}"] for size in sizes] + [metrics[f"val/{way}_r1"]] for way in ("i2t", "t2i")
        ]
        return self._wandb.plot.line_series(
            xs=[*sizes, full_dimension],
            ys=recalls,
            keys=["image to text", "text to image"],
            title="R@1 on val over the size of the embedding",
            xname="numbers",
        )

    def _descriptions(self, described: Sequence[Described]) -> Any:
        data = [[self._wandb.Image(item.picture), item.question, item.answer, item.description] for item in described]
        return self._wandb.Table(columns=["picture", "question", "answer", "description"], data=data)

    def _gallery(self, sample: EvaluationSample) -> Any:
        gallery, captions = sample.text_to_image, sample.picture_captions
        columns = ["caption", "rank of the match", *(f"found {i + 1}" for i in range(gallery.found.shape[1]))]
        rows = zip(gallery.queries.tolist(), gallery.ranks.tolist(), gallery.found.tolist(), strict=True)
        data = [
            [
                captions[query],
                rank,
                *(self._wandb.Image(sample.pictures[i].numpy(), caption=captions[i]) for i in found),
            ]
            for query, rank, found in rows
        ]
        return self._wandb.Table(columns=columns, data=data)


_OURS: dict[type[TrainerCallback], type[TrainerCallback]] = {
    TensorBoardCallback: AlignmentTensorBoardCallback,
    TrackioCallback: AlignmentTrackioCallback,
    WandbCallback: AlignmentWandbCallback,
}
