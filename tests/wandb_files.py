"""Reads what W&B writes offline: protobuf records in the log format of LevelDB. Its own reader is not in Python."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_FILE_HEADER, _BLOCK, _HEADER = 7, 32768, 7  # bytes
_FULL, _LAST = 1, 4  # kinds of a piece of a record; first and middle ones are 2 and 3


def read_records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file."""
    data, position, parts = path.read_bytes(), _FILE_HEADER, b""
    while position + _HEADER <= len(data):
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < _HEADER:
            position += left_in_block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
