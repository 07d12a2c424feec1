"""A rank of a two-process run that torchrun starts: two_ranks.py CONFIG OUTPUT_DIR MODE [key=value ...].

MODE is whole, terminated or killed, which happens to one rank alone; nan, where one rank's loss is; statistics,
where every rank leaves its model as it is after an evaluation in the middle of training; or start, where every rank
leaves its model as it is before training.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from tests.interruptions import EVERY_THIRD_STEP, TRAINED, AtStep, copies, poison, what_is_left
from tests.runs import make_trainer
from training.checkpoints import newest_checkpoint
from training.errors import SickTrainingError
from training.run import leave
from training.trainer import AlignmentTrainer

STEP = 4  # of six, an epoch being two; saves are after the third and the last


def main() -> None:
    config, folder, mode, *overrides = sys.argv[1:]
    output_dir = Path(folder)
    trainer = make_trainer(Path(config), *TRAINED, *EVERY_THIRD_STEP, f"trainer.output_dir={output_dir}", *overrides)
    rank = trainer.args.process_index
    left = output_dir / f"left-{rank}.pt"
    if mode == "start":
        torch.save(trainer.trained_state_dict(), left)
        leave(trainer)
        return
    if rank == 1 and mode in ("terminated", "killed"):
        number = {"terminated": signal.SIGTERM, "killed": signal.SIGKILL}[mode]
        trainer.add_callback(AtStep(STEP, lambda: os.kill(os.getpid(), number)))
    if rank == 1 and mode == "nan":
        poison(trainer, STEP)
    if mode == "statistics":
        trainer.add_callback(AtStep(2, lambda: torch.save(statistics_around_evaluation(trainer), left)))
    try:
        trainer.train(resume_from_checkpoint=newest_checkpoint(output_dir))
    except SickTrainingError as error:
        (output_dir / f"error-{rank}.txt").write_text(str(error))
    if mode in ("whole", "terminated"):
        assert trainer.preempted == (mode == "terminated")
        torch.save(what_is_left(trainer), left)
    leave(trainer)


def statistics_around_evaluation(trainer: AlignmentTrainer) -> list[dict[str, torch.Tensor]]:
    """This rank's running statistics before and after one."""
    before = copies(trainer._trained_buffers())
    trainer.evaluate()
    return [before, trainer._trained_buffers()]


if __name__ == "__main__":
    main()
