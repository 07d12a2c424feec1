"""A rank of a two-process run that torchrun starts: two_ranks.py CONFIG OUTPUT_DIR whole|terminated|killed."""

import os
import signal
import sys
from pathlib import Path

import torch

from tests.runs import make_trainer
from tests.test_recovery import EVERY_THIRD_STEP, TRAINED, AtStep, what_is_left
from training.checkpoints import newest_checkpoint

STEP = 4  # of six, an epoch being two; saves are after the third and the last


def main() -> None:
    config, output_dir, mode = sys.argv[1:]
    trainer = make_trainer(Path(config), *TRAINED, *EVERY_THIRD_STEP, f"trainer.output_dir={output_dir}")
    if trainer.args.process_index == 1 and mode != "whole":  # the signal reaches one rank alone
        number = {"terminated": signal.SIGTERM, "killed": signal.SIGKILL}[mode]
        trainer.add_callback(AtStep(STEP, lambda: os.kill(os.getpid(), number)))
    trainer.train(resume_from_checkpoint=newest_checkpoint(output_dir))
    assert trainer.preempted == (mode == "terminated")
    torch.save(what_is_left(trainer), f"{output_dir}/left-{trainer.args.process_index}.pt")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
