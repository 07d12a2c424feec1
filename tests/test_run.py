"""The commands, as a user starts them."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from modeling_edgeglass import EdgeGlassModel, EdgeGlassProcessor
from run_alignment import align, last_words
from tests.conftest import write_pairs
from tests.test_recovery import assert_equal_bits, assert_equal_tensors, with_batch_norms
from training.batches import EpochSampler
from training.checkpoints import newest_checkpoint
from training.config import load_config
from training.errors import ConfigError, DataError
from training.evaluate import evaluate
from training.results import checkpoint_to_resume
from training.signals import SignalListener
from training.trainer import AlignmentTrainer

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
METRICS = {f"val/{way}_r{k}{size}" for way in ("i2t", "t2i") for k in (1, 5, 10) for size in ("", "@32", "@16")}


def start(*command: object, expect_success: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode == 0) == expect_success, done.stdout + done.stderr
    return done


def run_alignment(config: Path, *overrides: str, **options) -> subprocess.CompletedProcess[str]:
    return start(sys.executable, "run_alignment.py", "--config", config, *overrides, **options)


def final_metrics(output_dir: Path) -> dict[str, float]:
    """All but times."""
    metrics = json.loads((output_dir / "final_metrics.json").read_text())
    return {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second"))}


def evaluated_again(output_dir: Path) -> dict[str, float]:
    val = output_dir.parent / "val.parquet"
    command = ("-m", "training.evaluate", output_dir / "model", val, "--batch-size", 4, "--split", "val")
    assert "dimension | i2t R@1" in start(sys.executable, *command).stdout
    return json.loads((output_dir / "val_metrics.json").read_text())


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
    assert missing.stderr.strip().splitlines()[-1].startswith(f"error: {finished}: no EdgeGlass model")


def test_a_finished_run_without_checkpoints_cannot_be_extended(run_config: Path):
    config = load_config(run_config)
    (run_config.parent / "run").mkdir()
    (run_config.parent / "run" / "final_metrics.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"run holds a finished run; set trainer\.output_dir to another directory"):
        checkpoint_to_resume(config, {})


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
    parsed = {"model": str(model), "parquet": [str(parquet)], "batch_size": 4} | defaults | options
    evaluate(argparse.Namespace(**parsed))
    return sorted(json.loads(max(model.parent.glob("*.json"), key=os.path.getmtime).read_text()))


def test_evaluation_names_its_numbers_and_its_file_after_the_parquet(saved: Path):
    write_pairs(saved.parent / "val.parquet", 6)
    names = evaluate_saved(saved, saved.parent / "va*.parquet")
    assert {path.name for path in saved.parent.glob("*.json")} == {"va_metrics.json"}
    assert {name.partition("/")[0] for name in names} == {"va"}


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
    whole, cut = (f"trainer.output_dir={run_config.parent}/{name}" for name in ("whole", "cut"))
    run_alignment(run_config, whole)
    folder = run_config.parent / "cut"
    run_alignment(run_config, cut)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoint-10")
    (folder / "final_metrics.json").unlink()
    assert (folder / "checkpoint-5").exists()
    run_alignment(run_config, cut)
    assert final_metrics(folder) == final_metrics(run_config.parent / "whole")
    expected, resumed = (load_file(run_config.parent / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_torchrun_starts_one_run_of_two_ranks(run_config: Path):
    torchrun = (BIN / "torchrun", "--nproc_per_node", 2, "run_alignment.py", "--config", run_config)
    done = start(*torchrun, "trainer.max_steps=2")
    assert done.stdout.count("dimension | i2t R@1") == 1  # rank 0 speaks
    folder = run_config.parent / "run"
    assert {"report.html", "retrieval_gallery.png", "metrics.csv"} <= {path.name for path in folder.iterdir()}
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["epoch"] == 1.0  # 20 pairs are two steps of two ranks with four pairs each, and a rest
    assert {path.name for path in (folder / "checkpoint-2").glob("progress*")} == {
        "progress_0.json",
        "progress_1.json",
    }
    alone = run_config.parent / "alone"
    run_alignment(run_config, "trainer.max_steps=2", "dataset.batch_size=8", f"trainer.output_dir={alone}",
                  "trainer.per_device_eval_batch_size=4")  # fmt: skip
    two, one = (json.loads((path / "final_metrics.json").read_text()) for path in (folder, alone))
    for name in METRICS | {"val/loss"}:
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
    two, one = (load_file(path / "model/model.safetensors") for path in (folder, alone))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)


def test_processes_that_would_each_train_alone_are_refused(run_config: Path):
    if torch.accelerator.is_available():
        pytest.skip("with an accelerator the processes form a group")
    torchrun = (BIN / "torchrun", "--nproc_per_node", 2, "run_alignment.py", "--config", run_config)
    done = start(*torchrun, "trainer.use_cpu=false", expect_success=False)
    assert "error: 2 processes were started, but each would train alone" in done.stderr
    assert not (run_config.parent / "run").exists()


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


def test_help_helps():
    done = start(sys.executable, "run_alignment.py", "--help")
    assert "--config" in done.stdout
    assert "key=value" in done.stdout
    assert "MODEL" in start(sys.executable, "-m", "training.evaluate", "--help").stdout.upper()


def two_ranks(
    run_config: Path, output_dir: Path, mode: str, *overrides: str, **options
) -> subprocess.CompletedProcess[str]:
    command = (BIN / "torchrun", "--nproc_per_node", 2, "-m", "tests.two_ranks", run_config, output_dir, mode)
    return start(*command, *overrides, **options)


def test_a_signal_to_one_rank_stops_both_and_the_run_ends_with_the_same_bits(run_config: Path):
    whole, cut = run_config.parent / "whole", run_config.parent / "cut"
    two_ranks(run_config, whole, "whole")
    two_ranks(run_config, cut, "terminated")
    assert newest_checkpoint(cut) == cut / "checkpoint-5"
    two_ranks(run_config, cut, "whole")
    for rank in (0, 1):
        left = [torch.load(folder / f"left-{rank}.pt", weights_only=True) for folder in (whole, cut)]
        assert_equal_bits(*left)


def test_when_one_rank_dies_the_other_ends_too(run_config: Path):
    begun = time.monotonic()
    two_ranks(run_config, run_config.parent / "run", "killed", expect_success=False)
    assert time.monotonic() - begun < 100  # the start included; a rank that waits for a dead one waits half an hour
    assert newest_checkpoint(run_config.parent / "run") == run_config.parent / "run" / "checkpoint-3"


def test_two_ranks_agree_on_running_statistics_before_an_evaluation(run_config: Path):
    folder = run_config.parent / "run"
    two_ranks(run_config, folder, "statistics", *with_batch_norms(run_config), "trainer.max_steps=3")
    (before, after), (other_before, other_after) = (
        torch.load(folder / f"left-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert not all(torch.equal(value, other_before[name]) for name, value in before.items())
    assert_equal_tensors(after, before)
    assert_equal_tensors(after, other_after)


def test_the_rank_whose_loss_is_nan_names_its_samples_on_every_rank(run_config: Path):
    folder = run_config.parent / "run"
    two_ranks(run_config, folder, "nan")
    messages = {(folder / f"error-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    message = messages.pop()
    assert re.match(r"step 4: rank 1: the loss is nan and the gradient's norm nan \(samples id-", message)
    assert "rank 0" not in message


def in_background(*command: object) -> subprocess.Popen[str]:
    """In a group of its own, as launchers start it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_ranks_export_the_best_model_also_when_they_were_terminated(run_config: Path):
    folder = run_config.parent / "run"
    torchrun = (BIN / "torchrun", "--nproc_per_node", 2, "run_alignment.py", "--config", run_config)
    command = (*torchrun, "trainer.epochs=8", "optimization.lr=0.5")
    process = in_background(*command)
    wait_for(lambda: newest_checkpoint(folder) is not None)
    process.terminate()
    output = process.communicate(timeout=100)[0]
    assert (folder / "preempted.json").exists(), output
    assert not (folder / "final_metrics.json").exists()
    start(*command)
    assert not (folder / "preempted.json").exists()
    whole = run_config.parent / "whole"
    start(*command, f"trainer.output_dir={whole}")
    state = json.loads((newest_checkpoint(whole) / "trainer_state.json").read_text())
    assert state["best_global_step"] < state["global_step"]
    assert final_metrics(folder) == final_metrics(whole)
    again = evaluated_again(folder)
    for name in METRICS | {"val/loss"}:
        assert again[name] == pytest.approx(final_metrics(folder)[name], rel=1e-5), name


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


