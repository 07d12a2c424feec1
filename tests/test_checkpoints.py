import errno
import json
import os
from pathlib import Path

import pytest

from tests.runs import make_trainer
from training.checkpoints import (
    begin_checkpoint,
    checkpoint_path,
    find_defect,
    newest_checkpoint,
    publish_checkpoint,
    read_identity,
    remove_old_checkpoints,
)
from training.errors import CheckpointError


def write(output_dir: Path, step: int, content: str = "weights") -> Path:
    folder = begin_checkpoint(output_dir, step)
    (folder / "a.bin").write_text(content)
    (folder / "b.bin").write_text("state")
    return publish_checkpoint(folder, {"seed": 1})


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 100):
        path = write(tmp_path, step)
        assert path == checkpoint_path(tmp_path, step)
        assert newest_checkpoint(tmp_path) == path
    assert read_identity(path) == {"seed": 1}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json: it was never finished"),
        (lambda path: (path / "manifest.json").write_text("{"), "its manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("[]"), "its manifest.json is damaged"),
        (lambda path: (path / "a.bin").unlink(), "a.bin is missing"),
        (lambda path: os.truncate(path / "a.bin", 3), "a.bin has 3 bytes instead of 7"),
        (lambda path: (path / "a.bin").write_text("Weights"), "a.bin is not what was written: its checksum differs"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path: Path, damage, reason: str, caplog):
    whole, damaged = write(tmp_path, 1), write(tmp_path, 2)
    damage(damaged)
    assert find_defect(damaged) == reason
    assert newest_checkpoint(tmp_path) == whole
    assert f"passed over {damaged}: {reason}" in caplog.text


def test_what_a_kill_left_aside_is_no_checkpoint_and_is_removed_by_the_next(tmp_path: Path):
    whole = write(tmp_path, 1)
    (begin_checkpoint(tmp_path, 2) / "a.bin").write_text("half")
    assert newest_checkpoint(tmp_path) == whole
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    write(tmp_path, 1, "old")
    assert (write(tmp_path, 1, "new") / "a.bin").read_text() == "new"
    assert find_defect(checkpoint_path(tmp_path, 1)) is None
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, 1, [1, 2, 3, 4]), (2, None, [3, 4]), (2, 1, [1, 4]), (3, 4, [2, 3, 4]), (1, 1, [1, 4]), (1, None, [4])],
)
def test_the_newest_and_the_best_are_never_removed(tmp_path: Path, limit: int | None, best: int | None, kept: list):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    remove_old_checkpoints(tmp_path, limit, None if best is None else f"elsewhere/checkpoint-{best}")
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == kept


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(run_config: Path, error: Exception, monkeypatch):
    trainer = make_trainer(run_config, "trainer.epochs=3")
    original = trainer._save_optimizer_and_scheduler

    def fail_in_the_second_epoch(folder: str) -> None:
        if trainer.state.global_step > 5:
            raise error
        original(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fail_in_the_second_epoch)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-10 could not be written to .*; earlier checkpoints are unt"
    ):
        trainer.train()
    output_dir = Path(trainer.args.output_dir)
    assert [path.name for path in output_dir.glob("*checkpoint*")] == ["checkpoint-5"]
    assert newest_checkpoint(output_dir) == output_dir / "checkpoint-5"


def test_other_errors_are_not_taken_for_a_full_disk(run_config: Path, monkeypatch):
    trainer = make_trainer(run_config)

    def fail(folder: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.train()


def test_a_damaged_best_model_leaves_the_last_one(run_config: Path, caplog):
    trainer = make_trainer(run_config, "trainer.epochs=3", "trainer.save_total_limit=5")
    trainer.train()
    weights = Path(trainer.state.best_model_checkpoint) / "trained_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    trainer._load_best_model()
    assert "cannot be loaded (trained_weights.safetensors has" in caplog.text


def test_a_manifest_lists_every_file(run_config: Path):
    trainer = make_trainer(run_config)
    trainer.train()
    checkpoint = newest_checkpoint(trainer.args.output_dir)
    listed = set(json.loads((checkpoint / "manifest.json").read_text())["files"])
    assert listed == {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
    assert not list(checkpoint.glob("*.bin"))  # nothing pickled but what torch.load reads with weights_only
