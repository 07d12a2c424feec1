"""The files of an index: written whole or not at all, checked when they are opened.

`index.json` says what it is, `embeddings.npy` has vectors (N, D) of one length, `prefixes.npy` their first numbers as
unit vectors of float16, `items.parquet` what they are embeddings of.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet

from training.errors import ConfigError, DataError, clear_write_errors, printable
from training.files import sync

METADATA, EMBEDDINGS, PREFIXES, ITEMS = "index.json", "embeddings.npy", "prefixes.npy", "items.parquet"
# Lengths of the vectors on disk. float16 has but few digits below 6e-5, where numbers of a unit vector often are, and
# numpy is slow to read them; 32768 is the largest power of two that it holds.
LENGTHS = {"float32": 1.0, "float16": 32768.0}
ROWS_PER_GROUP = 1024  # of the items: what is read to know one of them

_FORMAT = 1
_TEXT, _ROW = pyarrow.string(), pyarrow.int64()
_SCHEMA = pyarrow.schema({"file": _TEXT, "row": _ROW, "sample_id": _TEXT, "caption": _TEXT})


@dataclass(frozen=True)
class Item:
    """What an embedding is of.

    Args:
        file: Path of a picture within its folder, or the name of a parquet file.
        row: Row of the parquet file, from 0.
        sample_id: The row's id.
        caption: How the row's caption begins.
    """

    file: str
    row: int | None = None
    sample_id: str | None = None
    caption: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}" if self.row is None else f"{self.file}:{self.row} ({self.sample_id})"
        return f"{place}  {self.caption}" if self.caption else place


Batch = tuple[np.ndarray, Sequence[Item]]


@dataclass(frozen=True)
class Metadata:
    """What `index.json` says of N embeddings.

    Args:
        count: N.
        sizes: Of the funnel, ascending; the last one is D.
        dtype: Of the embeddings.
        model: Name or path of the model that made them.
        weights: Checksum of its weights.
    """

    count: int
    sizes: tuple[int, ...]
    dtype: str
    model: str
    weights: str


def read_metadata(folder: Path) -> Metadata:
    """What an index says of itself.

    Raises:
        DataError: There is none, it is damaged, or of another format.
    """
    path = folder / METADATA
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{folder}: no index, which has a file {METADATA}; build makes one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {printable(str(error), 200)}") from error
    if not isinstance(stored, dict) or stored.pop("format", None) != _FORMAT:
        raise DataError(f"{path}: is not of format {_FORMAT}; build the index anew")
    try:
        metadata = Metadata(**stored | {"sizes": tuple(stored["sizes"])})
        _check_sizes(metadata.sizes)
        if not (_is_size(metadata.count) and metadata.dtype in LENGTHS):
            raise ValueError(f"{metadata.count} embeddings of {metadata.dtype}")
        if not (isinstance(metadata.model, str) and isinstance(metadata.weights, str)):
            raise ValueError("the model is no text")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is damaged: {printable(str(error), 200)}") from error
    return metadata


def map_array(path: Path, dtype: str, shape: tuple[int, int]) -> np.ndarray:
    """An array on the disk, mapped into memory.

    Raises:
        DataError: It is not there, or of another type or shape.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read: {printable(str(error), 200)}; build the index anew") from error
    if array.dtype != np.dtype(dtype) or array.shape != shape or not array.flags.c_contiguous:
        raise DataError(f"{path}: holds {array.dtype} {array.shape}, where {METADATA} says {dtype} {shape}")
    return array.view(np.ndarray)


