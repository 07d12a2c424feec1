"""Rows of parquet files: which files, which columns, and what a row holds."""

import bisect
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets.builder import Key
from datasets.packaged_modules.parquet.parquet import Parquet
from pyarrow import types

from training.errors import DataError
from training.files import fingerprint

# Names that a column is found by, the first match first: PixMo's, datasets', img2dataset's.
IMAGE_COLUMNS = ("image_bytes", "image", "jpg")
CAPTION_COLUMNS = ("caption", "text", "txt")
SAMPLE_ID_COLUMNS = ("sample_id", "key")
QUESTION_COLUMNS = ("question",)
ANSWER_COLUMNS = ("answer", *CAPTION_COLUMNS)

_ROWS_PER_BATCH, _BUFFER_BYTES = 64, 1 << 20

ParquetPath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Row:
    """A pair as it is stored; what is null is None, and so is all of a row with a `defect`.

    Where questions are asked, `caption` is the answer.
    """

    image_bytes: bytes | None
    caption: str | None
    sample_id: str
    defect: str | None = None
    question: str | None = None


class ParquetPairs:
    """Picture-caption pairs of parquet files, read from a memory-mapped cache that `datasets` makes of them.

    Args:
        parquet_path: A parquet file, a glob, or a list of them.
        image_column: Column of the picture; None finds it. So do the next two.
        caption_column: Column of the caption.
        sample_id_column: Column of the id; where there is none, the row number is the id.
        with_questions: The caption may be the answer to a question: columns of both are found.
        question_column: Column of the question; None finds it, where there is one.
        needs_images: False reads no pictures, and `image_column` is not looked for.

    Raises:
        DataError: A file cannot be read, a column is missing or of a wrong kind, or there are no rows.
    """

    def __init__(
        self,
        parquet_path: ParquetPath,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        sample_id_column: str | None = None,
        with_questions: bool = False,
        question_column: str | None = None,
        needs_images: bool = True,
    ) -> None:
        metadata = {file: _read_metadata(file) for file in find_parquet_files(parquet_path)}
        self.files = [file for file in metadata if metadata[file].num_rows > 0]
        if not self.files:
            raise DataError(f"{', '.join(metadata)}: no rows")
        self.rows_per_file = {file: metadata[file].num_rows for file in self.files}
        self._ends = list(accumulate(self.rows_per_file.values()))
        schemas = {file: metadata[file].schema.to_arrow_schema() for file in self.files}
        first = self.files[0]
        names = schemas[first].names
        captions = ANSWER_COLUMNS if with_questions else CAPTION_COLUMNS
        self.image_column: str | None = None
        if needs_images:
            self.image_column = _find_column("image", image_column, IMAGE_COLUMNS, names, first)
        self.caption_column = _find_column("caption", caption_column, captions, names, first)
        if self.image_column == self.caption_column:
            raise DataError(f"{first}: column {self.image_column!r} is to be both picture and caption")
        self._sample_id, self._question = None, None
        if sample_id_column is not None or set(SAMPLE_ID_COLUMNS) & set(names):
            self._sample_id = _find_column("sample_id", sample_id_column, SAMPLE_ID_COLUMNS, names, first)
        if with_questions and (question_column is not None or set(QUESTION_COLUMNS) & set(names)):
            self._question = _find_column("question", question_column, QUESTION_COLUMNS, names, first)
        self._undecodable = f"the caption{', question' if self._question else ''} or id is no UTF-8"
        found = (self.image_column, self.caption_column, self._sample_id, self._question)
        self._columns = [name for name in found if name is not None]
        for file, schema in schemas.items():
            self._check_columns(file, schema)
            self._check_kinds(file, schema, first, schemas[first])
        self.table = self._load(schemas[first])
        self._without_image = self.table.select_columns(
            [name for name in self.table.column_names if name != self.image_column]
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        try:
            stored = self.table[index]
        except UnicodeDecodeError:
            return Row(None, None, str(index), self._undecodable)
        image_bytes = None if self.image_column is None else stored[self.image_column]
        if isinstance(image_bytes, dict):
            image_bytes = image_bytes["bytes"]
        if isinstance(image_bytes, list):
            if None in image_bytes:
                return Row(None, None, str(index), "a byte of the picture is null")
            image_bytes = bytes(image_bytes)
        return self._row(index, stored, image_bytes)

    def without_image(self, index: int) -> Row:
        """A row as if it had no picture, whose bytes stay on the disk."""
        try:
            stored = self._without_image[index]
        except UnicodeDecodeError:
            return Row(None, None, str(index), self._undecodable)
        return self._row(index, stored, None)

    def _row(self, index: int, stored: Mapping[str, Any], image_bytes: bytes | None) -> Row:
        sample_id = str(index if self._sample_id is None else stored[self._sample_id])
        question = None if self._question is None else stored[self._question]
        return Row(image_bytes, stored[self.caption_column], sample_id, question=question)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files, see `training.files.fingerprint`; taken once."""
        return fingerprint(self.files)

    def where(self, index: int) -> tuple[str, int]:
        """The file of a row, and its number there, from 0."""
        place = bisect.bisect_right(self._ends, index)
        return self.files[place], index - (self._ends[place - 1] if place else 0)

    def _check_columns(self, file: str, schema: pyarrow.Schema) -> None:
        """Every shard must have the columns of the first, of a kind that we can read."""
        for column in self._columns:
            if column not in schema.names:
                raise DataError(f"{file}: no column {column!r}; it has {', '.join(schema.names)}")
            if schema.names.count(column) > 1:
                raise DataError(f"{file}: several columns are called {column!r}")
        if self.image_column is not None and not _holds_bytes(schema.field(self.image_column).type):
            kind = schema.field(self.image_column).type
            raise DataError(f"{file}: column {self.image_column!r} holds {kind}, not the bytes of pictures")
        for column in filter(None, (self.caption_column, self._question)):
            if not _holds_text(schema.field(column).type):
                raise DataError(f"{file}: column {column!r} holds {schema.field(column).type}, not text")

    def _check_kinds(self, file: str, schema: pyarrow.Schema, first: str, expected: pyarrow.Schema) -> None:
        """Shards are one table: a column is of one kind in all of them."""
        for column in self._columns:
            kind, wanted = schema.field(column).type, expected.field(column).type
            if _kind(kind) != _kind(wanted):
                raise DataError(f"{file}: column {column!r} holds {kind}, where {first} has {wanted}")

    def _load(self, schema: pyarrow.Schema) -> datasets.Dataset:
        columns = self._columns
        # Of the schema, not of what the file's own metadata claims the features to be.
        plain = pyarrow.schema(
            [schema.field(column).remove_metadata() for column in schema.names if column in columns]
        )
        try:
            builder = _StreamedParquet(
                data_files={"train": [glob.escape(file) for file in self.files]},
                columns=columns,
                features=datasets.Features.from_arrow_schema(plain),
                hash="streamed",
            )
            builder.download_and_prepare()
            table: Any = builder.as_dataset("train")
        except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowException, OSError) as error:
            raise _name_culprit(self.files, columns, error) from error
        return table


class _StreamedParquet(Parquet):
    """`datasets`' builder for parquet, but for its reading: that holds a row group decoded, which may be the file."""

    def _generate_tables(self, files: Sequence[str], row_groups_list: Any) -> Iterator[tuple[Key, pyarrow.Table]]:
        for number, file in enumerate(files):
            for i, batch in enumerate(_read_batches(file, self.config.columns)):
                yield Key(number, i), self._cast_table(pyarrow.Table.from_batches([batch]))


def _read_batches(file: str, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """A file a few rows at a time; held are they, a page of each column and a small buffer."""
    with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES) as reader:
        yield from reader.iter_batches(_ROWS_PER_BATCH, columns=columns)


def find_parquet_files(parquet_path: ParquetPath) -> list[str]:
    """The files that a path, a glob or a list of them names; those of a glob in the order of their names.

    Raises:
        DataError: A path or glob matches no file.
    """
    paths = [parquet_path] if isinstance(parquet_path, str | os.PathLike) else parquet_path
    files = []
    for path in [os.fspath(path) for path in paths]:
        matches = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not matches:
            folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
            beside = sorted(
                os.path.basename(name) for name in glob.glob(os.path.join(glob.escape(folder), "*.parquet"))
            )
            found = f"there are {', '.join(beside[:10])}" if beside else "nor any other parquet file beside it"
            raise DataError(f"{path}: no such file; {found}")
        files += matches
    if not files:
        raise DataError("no parquet file given")
    return files


def _read_metadata(file: str) -> pyarrow.parquet.FileMetaData:
    try:
        return pyarrow.parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: is no parquet file: {str(error).splitlines()[0]}") from error


def _find_column(kind: str, wanted: str | None, usual: Sequence[str], columns: Sequence[str], file: str) -> str:
    """The column to read: the wanted one, or the first usual one that there is."""
    for name in usual if wanted is None else (wanted,):
        if name in columns:
            return name
    expected = f"column {wanted!r}" if wanted else f"{kind} column ({', '.join(usual)})"
    option = f", or --{kind}-column in evaluation" if kind in ("image", "caption") else ""
    hint = f"dataset.{kind}_column in the config{option}, names another"
    raise DataError(f"{file}: no {expected}; it has {', '.join(columns)}; {hint}")


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    """Bytes in any of Arrow's forms, a list of them, or datasets' Image struct."""
    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind):
        return types.is_uint8(kind.value_type)
    return any(is_kind(kind) for is_kind in (types.is_binary, types.is_large_binary, types.is_binary_view))


def _kind(kind: pyarrow.DataType) -> str:
    """What is the same for `datasets`, which casts between forms of text, of bytes and of integers."""
    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if _holds_text(kind):
        return "text"
    if types.is_integer(kind):
        return "integer"
    if types.is_struct(kind):
        return "struct"
    return "bytes in a list" if types.is_nested(kind) else "bytes" if _holds_bytes(kind) else str(kind)


def _holds_text(kind: pyarrow.DataType) -> bool:
    if types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    return any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view))


def _name_culprit(files: Sequence[str], columns: Sequence[str], error: Exception) -> DataError:
    """Which of several files cannot be read; datasets does not say."""
    for file in files:
        try:
            for _ in _read_batches(file, columns):
                pass
        except (pyarrow.ArrowException, OSError) as reason:
            return DataError(f"{file}: is damaged: {str(reason).splitlines()[0]}")
    return DataError(f"{', '.join(files)}: cannot be read: {str(error.__cause__ or error).splitlines()[0]}")
