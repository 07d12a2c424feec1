"""RecoverableTrainer: an interrupted run ends with the bits of an uninterrupted one."""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from training.batches import EpochSampler
from training.checkpointing import CheckpointingTrainer
from training.checkpoints import (
    PROGRESS,
    checkpoint_path,
    newest_checkpoint,
)
from training.errors import CheckpointError, DataError, SickTrainingError, UserError, told_by_each_rank
from training.randomness import keyed_rng
from training.sick_steps import StepRecord, describe_sick_step
from training.signals import Interrupted, SignalListener, heed_parent_alone

logger = logging.getLogger(__name__)


class RecoverableTrainer(CheckpointingTrainer):
    """Trainer with exact resume, whole checkpoints, and an orderly end on SIGTERM.

    - Samples come in the order of `EpochSampler`, and the global generators are seeded anew for every batch from
      (seed, step, batch of the step, rank): dropout in a trained tower does not depend on what was drawn before.
    - A checkpoint also has what Trainer keeps in memory between two logs, and an evaluation that was due.
    - SIGTERM or SIGINT on any rank: all ranks agree in the one collective of a step, save, and stop; `preempted`
      is then true. A second SIGINT stops at once.
    - A loss or gradient that is NaN or infinite stops the run, or drops the step.

    Args:
        on_nan: `"stop"` or `"skip"`.
        signals: Listens already, from the start of the program on; None listens while `train` runs.
        *args, **kwargs: As for `CheckpointingTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        on_nan: str = "stop",
        signals: SignalListener | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if on_nan not in ("stop", "skip"):
            raise ValueError(f"on_nan must be stop or skip, got {on_nan!r}")
        self.on_nan = on_nan
        self.args.logging_nan_inf_filter = on_nan == "skip"  # the log then passes over a dropped step
        self.preempted = False
        self.skipped_steps = 0
        self._signals = signals or SignalListener()
        self._step = StepRecord()
        self._due = _Due()
        self._resumed_from: Path | None = None
        # Trainer's own evaluation of the start is neither compared with others nor saved.
        self._evaluates_start, self.args.eval_on_start = self.args.eval_on_start, False
        # Behind DefaultFlowCallback, which decides what is due at a step, and before all others.
        self.callback_handler.callbacks.insert(1, _RecoveryCallback(self))

    # What a subclass says.

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Look at a batch of an evaluation before it is used; a `UserError` ends the evaluation on all ranks."""

    def progress(self) -> dict[str, Any]:
        """What this rank keeps in memory between two logs, as numbers that JSON holds to the bit."""
        return {
            "tr_loss": self._tr_loss.item(),
            "globalstep_last_logged": self._globalstep_last_logged,
            "skipped_steps": self.skipped_steps,
            "due": asdict(self._due),
            "stopped_early_of": self.state.max_steps if self._stops_early() else None,
        }

    def load_progress(self, progress: Mapping[str, Any]) -> None:
        """Take up what `progress` gave."""
        self._tr_loss.fill_(progress["tr_loss"])
        self._globalstep_last_logged = progress["globalstep_last_logged"]
        self.skipped_steps = progress["skipped_steps"]
        self._due = _Due(**progress["due"])

    # Training.

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> TrainOutput:
        """As Trainer's; `resume_from_checkpoint` is None or what `newest_checkpoint` gave."""
        self._resumed_from = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        path = None if self._resumed_from is None else str(self._resumed_from)
        taking_up = _TakingUpCallback(self)  # behind all others: they must have begun before anything is made up for
        self.add_callback(taking_up)
        with self._signals.listening(), told_by_each_rank():
            try:
                output = super().train(path, trial, ignore_keys_for_eval)
            finally:
                self.remove_callback(taking_up)
            if not self.preempted and self.agree(self._signals.received)[0]:
                self._stop_after_last_step()
        return output

    def evaluate_unless_preempted(self) -> dict[str, float]:
        """`evaluate` after `train`; nothing where a signal stopped that one or stops this one."""
        if self.preempted:
            return {}
        try:
            return self.evaluate()
        except Interrupted:
            self._stop_after_last_step()
            return {}

    def _stop_after_last_step(self) -> None:
        """The run goes on from its last step, unless the best model already took the place of the last one."""
        is_saved = checkpoint_path(str(self.args.output_dir), self.state.global_step).exists()
        if self.loaded_best_step is None and self.agree(self.args.should_save and not is_saved)[0]:
            self._save_checkpoint(self.model, trial=None)
        self.preempted = True

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any]:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = EpochSampler(len(dataset), self.args.train_batch_size * self.args.world_size, seed)
        return self._sampler

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        prepared: Any = super()._get_dataloader(*args, **kwargs)
        loader = prepared.base_dataloader  # accelerate's wrapper iterates over this one
        loader.worker_init_fn = partial(heed_parent_alone, then=loader.worker_init_fn)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_training_stop:  # what was made up for, or the checkpoint, was the run's end
            return
        # accelerate's set_epoch does not reach the sampler of several ranks behind the batches that resume skips.
        self._sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As Trainer's, with fresh generators, and with a record of the batch in case it is sick."""
        key = (self.state.global_step, len(self._step.losses), self.args.process_index, "batch")
        torch.manual_seed(keyed_rng(self.args.seed, *key).getrandbits(63))
        self._step.sample_ids += inputs.get("sample_ids", [])
        if self.on_nan == "skip" and not self._step.losses:
            self._step.buffers_before = {name: value.clone() for name, value in self._trained_buffers().items()}
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step.losses.append(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._step.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self._step.grad_norm

    def _before_optimizer_step(self) -> None:
        """The one collective of a step: is a loss or gradient sick on any rank, has any rank got a signal?"""
        sick = not self._step.is_finite(check_gradient=self.accelerator.scaler is None)
        any_sick, any_signal = self.agree(sick, self._signals.received)
        self.preempted |= any_signal
        if any_sick:
            self._treat_sick_step()
        self._step = StepRecord()

    def _treat_sick_step(self) -> None:
        step, what = self.state.global_step + 1, describe_sick_step(self._step, self.args.world_size)
        if self.on_nan == "skip":
            self.skipped_steps += 1
            logger.warning("step %d dropped, number %d: %s", step, self.skipped_steps, what)
            assert self.optimizer is not None
            self.optimizer.zero_grad(set_to_none=True)  # without gradients AdamW leaves weights and moments alone
            for name, value in self._trained_buffers().items():  # a NaN would stay in a batch norm's statistics
                value.copy_(self._step.buffers_before[name])
            return
        last = newest_checkpoint(str(self.args.output_dir))
        raise SickTrainingError(
            f"step {step}: {what}; last good checkpoint: {last or 'none'}; "
            "lower optimization.lr, or set optimization.on_nan=skip to drop such steps"
        )

    def _trained_buffers(self) -> dict[str, Tensor]:
        """Running statistics of layers that train."""
        assert self.model is not None
        trained = self.trained_state_dict()
        return {name: value for name, value in self.model.named_buffers() if name in trained}

    # Evaluation.

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, with rank 0's running statistics on every rank: those of its own batches differ.

        Raises:
            Interrupted: Some rank got a signal.
        """
        if self.args.world_size > 1:
            for value in self._trained_buffers().values():
                dist.broadcast(value, src=0)
        with told_by_each_rank():
            return super().evaluate(*args, **kwargs)

    def agreed_batches(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches of a pass; the ranks end together, when none has one left, or for a signal or an error of one.

        Raises:
            Interrupted: Some rank got a signal; the pass is due when the run goes on.
            UserError: On every rank, where one of them met a batch that cannot be used.
        """
        remaining = iter(batches)
        while True:
            batch, error = None, None
            try:
                batch = next(remaining, None)
                if batch is not None:
                    self.check_batch(batch)
            except UserError as raised:
                error = raised
            any_batch, any_error, any_signal = self.agree(batch is not None, error is not None, self._signals.received)
            if any_error:
                raise error or DataError("the pass cannot go on without the rank that has an error")
            if any_signal:
                raise Interrupted
            if not any_batch:
                return
            if batch is not None:
                yield batch

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        due = _Due(evaluate=True, save=self.control.should_save, epoch_end=self._due.epoch_end)
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except Interrupted:
            self._due = due
            self.preempted = self.control.should_training_stop = True
            self._save_checkpoint(self.model, trial=None)
        except CheckpointError:
            raise
        except (ValueError, KeyError):  # an evaluation that fails does not cost the training since the last save
            if self._weights_are_finite():
                self._due = due
                self._save_checkpoint(self.model, trial=None)
            raise
        else:
            self._due = _Due(epoch_end=due.epoch_end)

    def _load_best_model(self) -> None:
        if not self.preempted:
            super()._load_best_model()

    # What callbacks ask for.

    def _take_up_progress(self) -> None:
        """At the start of a session: the evaluation of the start; of a resumed one what was in memory and due."""
        if self._resumed_from is None:
            if self._evaluates_start:
                self._make_up(save=self.args.save_strategy != "no")
            return
        path = self._resumed_from / PROGRESS.format(rank=self.args.process_index)
        progress = json.loads(path.read_text())
        self.load_progress(progress)
        if (due := self._due).evaluate:
            self._due = _Due(epoch_end=due.epoch_end)
            self._make_up(save=due.save)
        if due.epoch_end:
            self.control._new_step()
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._do_what_is_due()
        # Trainer would take a step before it sees that the run is at its end.
        if self._is_last_step() or progress["stopped_early_of"] == self.state.max_steps:
            self.control.should_training_stop = True

    def _make_up(self, *, save: bool) -> None:
        self.control._new_step()
        self.control.should_evaluate, self.control.should_save = True, save
        self._do_what_is_due()

    def _do_what_is_due(self) -> None:
        self._maybe_log_save_evaluate(
            self._tr_loss, None, self.model_wrapped, None, self.state.epoch, None, time.time()
        )

    def _is_last_step(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def _stops_early(self) -> bool:
        return self.control.should_training_stop and not self.preempted and not self._is_last_step()


@dataclass
class _Due:
    """What an interrupted session still had to do at the step of its last checkpoint."""

    evaluate: bool = False
    save: bool = False
    epoch_end: bool = False


class _RecoveryCallback(TrainerCallback):
    """Calls the trainer back where Trainer has no method to override."""

    def __init__(self, trainer: RecoverableTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._before_optimizer_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch_is_over = float(state.epoch or 0).is_integer()
        self.trainer._due = _Due(epoch_end=epoch_is_over)
        if self.trainer.preempted:
            self.trainer._due = _Due(control.should_evaluate, control.should_save, epoch_is_over)
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.preempted:
            control._new_step()  # nothing more is done; it is due when the run goes on
        else:
            self.trainer._due = _Due()


class _TakingUpCallback(TrainerCallback):
    """Makes up, at the start of a session, for what the one before still had to do."""

    def __init__(self, trainer: RecoverableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._take_up_progress()