FROM_A_WORKER = """Caught DataError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "training/data.py", line 1
training.errors.DataError: f: row 1: a
"""


@pytest.mark.parametrize(
    ("ranks", "of_one_rank", "message", "said"),
    [
        ((0, 1), False, "a\nb", "error: a b"),
        ((0, 2), False, "a", "error: a"),
        ((1, 2), False, "a", 1),
        ((1, 2), True, "a", "error (rank 1): a"),
        ((0, 2), True, "a", "error (rank 0): a"),
        ((0, 1), True, FROM_A_WORKER, "error: f: row 1: a"),
    ],
)
def test_a_rank_tells_its_own_errors_and_one_rank_those_of_all(ranks, of_one_rank, message, said, monkeypatch):
    for name, value in zip(("RANK", "WORLD_SIZE"), ranks, strict=True):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_RANK", str(ranks[0]))
    error = DataError(message)
    error.of_one_rank = of_one_rank
    assert last_words(error) == said


def test_a_bad_row_of_another_rank_is_told(run_config: Path):
    train = run_config.parent / "train.parquet"
    # An order of 20 indices; the second four are the first batch of rank 1.
    row = [index for _, index in EpochSampler(20, 8, seed=42)][4]
    table = pyarrow.parquet.read_table(train).to_pydict()
    table["image_bytes"][row] = b"x"
    pyarrow.parquet.write_table(pyarrow.table(table), train)
    torchrun = (BIN / "torchrun", "--nproc_per_node", 2, "run_alignment.py", "--config", run_config)
    done = start(*torchrun, "dataset.on_bad_sample=raise", expect_success=False)
    assert f"error (rank 1): {train}: row {row} (sample_id id-{row}): no readable picture" in done.stderr
    done = start(*torchrun, "dataset.val_parquet=none.parquet", expect_success=False)
    assert done.stderr.count("none.parquet: no such file") == 1
