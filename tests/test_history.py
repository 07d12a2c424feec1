import csv
import json
import math
from pathlib import Path

import pytest

from training.errors import DataError
from training.history import HistoryFiles, history_rows, logged_names, read_history, series

LOG_HISTORY = [
    {"loss": 3.0, "loss_clip": 4.0, "learning_rate": 0.1, "epoch": 0.5, "step": 1},
    {"loss": 2.5, "loss_clip": 3.0, "learning_rate": 0.2, "epoch": 1.0, "step": 2},
    {"eval_loss": 2.7, "eval_i2t_r1@128": 0.5, "epoch": 1.0, "step": 2},
    {"train_loss": 2.75, "train_runtime": 9.0, "epoch": 1.0, "step": 2},
]
ROWS = [
    {"train/step": 1, "train/epoch": 0.5, "train/loss": 3.0, "train/loss_clip": 4.0, "train/lr": 0.1},
    {
        "train/step": 2,
        "train/epoch": 1.0,
        "train/loss": 2.5,
        "train/loss_clip": 3.0,
        "train/lr": 0.2,
        "val/loss": 2.7,
        "val/i2t_r1@128": 0.5,
        "train/mean_loss": 2.75,
        "train/runtime": 9.0,
    },
]


def test_the_three_kinds_of_history_are_the_same_rows():
    assert history_rows(LOG_HISTORY) == ROWS
    assert history_rows(ROWS) == ROWS
    names = dict.fromkeys(name for row in ROWS for name in row)
    columns = {name: [row.get(name) for row in ROWS] for name in names}
    assert history_rows(columns) == ROWS
    assert history_rows({"loss": [3.0, 2.0]}) == [{"train/loss": 3.0, "train/step": 1}, {"train/loss": 2.0, "train/step": 2}]  # fmt: skip  # noqa: E501


def test_naming_twice_is_naming_once():
    once = logged_names(LOG_HISTORY[1] | LOG_HISTORY[2])
    assert logged_names(once) == once


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([{"loss": 1.0}], "a history entry has no step: it holds train/loss"),
        ([{}], "it holds nothing"),
        ({"loss": [1.0], "lr": [1.0, 2.0]}, "the columns of a history differ in length"),
    ],
)
def test_what_is_no_history_is_an_error(history, message: str):
    with pytest.raises(ValueError, match=message):
        history_rows(history)


def in_files(folder: Path) -> tuple[list[dict], list[dict]]:
    with (folder / "metrics.csv").open(newline="") as file:
        from_csv = [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    return from_csv, read_history(folder)


def test_files_that_grow_entry_by_entry_are_those_that_are_written_at_once(tmp_path: Path):
    grown, whole = HistoryFiles(tmp_path / "grown"), HistoryFiles(tmp_path / "whole")
    grown.write([])
    later = [{"loss": 1.0, "step": step} for step in (3, 4, 5)] + [
        {"eval_loss": 2.0, "step": 5},
        {"loss": 0, "step": 9},
    ]
    for end, entry in enumerate([*LOG_HISTORY, *later], start=1):
        grown.add(logged_names(entry))
        whole.write(history_rows([*LOG_HISTORY, *later][:end]))
        for name in ("metrics.csv", "training_history.json"):
            assert (tmp_path / "grown" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    from_csv, from_json = in_files(tmp_path / "grown")
    assert from_csv == from_json == history_rows([*LOG_HISTORY, *later])


def test_a_session_that_goes_on_leaves_no_step_twice(tmp_path: Path):
    first = HistoryFiles(tmp_path)
    first.write([])
    for step in (1, 2, 3, 4):
        first.add({"train/step": step, "train/loss": 5.0 - step})
    resumed = HistoryFiles(tmp_path)  # from the checkpoint of step 2
    resumed.write([{"train/step": step, "train/loss": 5.0 - step} for step in (1, 2)])
    for step in (3, 4):
        resumed.add({"train/step": step, "train/loss": 5.0 - step})
    from_csv, from_json = in_files(tmp_path)
    assert from_csv == from_json
    assert [row["train/step"] for row in from_json] == [1, 2, 3, 4]


def test_json_stays_json_when_a_value_is_no_number(tmp_path: Path):
    HistoryFiles(tmp_path).write([{"train/step": 1, "train/loss": math.nan}])
    json.loads((tmp_path / "training_history.json").read_text(), parse_constant=pytest.fail)
    assert math.isnan(read_history(tmp_path)[0]["train/loss"])


def test_a_series_has_the_steps_that_have_a_value():
    assert series(ROWS, "val/loss") == ([2], [2.7])
    assert series([{"train/step": 1, "val/loss": None}], "val/loss") == ([], [])


def test_a_missing_and_a_damaged_history_are_one_line(tmp_path: Path):
    with pytest.raises(DataError, match=r"is .* the output of a run"):
        read_history(tmp_path)
    (tmp_path / "training_history.json").write_text('[\n{"train/step": 1}\n')
    with pytest.raises(DataError, match="is damaged"):
        read_history(tmp_path)
