import errno
import json
import os
from pathlib import Path

import pytest

from tests.runs import make_trainer
from training.checkpoints import (
    WEIGHTS,
    begin_checkpoint,
    checkpoint_path,
    find_defect,
    newest_checkpoint,
    publish_checkpoint,
    read_identity,
    remove_old_checkpoints,
)
from training.errors import CheckpointError, OutputError
from training.files import fingerprint
from training.results import save_metrics, save_model
from training.trainer import AlignmentTrainer


def write(output_dir: Path, step: int, content: str = "weights") -> Path:
    folder = begin_checkpoint(output_dir, step)
    for name in ("trainer_state.json", "progress_0.json", "optimizer.pt", "scheduler.pt"):
        (folder / name).write_text("state")
    (folder / WEIGHTS).write_text(content)
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
        (lambda path: (path / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda path: os.truncate(path / WEIGHTS, 3), f"{WEIGHTS} has 3 bytes instead of 7"),
        (
            lambda path: (path / WEIGHTS).write_text("Weights"),
            f"{WEIGHTS} is not what was written: its checksum differs",
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path: Path, damage, reason: str, caplog):
    whole, damaged = write(tmp_path, 1), write(tmp_path, 2)
    damage(damaged)
    assert find_defect(damaged) == reason
    assert newest_checkpoint(tmp_path) == whole
    assert f"passed over {damaged}: {reason}" in caplog.text


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"identity": {}, "files": {"a": {"size": Infinity, "blake2b": ""}}}', "is damaged"),
        ('{"identity": [], "files": {}}', "is damaged"),
        ('{"files": {}}', "is damaged"),
        ('{"identity": {}, "files": {}}', f"does not list {WEIGHTS}"),
    ],
)
def test_a_manifest_that_promises_nothing_does_not_hold(tmp_path: Path, manifest: str, reason: str):
    whole, odd = write(tmp_path, 1), write(tmp_path, 2)
    (odd / "manifest.json").write_text(manifest)
    assert find_defect(odd) == f"its manifest.json {reason}"
    assert newest_checkpoint(tmp_path) == whole


def test_a_name_in_a_manifest_is_no_path_and_spoils_no_message(tmp_path: Path):
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../\n\x1b[31m"] = {"size": 0, "blake2b": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert find_defect(path) == "../../\\n\\x1b[31m is missing"


def test_what_a_kill_left_aside_is_no_checkpoint_and_is_removed_by_the_next(tmp_path: Path):
    whole = write(tmp_path, 1)
    (begin_checkpoint(tmp_path, 2) / WEIGHTS).write_text("half")
    assert newest_checkpoint(tmp_path) == whole
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    write(tmp_path, 1, "old")
    assert (write(tmp_path, 1, "new") / WEIGHTS).read_text() == "new"
    assert find_defect(checkpoint_path(tmp_path, 1)) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_one(tmp_path: Path):
    path = write(tmp_path, 1, "old")
    path.rename(tmp_path / "replaced-checkpoint-1")
    damaged = write(tmp_path, 2)
    damaged.rename(tmp_path / "replaced-checkpoint-2")
    (tmp_path / "replaced-checkpoint-2" / WEIGHTS).unlink()
    assert newest_checkpoint(tmp_path) == path
    assert (path / WEIGHTS).read_text() == "old"
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, 1, [1, 2, 3, 4]), (2, None, [3, 4]), (2, 1, [1, 4]), (3, 4, [2, 3, 4]), (1, 1, [1, 4]), (1, None, [4])],
)
def test_the_newest_and_the_best_are_never_removed(tmp_path: Path, limit: int | None, best: int | None, kept: list):
    for step in (1, 2, 3, 4):
        published = write(tmp_path, step)
    remove_old_checkpoints(published, limit, None if best is None else f"elsewhere/checkpoint-{best}")
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == kept


@pytest.mark.parametrize(("limit", "kept"), [(1, [4, 9]), (2, [3, 4, 9])])
def test_a_damaged_checkpoint_of_a_later_step_takes_no_place(tmp_path: Path, limit: int, kept: list):
    for step in (2, 3, 9, 4):
        published = write(tmp_path, step)
    (tmp_path / "checkpoint-9" / WEIGHTS).unlink()
    remove_old_checkpoints(published, limit, None)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == kept
    assert newest_checkpoint(tmp_path) == published


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
        CheckpointError, match=r"^checkpoint-10 could not be written to .*; earlier checkpoints are unt"
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


def test_any_change_of_a_file_changes_its_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(4_000_000))
    before = fingerprint([str(path)])
    with path.open("rb+") as file:
        file.seek(300_000)  # between the blocks that are sampled of larger files
        file.write(b"x")
    assert fingerprint([str(path)]) != before
    monkeypatch.setattr("training.files._HASHED_WHOLE", 0)
    sampled = fingerprint([str(path)])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert fingerprint([str(path)]) != sampled


def save_a_model(trainer: AlignmentTrainer, output_dir: Path) -> None:
    save_model(trainer._model.save_pretrained, trainer.processing_class, output_dir)


def save_numbers(trainer: AlignmentTrainer, output_dir: Path) -> None:
    save_metrics({"a": 1.0}, output_dir / "m.json")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", [save_a_model, save_numbers])
def test_a_full_disk_leaves_the_file_or_model_before(run_config: Path, write, monkeypatch: pytest.MonkeyPatch):
    trainer = make_trainer(run_config)
    output_dir = run_config.parent / "run"
    write(trainer, output_dir)
    before = contents(output_dir)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **kwargs):
        raise full

    monkeypatch.setattr(trainer.processing_class.tokenizer.__class__, "save_pretrained", fail)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match=r"^(model|m\.json) could not be written to .* No space left .*: make room"):
        write(trainer, output_dir)
    assert contents(output_dir) == before