def check_new(folder: Path) -> None:
    """Find out before anything is embedded.

    Raises:
        ConfigError: The folder is there already.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: is there already; remove it, or name another folder")


def write_index(
    folder: Path, batches: Iterable[Batch], *, sizes: Sequence[int], model: str, weights: str, dtype: str
) -> None:
    """As `EdgeGlassIndex.build`."""
    check_new(folder)
    if dtype not in LENGTHS:
        raise ConfigError(f"dtype must be one of {', '.join(LENGTHS)}, got {dtype}")
    try:
        _check_sizes(sizes)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    aside = folder.with_name(f"{folder.name}.partial")
    with _removed_on_failure(aside):
        count = 0
        with ExitStack() as stack:
            with clear_write_errors(folder):
                aside.mkdir(parents=True, exist_ok=True)  # of a build that was killed: its files are written over
                embeddings = stack.enter_context((aside / EMBEDDINGS).open("wb"))
                prefixes = stack.enter_context((aside / PREFIXES).open("wb"))
                _write_header(embeddings, dtype, (0, sizes[-1]))
                _write_header(prefixes, "float16", (0, sizes[0]))
                items = stack.enter_context(pyarrow.parquet.ParquetWriter(aside / ITEMS, _SCHEMA))
            for embeds, group in _regrouped(_checked(batches, sizes[-1])):
                with clear_write_errors(folder):
                    embeddings.write((LENGTHS[dtype] * unit_prefixes(embeds, sizes[-1])).astype(dtype).tobytes())
                    prefixes.write(unit_prefixes(embeds, sizes[0]).astype(np.float16).tobytes())
                    items.write_table(_table(group), row_group_size=ROWS_PER_GROUP)
                count += len(embeds)
            if not count:
                raise DataError("there is nothing to search: not one embedding came")
            with clear_write_errors(folder):
                _write_header(embeddings, dtype, (count, sizes[-1]))
                _write_header(prefixes, "float16", (count, sizes[0]))
        with clear_write_errors(folder):
            metadata = asdict(Metadata(count, tuple(sizes), dtype, model, weights))
            (aside / METADATA).write_text(json.dumps({"format": _FORMAT, **metadata}, indent=2) + "\n")
            for name in (EMBEDDINGS, PREFIXES, ITEMS, METADATA):
                sync(aside / name)
            aside.rename(folder)


def unit_prefixes(embeds: np.ndarray, size: int) -> np.ndarray:
    """Embeddings (B, D) cut to `size` numbers, and then scaled to unit length: (B, size) in float32."""
    cut = embeds[:, :size].astype(np.float64)
    return (cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def _checked(batches: Iterable[Batch], D: int) -> Iterator[Batch]:  # noqa: N803
    for embeds, items in batches:
        embeds = np.asarray(embeds)
        if embeds.shape != (len(items), D):
            raise DataError(f"{len(items)} items came with embeddings {embeds.shape}, where {len(items), D} belong")
        if not (is_finite := np.isfinite(embeds).all(axis=1)).all():
            item = items[int(np.argmin(is_finite))]
            raise DataError(f"{printable(str(item), 200)}: its embedding is NaN or infinite; the model is sick")
        yield embeds, items


def _regrouped(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same rows, `ROWS_PER_GROUP` at a time, so that the place of an item says which group it is in."""
    waiting: list[tuple[np.ndarray, Item]] = []
    for embeds, items in batches:
        waiting += zip(embeds, items, strict=True)
        while len(waiting) >= ROWS_PER_GROUP:
            yield _joined(waiting[:ROWS_PER_GROUP])
            del waiting[:ROWS_PER_GROUP]
    if waiting:
        yield _joined(waiting)


def _joined(rows: Sequence[tuple[np.ndarray, Item]]) -> Batch:
    return np.stack([embed for embed, _ in rows]), [item for _, item in rows]


def _table(items: Sequence[Item]) -> pyarrow.Table:
    return pyarrow.Table.from_pylist([asdict(item) for item in items], schema=_SCHEMA)


def _write_header(file: BinaryIO, dtype: str, shape: tuple[int, int]) -> None:
    """Write over the header of an .npy file: numpy leaves room in it for more rows."""
    file.seek(0)
    header: Any = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # an interrupt too
        for name in (EMBEDDINGS, PREFIXES, ITEMS, METADATA):
            (folder / name).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_sizes(sizes: Sequence[int]) -> None:
    if not sizes or not all(map(_is_size, sizes)) or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"sizes of a funnel are whole numbers that grow, got {tuple(sizes)}")
