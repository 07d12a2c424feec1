"""A run that is interrupted, however and wherever, ends with the bits of one that is not."""

import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.runs import make_trainer
from training.checkpoints import newest_checkpoint
from training.data import PixmoParquetImageTextDataset
from training.errors import CheckpointError, SickTrainingError
from training.identity import check_same_run
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


def assert_equal_bits(left: dict[str, Any], right: dict[str, Any]) -> None:
    for tensors in ("weights", "moments"):
        assert left[tensors].keys() == right[tensors].keys()
        for name, value in left[tensors].items():
            assert torch.equal(value, right[tensors][name]), name
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


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_killed_run_ends_with_the_same_bits(run_config: Path, setting: str):
    overrides = SETTINGS[setting]
    expected = uninterrupted(run_config, *overrides)
    for step in (2, 8):
        trainer = make_trainer(run_config, *TRAINED, *overrides)
        trainer.add_callback(AtStep(step, kill))
        train_until_killed(trainer)
    assert_equal_bits(what_is_left(go_on(run_config, *overrides)), expected)


@pytest.mark.parametrize("step", [2, 3, 5, 15])  # between saves, at one, at an epoch's end, at the end of the run
@pytest.mark.parametrize("setting", ["by epoch", "mid-epoch", "accumulation"])
def test_a_terminated_run_saves_stops_and_ends_with_the_same_bits(run_config: Path, setting: str, step: int):
    overrides = SETTINGS[setting]
    if setting == "accumulation":
        step = min(step, 9)
    expected = uninterrupted(run_config, *overrides)
    trainer = make_trainer(run_config, *TRAINED, *overrides)
    trainer.add_callback(AtStep(step - 1, terminate))
    trainer.train()
    assert trainer.preempted
    assert trainer.state.global_step == step
    assert newest_checkpoint(trainer.args.output_dir).name == f"checkpoint-{step}"
    resumed = go_on(run_config, *overrides)
    assert not resumed.preempted
    assert_equal_bits(what_is_left(resumed), expected)


@pytest.mark.parametrize("setting", ["by epoch", "mid-epoch"])
def test_an_evaluation_that_a_signal_cut_off_is_made_up_for(run_config: Path, setting: str):
    overrides = SETTINGS[setting]
    step = {"by epoch": 5, "mid-epoch": 6}[setting]
    expected = uninterrupted(run_config, *overrides)
    trainer = make_trainer(run_config, *TRAINED, *overrides)
    trainer.add_callback(AtStep(step, terminate, in_evaluation=True))
    trainer.train()
    assert trainer.preempted
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry][-1:] in ([], [step - 3])
    assert_equal_bits(what_is_left(go_on(run_config, *overrides)), expected)


def test_a_second_interrupt_stops_at_once_and_handlers_are_put_back(run_config: Path):
    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(run_config, *TRAINED)
    trainer.add_callback(AtStep(2, interrupt_twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_early_stopping_remembers_its_patience(run_config: Path):
    overrides = ["optimization.early_stopping_patience=2", "trainer.epochs=12", "optimization.lr=0.3"]
    expected = uninterrupted(run_config, *overrides)
    epochs = len([entry for entry in expected["log"] if "eval_loss" in entry])
    assert 2 < epochs < 12
    trainer = make_trainer(run_config, *TRAINED, *overrides)
    trainer.add_callback(AtStep(5 * epochs - 3, kill))  # in the last epoch, its patience nearly spent
    train_until_killed(trainer)
    assert_equal_bits(what_is_left(go_on(run_config, *overrides)), expected)


def test_resuming_decodes_nothing_of_what_was_done(run_config: Path, monkeypatch: pytest.MonkeyPatch):
    overrides = ["trainer.save_strategy=steps", "trainer.eval_strategy=no", "trainer.save_steps=1"]
    trainer = make_trainer(run_config, *overrides, "trainer.epochs=3")
    trainer.add_callback(AtStep(9, kill))
    train_until_killed(trainer)
    asked = []
    original = PixmoParquetImageTextDataset.__getitem__

    def count(self, index):
        asked.append(index)
        return original(self, index)

    monkeypatch.setattr(PixmoParquetImageTextDataset, "__getitem__", count)
    resumed = make_trainer(run_config, *overrides, "trainer.epochs=3")
    resumed.train(resume_from_checkpoint=newest_checkpoint(resumed.args.output_dir))
    assert len(asked) == (15 - 8) * 4
    assert {epoch for epoch, _ in asked} == {1, 2}


def test_frozen_weights_are_in_no_checkpoint(run_config: Path):
    trainer = make_trainer(run_config)
    trainer.train()
    from safetensors.torch import load_file

    names = set(load_file(Path(trainer.args.output_dir) / "checkpoint-10" / "trained_weights.safetensors"))
    assert names == {name for name in trainer._model.state_dict() if ".backbone." not in name}


def test_more_epochs_extend_a_run(run_config: Path):
    make_trainer(run_config).train()
    longer = make_trainer(run_config, "trainer.epochs=4")
    longer.train(resume_from_checkpoint=newest_checkpoint(longer.args.output_dir))
    assert longer.state.global_step == 20
    assert [entry["step"] for entry in longer.state.log_history if "loss" in entry] == list(range(1, 21))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.batch_size=5", "dataset.batch_size was 4 and is 5"),
        ("trainer.seed=7", "trainer.seed was 42 and is 7"),
        ("optimization.lr=0.5", "optimization.lr was 0.01 and is 0.5"),
        ("dataset.train_parquet={folder}/val.parquet", "content of dataset.train_parquet was '"),
    ],
)
def test_other_settings_are_refused_with_the_keys_that_differ(run_config: Path, override: str, message: str):
    trainer = make_trainer(run_config)
    trainer.train()
    changed = make_trainer(run_config, override.format(folder=run_config.parent))
    checkpoint = newest_checkpoint(trainer.args.output_dir)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        check_same_run(checkpoint, changed.identity)
    check_same_run(checkpoint, make_trainer(run_config, "trainer.dataloader_num_workers=2").identity)
    check_same_run(checkpoint, trainer.identity | {})
    with pytest.raises(CheckpointError, match="number of processes was 1 and is 2"):
        check_same_run(checkpoint, trainer.identity | {"number of processes": 2})


def poison(trainer: AlignmentTrainer, step: int) -> None:
    """From one batch on, for one step, the loss is NaN."""
    original = trainer._model.alignment_loss.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        if kwargs.get("step") == step - 1:
            output.loss = output.loss * float("nan")
        return output

    trainer._model.alignment_loss.forward = forward


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
        before.update({name: value.clone() for name, value in trainer._model.trained_state_dict().items()})

    def compare() -> None:
        after = trainer._model.trained_state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    trainer.add_callback(AtStep(6, remember))
    trainer.add_callback(AtStep(7, compare))
    trainer.train()
    assert before
    assert trainer.skipped_steps == 1
    assert trainer.state.global_step == 15
    assert all(entry["loss"] == entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
