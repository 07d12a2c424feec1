"""CheckpointingTrainer: checkpoints that are whole or not there, with the trained weights alone."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from training.checkpoints import (
    PROGRESS,
    STATE,
    WEIGHTS,
    aside_path,
    begin_checkpoint,
    checkpoint_path,
    find_defect,
    newest_checkpoint,
    publish_checkpoint,
    remove_old_checkpoints,
    removed_if_unwritten,
)
from training.errors import SickTrainingError

logger = logging.getLogger(__name__)


class CheckpointingTrainer(Trainer):
    """Trainer whose checkpoints are written aside, synced, listed in a manifest and renamed.

    A checkpoint has the trained weights, optimizer, scheduler, scaler, Trainer's state, and of every rank what
    `progress` tells. Subclasses say which weights these are.

    Args:
        identity: What must not change between the sessions of a run, as JSON can hold it.
        *args, **kwargs: Trainer's.

    Attributes:
        loaded_best_step: Step of the best model, once it has taken the place of the last one.
    """

    def __init__(self, *args: Any, identity: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.identity = dict(identity or {})
        # Trainer's own rotation knows nothing of damaged checkpoints, and removes the newest with a limit of 1.
        self._save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.loaded_best_step: int | None = None

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Weights that a checkpoint holds."""
        raise NotImplementedError

    def load_trained_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint."""
        raise NotImplementedError

    def progress(self) -> dict[str, Any]:
        """What this rank keeps in memory, as numbers that JSON holds to the bit."""
        return {}

    def agree(self, *flags: bool) -> list[bool]:
        """Each flag, true where it is on any rank."""
        if self.args.world_size == 1:
            return list(flags)
        shared = torch.tensor(flags, dtype=torch.int32, device=self.args.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in shared.tolist()]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save what a resumed run needs, aside first; every rank calls this."""
        output_dir, step = str(self.args.output_dir), self.state.global_step
        if not self._weights_are_finite():
            last = newest_checkpoint(output_dir)
            raise SickTrainingError(
                f"step {step}: a trained weight is NaN or infinite, and is not saved; "
                f"last good checkpoint: {last or 'none'}; lower optimization.lr"
            )
        folder = aside_path(output_dir, step)
        self.store_flos()
        with removed_if_unwritten(folder):
            if self.args.should_save:
                begin_checkpoint(output_dir, step)
            self.accelerator.wait_for_everyone()
            self._note_best_checkpoint()
            progress = folder / PROGRESS.format(rank=self.args.process_index)
            progress.write_text(json.dumps(self.progress()))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            if self.args.should_save:
                save_file(self.trained_state_dict(), folder / WEIGHTS)
                self._save_state(folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                published = publish_checkpoint(folder, self.identity)
                remove_old_checkpoints(published, self._save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _weights_are_finite(self) -> bool:
        sick = not all(bool(value.isfinite().all()) for value in self.trained_state_dict().values())
        return not self.agree(sick)[0]

    def _note_best_checkpoint(self) -> None:
        """On every rank, because each of them loads the best model at the end."""
        best, step = self.state.best_global_step, self.state.global_step
        if best is None:
            return
        best_path = checkpoint_path(str(self.args.output_dir), best)
        if best == step or best_path.exists():
            self.state.best_model_checkpoint = str(best_path)

    def _save_state(self, folder: Path) -> None:
        """Trainer's state, as its own `_save_checkpoint` writes it."""
        stateful: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                stateful[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / STATE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_trained_state_dict(load_file(Path(resume_from_checkpoint) / WEIGHTS))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: `training_step` seeds every batch."""

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if defect := find_defect(best):
            logger.warning("the best model, %s, cannot be loaded (%s): the last one is kept", best, defect)
        else:
            self._load_from_checkpoint(str(best))
            self.loaded_best_step = self.state.best_global_step
