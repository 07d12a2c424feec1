"""What befalls a run in the tests, and what is left of it then."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ResNetConfig, ResNetModel, T5Config, T5EncoderModel, TrainerCallback
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.runs import make_trainer
from tests.towers import IMAGE_SIZE, tiny_tokenizer
from training.checkpoints import newest_checkpoint
from training.trainer import AlignmentTrainer

# 20 pairs in batches of 4 are 5 batches an epoch; both towers train, with dropout.
TRAINED = ["vision_encoder.freeze=false", "text_encoder.freeze=false", "trainer.epochs=3"]

EVERY_THIRD_STEP = [
    "trainer.save_strategy=steps",
    "trainer.eval_strategy=steps",
    "trainer.save_steps=3",
    "trainer.eval_steps=3",
]

SETTINGS = {
    "by epoch": [],
    "mid-epoch": EVERY_THIRD_STEP,
    "two workers": [*EVERY_THIRD_STEP, "trainer.dataloader_num_workers=2"],
    "persistent workers": [
        *EVERY_THIRD_STEP,
        "trainer.dataloader_num_workers=2",
        "trainer.dataloader_persistent_workers=true",
    ],
    "accumulation": ["trainer.gradient_accumulation_steps=2", "trainer.logging_steps=2", *EVERY_THIRD_STEP],
    "logs between saves": [*EVERY_THIRD_STEP, "trainer.logging_steps=4"],
}


class Killed(Exception):  # noqa: N818
    """What a kill -9 leaves: whatever is on disk."""


class AtStep(TrainerCallback):
    """Does something at the end of a step, or in the middle of an evaluation."""

    def __init__(self, step: int, action, in_evaluation: bool = False) -> None:
        self.step, self.action, self.in_evaluation = step, action, in_evaluation

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.in_evaluation:
            self.action()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.in_evaluation:
            self.action()


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def what_is_left(trainer: AlignmentTrainer) -> dict[str, Any]:
    """Weights, optimizer state and logged series; times aside."""
    no_time = [
        {key: value for key, value in entry.items() if not key.endswith(("runtime", "per_second"))}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    optimizer = trainer.optimizer.state_dict()["state"]
    return {
        "weights": dict(trainer._model.state_dict()),
        "moments": {f"{i}.{key}": value for i, state in optimizer.items() for key, value in state.items()},
        "log": no_time,
        "best": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
    }


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def assert_equal_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def assert_equal_bits(left: dict[str, Any], right: dict[str, Any]) -> None:
    for tensors in ("weights", "moments"):
        assert_equal_tensors(left[tensors], right[tensors])
    for key in ("log", "best", "best_step"):
        assert left[key] == right[key], key


def uninterrupted(run_config: Path, *overrides: str) -> dict[str, Any]:
    trainer = make_trainer(run_config, *TRAINED, *overrides, f"trainer.output_dir={run_config.parent}/whole")
    trainer.train()
    stop_workers()
    return what_is_left(trainer)


def go_on(run_config: Path, *overrides: str) -> AlignmentTrainer:
    trainer = make_trainer(run_config, *TRAINED, *overrides)
    trainer.train(resume_from_checkpoint=newest_checkpoint(trainer.args.output_dir))
    stop_workers()
    return trainer


def train_until_killed(trainer: AlignmentTrainer) -> None:
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=newest_checkpoint(trainer.args.output_dir))
    stop_workers()


def stop_workers() -> None:
    """A trainer is collected as a cycle, its queues first, and then waits five seconds for each of its workers."""
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()


def poison(trainer: AlignmentTrainer, step: int) -> None:
    """From one batch on, for one step, the loss is NaN."""
    original = trainer._model.alignment_loss.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        if kwargs.get("step") == step - 1:
            for name in ("loss", "loss_clip", "loss_mrl"):
                setattr(output, name, getattr(output, name) * float("nan"))
        return output

    trainer._model.alignment_loss.forward = forward


def with_batch_norms(run_config: Path) -> list[str]:
    """Overrides for a vision tower that has running statistics."""
    folder = run_config.parent / "resnet"
    torch.manual_seed(0)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1], layer_type="basic")
    ResNetModel(resnet).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ViTImageProcessorPil(size=size).save_pretrained(folder)
    return [f"vision_encoder.model_name={folder}"]


def with_tied_weights(run_config: Path) -> list[str]:
    """Overrides for a text tower whose embedding has two names."""
    folder = run_config.parent / "t5"
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    T5EncoderModel(t5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [f"text_encoder.model_name={folder}"]
