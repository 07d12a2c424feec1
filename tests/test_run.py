"""The commands, as a user starts them."""

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from modeling_edgeglass import EdgeGlassModel, EdgeGlassProcessor
from run_alignment import align
from tests.commands import (
    BIN,
    METRICS,
    evaluated_again,
    final_metrics,
    in_background,
    run_alignment,
    start,
    wait_for,
)
from tests.conftest import write_pairs
from training.checkpoints import newest_checkpoint
from training.config import load_config
from training.errors import ConfigError, DataError
from training.evaluate import evaluate
from training.results import checkpoint_to_resume
from training.signals import SignalListener
from training.trainer import AlignmentTrainer


@pytest.fixture
def finished(run_config: Path) -> Path:
    """Output directory of a run that `accelerate launch` started."""
    done = start(BIN / "accelerate", "launch", "run_alignment.py", "--config", run_config)
    assert "dimension | i2t R@1" in done.stdout
    return run_config.parent / "run"


def test_a_run_leaves_model_metrics_and_config_and_can_be_evaluated_again(finished: Path, run_config: Path):
    metrics = json.loads((finished / "final_metrics.json").read_text())
    assert set(metrics) >= METRICS | {"val/loss", "val/loss_clip", "val/loss_mrl"}
    assert not {"train/mean_loss", "train/runtime"} & set(metrics)  # of one session
    assert (finished / "config.yaml").exists()

    model = EdgeGlassModel.from_pretrained(finished / "model")
    processor = EdgeGlassProcessor.from_pretrained(finished / "model")
    embeds = model.get_text_features(**processor(text="red dot"), truncate_dim=16)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(1))

    again = evaluated_again(finished)
    assert {name.partition("/")[0] for name in again} == {"val"}
    for name in METRICS | {"val/loss"}:
        assert again[name] == pytest.approx(metrics[name], rel=1e-5), name

    refused = run_alignment(run_config, expect_success=False)
    assert refused.stderr.strip().splitlines()[-1] == (
        f"error: {finished} holds a finished run; raise trainer.epochs to extend it, set trainer.output_dir to "
        "another directory, or remove this one"
    )
    assert json.loads((finished / "final_metrics.json").read_text()) == metrics

    missing = start(
        sys.executable, "-m", "training.evaluate", finished, run_config.parent / "val.parquet", expect_success=False
    )
    slip = f"error: {finished}: is a run's output directory; its model is {finished / 'model'}"
    assert missing.stderr.strip().splitlines()[-1] == slip


def test_a_finished_run_without_checkpoints_cannot_be_extended(run_config: Path):
    config = load_config(run_config)
    (run_config.parent / "run").mkdir()
    (run_config.parent / "run" / "final_metrics.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"run holds a finished run; set trainer\.output_dir to another directory"):
        checkpoint_to_resume(config.trainer, {})


@pytest.fixture
def saved(vision_dir: str, text_dir: str, tmp_path: Path) -> Path:
    """A model that nobody trained, with its processor."""
    model = EdgeGlassModel.from_vision_text_pretrained(vision_dir, text_dir, projection_dim=32, mrl_dimensions=[16])
    model.save_pretrained(tmp_path / "run/model")
    EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir).save_pretrained(tmp_path / "run/model")
    return tmp_path / "run/model"


def evaluate_saved(model: Path, parquet: object, **options) -> list[str]:
    """`training.evaluate` in this process; the default options of the command but for those given."""
    defaults = dict.fromkeys(("output", "split", "image_column", "caption_column")) | {"max_bad_fraction": 0.05}
    parsed = {"model": str(model), "parquet": [str(parquet)], "batch_size": 4, "num_scored": 500} | defaults | options
    evaluate(argparse.Namespace(**parsed))
    return sorted(json.loads(max(model.parent.glob("*.json"), key=os.path.getmtime).read_text()))


def test_evaluation_names_its_numbers_and_its_file_after_the_parquet(saved: Path):
    write_pairs(saved.parent / "val.parquet", 6)
    names = evaluate_saved(saved, saved.parent / "va*.parquet")
    assert {path.name for path in saved.parent.glob("*.json")} == {"va_metrics.json"}
    assert {name.partition("/")[0] for name in names} == {"va", "weights"}


def test_evaluation_lists_bad_rows_beside_its_output_and_takes_another_limit(saved: Path, tmp_path: Path):
    table = pyarrow.parquet.read_table(write_pairs(tmp_path / "a.parquet", 6)).to_pydict()
    table["caption"][2] = ""
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"1 of 6 rows are bad, .*; {saved.parent}/bad_samples\.csv lists them"):
        evaluate_saved(saved, tmp_path / "a.parquet")
    assert len((saved.parent / "bad_samples.csv").read_text().splitlines()) == 2
    assert "a/i2t_r1" in evaluate_saved(saved, tmp_path / "a.parquet", max_bad_fraction=0.2)
    with pytest.raises(ConfigError, match=r"--max-bad-fraction: must be in 0\.\.1, got 7"):
        evaluate_saved(saved, tmp_path / "a.parquet", max_bad_fraction=7)


