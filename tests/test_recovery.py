"""A run that is interrupted, however and wherever, ends with the bits of one that is not."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.interruptions import (
    EVERY_THIRD_STEP,
    SETTINGS,
    TRAINED,
    AtStep,
    assert_equal_bits,
    go_on,
    kill,
    terminate,
    train_until_killed,
    uninterrupted,
    what_is_left,
    with_batch_norms,
    with_tied_weights,
)
from tests.runs import make_trainer
from training.checkpoints import newest_checkpoint
from training.data import PixmoParquetImageTextDataset
from training.errors import CheckpointError
from training.identity import check_same_run
from training.trainer import AlignmentTrainer

# A rate that changes nothing: the first val loss stays the lowest, and the third evaluation is the last.
STOPPED_EARLY = ["optimization.early_stopping_patience=2", "trainer.epochs=12", "optimization.lr=1e-30"]


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
    expected = uninterrupted(run_config, *STOPPED_EARLY)
    assert len([entry for entry in expected["log"] if "eval_loss" in entry]) == 3
    trainer = make_trainer(run_config, *TRAINED, *STOPPED_EARLY)
    trainer.add_callback(AtStep(12, kill))  # in the third epoch, its patience nearly spent
    train_until_killed(trainer)
    assert_equal_bits(what_is_left(go_on(run_config, *STOPPED_EARLY)), expected)


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


@pytest.mark.parametrize("towers", [with_batch_norms, with_tied_weights])
def test_towers_with_statistics_or_tied_weights_end_with_the_same_bits(run_config: Path, towers):
    overrides = [*EVERY_THIRD_STEP, *towers(run_config)]
    expected = uninterrupted(run_config, *overrides)
    trainer = make_trainer(run_config, *TRAINED, *overrides)
    trainer.add_callback(AtStep(8, kill))
    train_until_killed(trainer)
    assert_equal_bits(what_is_left(go_on(run_config, *overrides)), expected)


def test_a_limit_of_one_keeps_what_a_terminated_run_goes_on_from(run_config: Path):
    overrides = [*EVERY_THIRD_STEP, "trainer.save_total_limit=1"]
    expected = uninterrupted(run_config, *overrides)
    trainer = make_trainer(run_config, *TRAINED, *overrides)
    trainer.add_callback(AtStep(7, terminate))
    trainer.train()
    assert newest_checkpoint(trainer.args.output_dir).name == "checkpoint-8"
    assert_equal_bits(what_is_left(go_on(run_config, *overrides)), expected)
    longer = make_trainer(run_config, *TRAINED, *overrides, "trainer.epochs=4")
    assert newest_checkpoint(longer.args.output_dir).name == "checkpoint-15"  # not the best one alone


END = {
    "all epochs": [],
    "max_steps": ["trainer.max_steps=7", *EVERY_THIRD_STEP],
    "no saves": ["trainer.save_strategy=no"],
    "early": STOPPED_EARLY,
}


class AfterLastStep(TrainerCallback):
    """Sends SIGTERM when everything but the end of `train` is done."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        terminate()


@pytest.mark.parametrize("end", END)
def test_a_signal_behind_the_last_step_only_puts_the_end_off(run_config: Path, end: str, monkeypatch):
    overrides = END[end]
    expected = uninterrupted(run_config, *overrides)
    trainer = make_trainer(run_config, *TRAINED, *overrides)
    trainer.add_callback(AfterLastStep())
    trainer.train()
    assert trainer.preempted
    assert trainer.evaluate_unless_preempted() == {}

    def step(*args, **kwargs):
        raise AssertionError("the run is at its end")

    monkeypatch.setattr(AlignmentTrainer, "training_step", step)
    resumed = go_on(run_config, *overrides)
    assert not resumed.preempted
    assert_equal_bits(what_is_left(resumed), expected)


def test_a_signal_in_the_evaluation_behind_training_puts_it_off(run_config: Path):
    trainer = make_trainer(run_config, *TRAINED)
    with trainer._signals.listening():
        trainer.train()
        trainer.add_callback(AtStep(15, terminate, in_evaluation=True))
        assert trainer.evaluate_unless_preempted() == {}
    assert trainer.preempted


def test_an_evaluation_made_up_for_can_be_cut_off_again(run_config: Path):
    expected = uninterrupted(run_config, *EVERY_THIRD_STEP)
    for _ in range(2):
        trainer = make_trainer(run_config, *TRAINED, *EVERY_THIRD_STEP)
        trainer.add_callback(AtStep(15, terminate, in_evaluation=True))
        trainer.train(resume_from_checkpoint=newest_checkpoint(trainer.args.output_dir))
        assert trainer.preempted
        assert newest_checkpoint(trainer.args.output_dir).name == "checkpoint-15"
    assert_equal_bits(what_is_left(go_on(run_config, *EVERY_THIRD_STEP)), expected)


def test_the_best_models_step_is_told_where_it_was_loaded(run_config: Path):
    best, last = make_trainer(run_config), make_trainer(run_config, "trainer.load_best_model_at_end=false")
    for trainer in (best, last):
        trainer.train()
    assert best.loaded_best_step == best.state.best_global_step
    assert last.loaded_best_step is None
