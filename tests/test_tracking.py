"""What trackers are told, read back from what they write without an account."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import METRICS, ROOT
from tests.decoding_runs import write_decoding_config
from tests.runs import make_trainer
from tests.wandb_files import read_records
from training.errors import ConfigError
from training.tracking import AlignmentWandbCallback, run_id

TRAIN = {f"train/{name}" for name in ("loss", "loss_clip", "loss_mrl", "lr", "step", "epoch")}
VAL = METRICS | {"val/loss", "val/loss_clip", "val/loss_mrl"}


def run_two_sessions(run_config: Path) -> Path:
    """A run of one epoch that is extended to two: the trackers should see one run."""
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(run_config.parent / "trackio")}
    for epochs in (1, 2):
        command = [sys.executable, "run_alignment.py", "--config", run_config, f"trainer.epochs={epochs}",
                   "trainer.report_to=[wandb, trackio, tensorboard]", "trainer.disable_tqdm=true"]  # fmt: skip
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"step {5 * epochs}/{5 * epochs}  train/epoch {epochs}  val/loss" in done.stdout
        assert "it/s]" not in done.stdout  # one line per log instead of bars
    return run_config.parent / "run"


def test_every_tracker_gets_our_names_and_one_run(run_config: Path):
    folder = run_two_sessions(run_config)
    check_wandb(folder)
    check_tensorboard(folder)
    check_trackio(run_config.parent / "trackio", folder)


def check_wandb(folder: Path) -> None:
    history, ids, summary, config = [], set(), {}, {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in read_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                assert (record.run.project, record.run.display_name) == ("edgeglass", "run")
            elif kind == "history":
                history.append(
                    {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                )
            elif kind == "summary":
                summary |= {item.key or ".".join(item.nested_key): item.value_json for item in record.summary.update}
            elif kind == "config":
                config |= {item.key: item.value_json for item in record.config.update}
    assert ids == {run_id(folder)}
    names = {name for entry in history for name in entry}
    assert names >= TRAIN | VAL
    assert not any(name.startswith("eval") for name in names)
    losses = [(int(entry["train/step"]), float(entry["train/loss"])) for entry in history if "train/loss" in entry]
    kept = json.loads((folder / "training_history.json").read_text())
    assert losses == [(row["train/step"], row["train/loss"]) for row in kept]
    for plot in ("training_curves", "mrl_performance", "retrieval_gallery", "attention_map", "embedding_space"):
        assert f"plots/{plot}.path" in names
    assert "val/gallery.path" in names
    (table, *_) = folder.glob("wandb/offline-run-*/files/media/table/val/recall_by_dimension_table*.json")
    assert sorted({row[0] for row in json.loads(table.read_text())["data"]}) == [16, 32, 64]
    assert json.loads(summary["best_model"]).startswith(f"{folder}/checkpoint-")
    final = json.loads((folder / "final_metrics.json").read_text())
    assert float(summary["best/i2t_r1@16"]) == final["val/i2t_r1@16"]
    assert json.loads(config["losses"])["contrastive"] == 0.25


def test_wandb_gets_described_pictures_as_a_table(vision_dir: str, text_dir: str, tmp_path: Path):
    config = write_decoding_config(tmp_path, vision_dir, text_dir)
    command = [sys.executable, "run_decoding.py", "--config", config, "trainer.epochs=1", "trainer.report_to=wandb"]
    environment = os.environ | {"WANDB_MODE": "offline"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    names, summary = set(), {}
    for record in read_records(path):
        names |= {item.key or ".".join(item.nested_key) for item in record.history.item}
        summary |= {item.key: item.value_json for item in record.summary.update}
    assert {"train/loss", "val/loss", "val/perplexity", "val/perplexity@16"} <= names
    assert {"val/descriptions.path", "plots/descriptions.path", "plots/training_curves.path"} <= names
    final = json.loads((tmp_path / "run/final_metrics.json").read_text())
    assert float(summary["best/cider@16"]) == final["val/cider@16"]
    (table, *_) = (tmp_path / "run").glob("wandb/offline-run-*/files/media/table/val/descriptions*.json")
    rows = json.loads(table.read_text())
    assert rows["columns"] == ["picture", "question", "answer", "description"]
    assert len(rows["data"]) == 6


def check_tensorboard(folder: Path) -> None:
    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    assert set(events.Tags()["scalars"]) >= TRAIN | VAL
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))


def check_trackio(stored: Path, folder: Path) -> None:
    (database,) = stored.glob("edgeglass*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {f"run-{run_id(folder)}"}
    logged = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert {name for _, metrics in logged for name in metrics} >= TRAIN | VAL
    assert [step for step, metrics in logged if "train/loss" in metrics] == list(range(1, 11))


def test_a_run_keeps_its_id_and_two_have_two(tmp_path: Path):
    assert run_id(tmp_path / "a") == run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") != run_id(tmp_path / "b")


def test_wandb_that_lets_nobody_in_is_one_line(run_config: Path, monkeypatch):
    def refuse(**kwargs: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "init", refuse)
    trainer = make_trainer(run_config, "trainer.report_to=wandb")
    with pytest.raises(ConfigError, match=r"trainer.report_to: wandb: No API key configured\.; run `wandb login`"):
        trainer.train()


def test_wandb_that_breaks_off_is_one_warning_and_training_goes_on(run_config: Path, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = make_trainer(run_config, "trainer.report_to=wandb")
    log = wandb.sdk.wandb_run.Run.log

    def break_off(self: object, data: dict[str, object], *args: object, **kwargs: object) -> None:
        if data.get("train/step", 0) >= 3:
            raise ConnectionResetError("Connection lost")
        log(self, data, *args, **kwargs)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", break_off)
    monkeypatch.setattr(AlignmentWandbCallback, "_send_evaluation", lambda *args: 1 / 0)
    trainer.train()
    wandb.finish()
    assert trainer.state.global_step == 10
    assert caplog.text.count("W&B gets no more of this session") == 1