def test_an_output_that_cannot_be_written_is_found_before_anything_is_read(saved: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/a\.json: cannot be written \(.*\); --output names another"):
        evaluate_saved(Path("no/such"), "none.parquet", output=tmp_path / "file" / "a.json")
    with pytest.raises(ConfigError, match="run: is a directory; --output names a file"):
        evaluate_saved(Path("no/such"), "none.parquet", output=saved.parent)


def test_a_model_whose_embeddings_are_nan_is_one_line(saved: Path, tmp_path: Path):
    model = EdgeGlassModel.from_pretrained(saved)
    torch.nn.init.constant_(model.text_encoder.projection.bias, float("nan"))
    model.save_pretrained(saved)
    with pytest.raises(ConfigError, match=rf"{saved}: embeddings are NaN or infinite"):
        evaluate_saved(saved, write_pairs(tmp_path / "a.parquet", 6))


def test_a_run_that_was_cut_off_ends_with_the_same_weights(run_config: Path):
    whole, cut = (
        load_config(run_config, [f"trainer.output_dir={run_config.parent}/{name}"]) for name in ("whole", "cut")
    )
    assert align(whole, SignalListener()) == 0
    folder = run_config.parent / "cut"
    assert align(cut, SignalListener()) == 0
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoint-10")
    (folder / "final_metrics.json").unlink()
    assert (folder / "checkpoint-5").exists()
    assert align(cut, SignalListener()) == 0
    assert final_metrics(folder) == final_metrics(run_config.parent / "whole")
    expected, resumed = (load_file(run_config.parent / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vision_encoder.model_name=none/such", "error: vision tower 'none/such' is neither a model directory here"),
        (
            "vision_encoder.pooling_type=max",
            "error: vision_encoder.pooling_type=max: vision_encoder.pooling_type: must be",
        ),
        ("dataset.val_parquet=none.parquet", "error: none.parquet: no such file"),
        ("optimization.lrr=1", "error: optimization.lrr=1: there is no key 'optimization.lrr'; did you mean 'lr'?"),
    ],
)
def test_mistakes_end_in_one_line(run_config: Path, override: str, message: str):
    done = run_alignment(run_config, override, expect_success=False)
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr


def test_a_val_set_of_one_pair_ends_in_one_line(run_config: Path):
    one = write_pairs(run_config.parent / "one.parquet", 1)
    done = run_alignment(run_config, f"dataset.val_parquet={one}", expect_success=False)
    assert done.stderr.strip().splitlines()[-1] == (
        f"error: {one}: one pair is no val set: retrieval needs two or more"
    )


@pytest.mark.parametrize("script", ["run_alignment.py", "run_decoding.py"])
def test_help_helps(script: str):
    done = start(sys.executable, script, "--help")
    assert "--config" in done.stdout
    assert "key=value" in done.stdout


@pytest.mark.parametrize("module", ["training.evaluate", "training.caption"])
def test_help_of_a_module_helps(module: str):
    assert "MODEL" in start(sys.executable, "-m", module, "--help").stdout.upper()


WORKERS = ("trainer.epochs=2000", "trainer.dataloader_num_workers=2")

PERSISTENT = "trainer.dataloader_persistent_workers=true"


@pytest.mark.parametrize("overrides", [(), (PERSISTENT,)])
def test_a_signal_to_all_processes_leaves_the_workers_to_the_last_step(run_config: Path, overrides: tuple):
    folder = run_config.parent / "run"
    process = in_background(sys.executable, "run_alignment.py", "--config", run_config, *WORKERS, *overrides)
    wait_for(lambda: newest_checkpoint(folder) is not None)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    step = json.loads((folder / "preempted.json").read_text())["step"]
    assert newest_checkpoint(folder) == folder / f"checkpoint-{step}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_do_not_outlive_a_killed_process(run_config: Path):
    process = in_background(sys.executable, "run_alignment.py", "--config", run_config, *WORKERS, PERSISTENT)
    wait_for(lambda: newest_checkpoint(run_config.parent / "run") is not None)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) >= 2
    process.kill()
    process.wait()

    def is_gone(pid: int) -> bool:
        status = Path(f"/proc/{pid}/status")
        return not status.exists() or "State:\tZ" in status.read_text()

    wait_for(lambda: all(map(is_gone, workers)), seconds=30)


def test_a_signal_in_the_final_evaluation_is_a_preemption_and_the_run_then_ends(run_config: Path, monkeypatch):
    config = load_config(run_config, [])
    folder = run_config.parent / "run"
    original = AlignmentTrainer.evaluation_loop

    def terminated(self, *args, **kwargs):
        if not self.is_in_train:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTrainer, "evaluation_loop", terminated)
        signals = SignalListener()
        with signals.listening():
            assert align(config, signals) == 75
    assert json.loads((folder / "preempted.json").read_text()) == {"step": 10}
    assert not (folder / "final_metrics.json").exists()
    assert align(config, SignalListener()) == 0
    assert not (folder / "preempted.json").exists()
    assert (folder / "final_metrics.json").exists()
    assert (folder / "model" / "model.safetensors").exists()
