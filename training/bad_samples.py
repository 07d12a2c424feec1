"""Rows that cannot be used: written down once, counted, and too many of them stop the run."""

import csv
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from filelock import FileLock

from training.errors import DataError, clear_write_errors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadSample:
    """A row that cannot be used; `sample_id` and `reason` are `printable`."""

    file: str
    row: int
    sample_id: str
    reason: str


class BadSampleLog:
    """`bad_samples.csv` in the output directory: every bad row once, over all ranks and sessions of a run.

    Args:
        path: The CSV file; made with the first bad row.
        rows_per_file: Rows of each file, to tell how many are too many; for other files there is no limit.
        max_bad_fraction: 0..1, share of the rows of a file.
    """

    def __init__(self, path: Path, rows_per_file: Mapping[str, int], max_bad_fraction: float) -> None:
        self.path = path
        self.rows_per_file = rows_per_file
        self.max_bad_fraction = max_bad_fraction
        self._known: set[tuple[str, int]] = set()

    def record(self, samples: Iterable[BadSample]) -> None:
        """Write down what is new.

        Raises:
            DataError: More than `max_bad_fraction` of a file's rows are bad.
            OutputError: The CSV file could not be written.
        """
        fresh = {(sample.file, sample.row): sample for sample in samples}
        if not fresh.keys() - self._known:
            return
        with clear_write_errors(self.path):
            new = self._append(fresh)
        for sample in new:
            logger.warning("%s: row %d (sample_id %s): %s", sample.file, sample.row, sample.sample_id, sample.reason)
        self._known |= fresh.keys()
        self._check_fractions()

    def _append(self, fresh: Mapping[tuple[str, int], BadSample]) -> list[BadSample]:
        """Write those of `fresh` that no rank has written yet; returns them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"), self.path.open("a+", newline="", encoding="utf-8") as file:
            drop_incomplete_line(self.path)
            file.seek(0)
            self._known |= {(row["file"], int(row["row"])) for row in csv.DictReader(file)}
            new = [sample for key, sample in fresh.items() if key not in self._known]
            writer = csv.writer(file)
            if not self.path.stat().st_size:
                writer.writerow(field.name for field in fields(BadSample))
            writer.writerows(astuple(sample) for sample in new)
        return new

    def _check_fractions(self) -> None:
        for file, count in Counter(file for file, _ in self._known).items():
            total = self.rows_per_file.get(file)
            if total is not None and count > self.max_bad_fraction * total:
                raise DataError(
                    f"{file}: {count} of {total} rows are bad, more than dataset.max_bad_fraction "
                    f"{self.max_bad_fraction:g}; {self.path} lists them; that key allows more, "
                    "in evaluation --max-bad-fraction does"
                )


def drop_incomplete_line(path: Path) -> None:
    """Cut off what a kill or a full disk left of a last line; the row is found and written again."""
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\r\n") + 2 if b"\r\n" in content else 0)
