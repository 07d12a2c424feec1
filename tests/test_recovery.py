"""A run that is interrupted, however and wherever, ends with the bits of one that is not."""

import multiprocessing
import os
import re
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
from training.data import PixmoParquetImageTextDataset
from training.errors import CheckpointError, DataError, SickTrainingError
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
            for name in ("loss", "loss_clip", "loss_mrl"):
                setattr(output, name, getattr(output, name) * float("nan"))
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
    "early": ["optimization.early_stopping_patience=2", "trainer.epochs=12", "optimization.lr=0.3"],
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
