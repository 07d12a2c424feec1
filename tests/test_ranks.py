"""Runs of two ranks, as a launcher starts them."""

import json
import re
import subprocess
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from tests.commands import BIN, METRICS, evaluated_again, final_metrics, in_background, run_alignment, start, wait_for
from tests.conftest import write_pairs
from tests.hub_server import HubServer
from tests.interruptions import assert_equal_bits, assert_equal_tensors, with_batch_norms
from tests.runs import make_trainer
from training.batches import EpochSampler
from training.checkpoints import newest_checkpoint
from training.errors import DataError
from training.run import last_words


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


def test_two_ranks_export_the_best_model_also_when_they_were_terminated(run_config: Path):
    folder = run_config.parent / "run"
    torchrun = (BIN / "torchrun", "--nproc_per_node", 2, "run_alignment.py", "--config", run_config)
    # No evaluation has less bad rows than the first one, which therefore stays the best.
    command = (*torchrun, "trainer.epochs=4", "trainer.metric_for_best_model=bad_rows")
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
    assert (state["best_global_step"], state["global_step"]) == (2, 8)
    assert final_metrics(folder) == final_metrics(whole)
    again = evaluated_again(folder)
    for name in METRICS | {"val/loss"}:
        assert again[name] == pytest.approx(final_metrics(folder)[name], rel=1e-5), name


@pytest.mark.parametrize("num_pairs", [60, 200])  # batches of 64: one rank has none, or both have two
def test_two_ranks_start_spectrally_where_one_does(num_pairs: int, run_config: Path):
    write_pairs(run_config.parent / "train.parquet", num_pairs)
    folder = run_config.parent / "run"
    options = ["optimization.init=spectral", "vision_encoder.pooling_type=statistics", "trainer.disable_tqdm=true"]
    two_ranks(run_config, folder, "start", *options)
    left, other = (torch.load(folder / f"left-{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in left.items():
        assert torch.equal(value, other[name]), name
    alone = make_trainer(run_config, *options).trained_state_dict()
    torch.testing.assert_close(left["logit_scale"], alone["logit_scale"])
    for size in (8, 16, 24):  # a direction has no sign, the product of both sides has none
        of_two, of_one = (
            state["vision_encoder.projection.weight"][:size].T @ state["text_encoder.projection.weight"][:size]
            for state in (left, alone)
        )
        torch.testing.assert_close(of_two, of_one, atol=1e-4 * float(of_one.abs().max()), rtol=1e-3)


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


def test_two_ranks_push_once_and_hear_of_a_refusal_together(run_config: Path, tmp_path: Path):
    ranks = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "run_alignment.py", "--config", run_config)
    wanted = ("trainer.epochs=1", "trainer.push_to_hub=true", "trainer.hub_model_id=tester/two")
    with HubServer() as hub:
        refused = hub.run(*ranks, *wanted, home=tmp_path / "home", token="hf_wrong", expect_success=False)
        assert refused.stderr.count("the Hub knows no such login") == 1
        assert not list((run_config.parent / "run").glob("checkpoint-*"))
        hub.run(*ranks, *wanted, home=tmp_path / "home")
        assert len(hub.repositories["tester/two"].commits) == 2
        assert (
            sum(path == "/api/repos/create" for _, path in hub.requests) == 3
        )  # one was refused, one asks, one pushes
