"""What a run logged: the logged names, one row per step, and the two files that grow with it."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.errors import DataError

METRICS_CSV, HISTORY_JSON = "metrics.csv", "training_history.json"
STEP, EPOCH = "train/step", "train/epoch"

Row = dict[str, Any]
History = Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]

_TRAIN_NAMES = {"learning_rate": "lr", "train_loss": "mean_loss"}  # train_loss is the mean over the whole session
_SPLITS = {"eval_": "val/", "test_": "test/", "train_": "train/"}


def logged_names(logs: Mapping[str, Any]) -> Row:
    """Trainer's names as ours: `loss` becomes `train/loss`, `learning_rate` `train/lr`, `eval_i2t_r1` `val/i2t_r1`.

    This is the one place that names what is logged; names that have their split already stay as they are.
    """
    return {_logged_name(name): value for name, value in logs.items()}


def _logged_name(name: str) -> str:
    if "/" in name:
        return name
    if name in _TRAIN_NAMES:
        return "train/" + _TRAIN_NAMES[name]
    for prefix, split in _SPLITS.items():
        if name.startswith(prefix):
            return split + name.removeprefix(prefix)
    return "train/" + name


def history_rows(history: History) -> list[Row]:
    """A history as one row per step, under the logged names, in the order of steps.

    Args:
        history: Trainer's `log_history`; rows with logged names; or columns, a dict of lists of equal length with
            None where a step has no value, whose steps are counted from 1 where there is no `train/step`.

    Raises:
        ValueError: An entry tells no step, or columns differ in length.
    """
    entries = _entries_of_columns(history) if isinstance(history, Mapping) else history
    rows: dict[int, Row] = {}
    for entry in map(logged_names, entries):
        if STEP not in entry:
            raise ValueError(f"a history entry has no step: it holds {', '.join(entry) or 'nothing'}")
        rows.setdefault(int(entry[STEP]), {}).update(entry)
    return [rows[step] for step in sorted(rows)]


def _entries_of_columns(columns: Mapping[str, Sequence[Any]]) -> list[Row]:
    named = logged_names(columns)
    lengths = {name: len(values) for name, values in named.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of a history differ in length: {lengths}; write None where there is no value")
    named.setdefault(STEP, range(1, 1 + max(lengths.values(), default=0)))
    return [
        {name: value for name, value in zip(named, values, strict=True) if value is not None}
        for values in zip(*named.values(), strict=True)
    ]


def series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have `name`."""
    found = [(int(row[STEP]), float(row[name])) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def read_history(output_dir: str | os.PathLike[str]) -> list[Row]:
    """The rows that a run left in its output directory.

    Raises:
        DataError: There are none, or the file is damaged.
    """
    path = Path(output_dir) / HISTORY_JSON
    try:
        stored = json.loads(path.read_text())
        # JSON has no NaN: null stands for it.
        return [{name: math.nan if value is None else value for name, value in row.items()} for row in stored]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): is {output_dir} the output of a run?") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: is damaged: {error}; the run writes it anew when it goes on") from error


class HistoryFiles:
    """`metrics.csv` and `training_history.json` in the output directory: a row per logged step.

    A row is added, or the last one replaced, without writing the rest anew: a long run logs often.

    Args:
        output_dir: Where they lie.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self._csv, self._json = Path(output_dir) / METRICS_CSV, Path(output_dir) / HISTORY_JSON
        self._rows: list[Row] = []
        self._columns: list[str] = []
        self._last_csv, self._last_json = 0, 0  # where the last row begins, in bytes

    def write(self, rows: Sequence[Row]) -> None:
        """Write both files as a whole."""
        self._rows = list(rows)
        names = dict.fromkeys(name for row in rows for name in row)
        self._columns = [STEP, EPOCH, *(name for name in names if name not in (STEP, EPOCH))]
        *before, last = [self._csv_line(self._columns), *map(self._csv_line, rows)]
        self._last_csv = sum(map(len, before))
        _replace(self._csv, b"".join([*before, last]))
        *before, last = [b"[\n", *(_json_line(row) for row in rows)]
        self._last_json = len(b"".join(before)) + max(0, len(before) - 1)
        _replace(self._json, b"[\n" + b",".join(map(_json_line, rows)) + b"]\n")

    def add(self, row: Row) -> None:
        """Add a row; where the last one has the same step it takes up the new values."""
        same_step = bool(self._rows) and self._rows[-1][STEP] == row[STEP]
        if same_step:
            row = self._rows.pop() | row
        if not self._columns or row.keys() - set(self._columns) or not self._rows:
            self.write([*self._rows, row])
            return
        self._rows.append(row)
        self._last_csv = _put(self._csv, self._last_csv if same_step else None, self._csv_line(row))
        if same_step:
            _put(self._json, self._last_json, _json_line(row) + b"]\n")
        else:
            end = self._json.stat().st_size - len(b"]\n")
            self._last_json = _put(self._json, end, b"," + _json_line(row) + b"]\n") + 1

    def _csv_line(self, row: Row | list[str]) -> bytes:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(
            row if isinstance(row, list) else [row.get(column, "") for column in self._columns]
        )
        return buffer.getvalue().encode()


def _json_line(row: Row) -> bytes:
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(finite).encode() + b"\n"


def _put(path: Path, position: int | None, content: bytes) -> int:
    """Write from a position, or from the end, on; returns where that was."""
    with path.open("r+b") as file:
        start = file.seek(0, os.SEEK_END) if position is None else file.seek(position)
        file.write(content)
        file.truncate()
    return start


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content)
    aside.replace(path)
