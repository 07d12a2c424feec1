"""Losses, gradients, weights and embeddings that are NaN, and evaluations that fail."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interruptions import (
    EVERY_THIRD_STEP,
    SETTINGS,
    TRAINED,
    AtStep,
    assert_equal_bits,
    assert_equal_tensors,
    copies,
    go_on,
    poison,
    uninterrupted,
    what_is_left,
    with_batch_norms,
)
from tests.runs import make_trainer
from training.checkpoints import newest_checkpoint
from training.errors import DataError, SickTrainingError


def test_a_nan_stops_the_run_and_names_step_samples_and_checkpoint(run_config: Path):
    trainer = make_trainer(run_config, *TRAINED)
    poison(trainer, 7)
    with pytest.raises(SickTrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("step 7: the loss is nan and the gradient's norm nan (samples id-")
    assert len(re.findall(r"id-\d+", message)) == 4
    assert f"last good checkpoint: {trainer.args.output_dir}/checkpoint-5" in message
    assert all(parameter.isfinite().all() for parameter in trainer._model.parameters())


def test_a_nan_step_can_be_dropped_and_is_counted(run_config: Path):
    trainer = make_trainer(run_config, *TRAINED, "optimization.on_nan=skip")
    poison(trainer, 7)
    before: dict[str, torch.Tensor] = {}

    def remember() -> None:
        before.update(copies(trainer._model.trained_state_dict()))

    def compare() -> None:
        assert_equal_tensors(before, trainer._model.trained_state_dict())

    trainer.add_callback(AtStep(6, remember))
    trainer.add_callback(AtStep(7, compare))
    trainer.train()
    assert before
    assert trainer.skipped_steps == 1
    assert trainer.state.global_step == 15
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [entry["step"] for entry in logged if "loss" not in entry] == [7]  # there is nothing to log
    assert all(entry["loss"] == entry["loss"] for entry in logged if "loss" in entry)


def test_a_dropped_step_leaves_running_statistics_alone(run_config: Path):
    trained = [*TRAINED, *with_batch_norms(run_config), "optimization.on_nan=skip"]
    trainer = make_trainer(run_config, *trained)
    original = trainer._model.vision_encoder.forward

    def forward(pixel_values: torch.Tensor, *args: Any) -> torch.Tensor:
        if trainer.state.global_step == 6 and torch.is_grad_enabled():
            pixel_values = pixel_values * float("nan")
        return original(pixel_values, *args)

    trainer._model.vision_encoder.forward = forward
    before: dict[str, torch.Tensor] = {}
    trainer.add_callback(AtStep(6, lambda: before.update(copies(trainer._trained_buffers()))))
    trainer.add_callback(AtStep(7, lambda: assert_equal_tensors(before, trainer._trained_buffers())))
    trainer.train()
    assert any(name.endswith("running_mean") for name in before)
    assert trainer.skipped_steps == 1


def test_weights_that_are_not_finite_are_never_saved(run_config: Path):
    trainer = make_trainer(run_config, *TRAINED, *EVERY_THIRD_STEP, "trainer.eval_strategy=no")
    bias = trainer._model.vision_encoder.projection.bias
    trainer.add_callback(AtStep(6, lambda: torch.nn.init.constant_(bias, float("inf"))))
    with pytest.raises(
        SickTrainingError, match=r"step 6: a trained weight is NaN .* checkpoint: .*/checkpoint-3; low"
    ):
        trainer.train()
    assert newest_checkpoint(trainer.args.output_dir).name == "checkpoint-3"


@pytest.mark.parametrize("setting", ["by epoch", "mid-epoch"])
def test_an_evaluation_that_fails_costs_no_training(run_config: Path, setting: str):
    overrides = SETTINGS[setting]
    step = {"by epoch": 5, "mid-epoch": 6}[setting]
    expected = uninterrupted(run_config, *overrides)
    trainer = make_trainer(run_config, *TRAINED, *overrides)

    def fail() -> None:
        raise DataError("bad val set")

    trainer.add_callback(AtStep(step, fail, in_evaluation=True))
    with pytest.raises(DataError, match="bad val set"):
        trainer.train()
    assert newest_checkpoint(trainer.args.output_dir).name == f"checkpoint-{step}"
    assert_equal_bits(what_is_left(go_on(run_config, *overrides)), expected)


def test_a_diverged_model_is_not_saved_when_its_evaluation_fails(run_config: Path):
    trainer = make_trainer(run_config, *TRAINED)
    bias = trainer._model.vision_encoder.projection.bias
    trainer.add_callback(AtStep(5, lambda: torch.nn.init.constant_(bias, float("nan"))))
    with pytest.raises(SickTrainingError, match=r"^embeddings are NaN or infinite.*\(step 5\)$"):
        trainer.train()
    assert newest_checkpoint(trainer.args.output_dir) is None
