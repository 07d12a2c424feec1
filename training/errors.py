"""Errors whose message is for the user: one line that says what cannot be used and how to mend it."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something that the user gave cannot be used; commands print the message without a traceback.

    `of_one_rank` is set by `told_by_each_rank`: the other ranks need not have the same error.
    """

    of_one_rank = False


class ConfigError(UserError):
    """A config file, an override or a value in it."""


class DataError(UserError):
    """A data file, a column or a row."""


class CheckpointError(UserError):
    """A checkpoint could not be written or belongs to another run."""


class OutputError(UserError):
    """A file of the output directory could not be written."""


class SickTrainingError(UserError):
    """A loss, a gradient, a weight or an embedding is NaN or infinite."""


@contextmanager
def told_by_each_rank() -> Iterator[None]:
    """Within, ranks work on samples and files of their own: an error may be of one rank, which then has to tell it."""
    try:
        yield
    except UserError as error:
        error.of_one_rank = True
        raise


@contextmanager
def clear_write_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write a file or directory into one line.

    Raises:
        OutputError: In the place of an OSError, or of what torch and safetensors make of one.
    """
    try:
        yield
    except Exception as error:
        if not _is_write_error(error):
            raise
        free = shutil.disk_usage(path.parent).free / 1e6
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[0], 200)
        raise OutputError(
            f"{path.name} could not be written to {path.parent} ({reason}; {free:.0f} MB free): "
            "make room and start the same command again"
        ) from error


def _is_write_error(error: Exception) -> bool:
    """torch and safetensors wrap what the system says into exceptions of their own."""
    words = ("file write failed", "os error", os.strerror(errno.ENOSPC).lower(), "inline_container")
    return isinstance(error, OSError) or any(word in str(error).lower() for word in words)


def loading_error(error: Exception) -> str:
    """Why transformers could not load a model, in one line."""
    if "Repo id must" in str(error):
        return "there is no such directory, and an id on the Hub reads user/name"
    return str(error).strip().splitlines()[0]


def printable(text: str, length: int = 80) -> str:
    """A stranger's text for messages: one line without control codes, cut to `length` characters."""
    escaped = repr(text[: length + 1])[1:-1]
    return escaped if len(escaped) <= length else escaped[: length - 1] + "…"
