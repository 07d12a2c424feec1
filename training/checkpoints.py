"""Checkpoints that are whole or not there: written aside, synced, listed in a manifest, then renamed.

A checkpoint is a directory `checkpoint-STEP`. Its `manifest.json`, written last, has the size and checksum of
every other file and the identity of the run; a directory without a manifest that holds is not a checkpoint.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from training.errors import CheckpointError, OutputError, clear_write_errors, printable
from training.files import checksum, sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WEIGHTS, STATE, PROGRESS = "trained_weights.safetensors", "trainer_state.json", "progress_{rank}.json"
_REQUIRED = (WEIGHTS, STATE, PROGRESS.format(rank=0), "optimizer.pt", "scheduler.pt")
_PREFIX, _ASIDE, _REPLACED = "checkpoint-", "unfinished-checkpoint-", "replaced-checkpoint-"


def checkpoint_path(output_dir: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint of a step lies once it is whole."""
    return Path(output_dir) / f"{_PREFIX}{step}"


def begin_checkpoint(output_dir: str | os.PathLike[str], step: int) -> Path:
    """An empty directory aside to write a checkpoint into; what an earlier kill left there is removed."""
    output_dir = Path(output_dir)
    _put_back_replaced(output_dir)
    for leftover in (*output_dir.glob(f"{_ASIDE}*"), *output_dir.glob(f"{_REPLACED}*")):
        shutil.rmtree(leftover)
    folder = aside_path(output_dir, step)
    folder.mkdir(parents=True)
    return folder


def aside_path(output_dir: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint of a step is written before it is whole."""
    return Path(output_dir) / f"{_ASIDE}{step}"


def publish_checkpoint(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Make the directory that `begin_checkpoint` gave a checkpoint: sync, manifest, rename.

    Args:
        folder: With all files written.
        identity: What must be equal when the run is resumed, as JSON can hold it.

    Returns:
        The checkpoint. One of the same step that was there is replaced.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "blake2b": checksum(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"identity": dict(identity), "files": files}, indent=2) + "\n")
    sync(manifest)
    sync(folder)
    step = folder.name.removeprefix(_ASIDE)
    final = folder.with_name(_PREFIX + step)
    replaced = folder.with_name(_REPLACED + step)
    if final.exists():
        final.rename(replaced)
    folder.rename(final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint that is whole; which ones were passed over, and why, is logged as a warning."""
    _put_back_replaced(Path(output_dir))
    for path in _by_step(output_dir):
        defect = find_defect(path)
        if defect is None:
            return path
        logger.warning("passed over %s: %s", path, defect)
    return None


def find_defect(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where its manifest holds."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = [(str(name), int(file["size"]), file["blake2b"]) for name, file in manifest["files"].items()]
        is_identified = isinstance(manifest["identity"], dict)
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished"
    except OSError as error:
        return f"its {MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return f"its {MANIFEST} is damaged"
    if not is_identified:
        return f"its {MANIFEST} is damaged"
    for name in _REQUIRED:
        if name not in manifest["files"]:
            return f"its {MANIFEST} does not list {name}"
    for name, size, expected in files:
        if reason := _find_difference(checkpoint / Path(name).name, size, expected):
            return f"{printable(name)} {reason}"
    return None


def _find_difference(path: Path, size: int, expected: str) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes instead of {size}"
    if checksum(path) != expected:
        return "is not what was written: its checksum differs"
    return None


def read_identity(checkpoint: Path) -> dict[str, Any]:
    """The identity of the run that wrote a whole checkpoint."""
    identity: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())["identity"]
    return identity


def remove_old_checkpoints(published: Path, limit: int | None, best: str | None) -> None:
    """Keep the checkpoint that was just published, the best one, and the newest of the others; None keeps all.

    Args:
        published: It is whole, and the newest of the run: what has a higher number was passed over as damaged when
            the run was resumed. That does not count, and is left for whoever wants to look at it.
        limit: How many are kept, the best among them, except that the published one stays besides it when this is 1.
        best: The best one, in whatever directory it was when it was written.
    """
    if limit is None or limit < 1:
        return
    found = _by_step(published.parent)
    newest_first = found[found.index(published) :]
    keep = {published} | {path for path in newest_first if best is not None and path.name == Path(best).name}
    for path in newest_first:
        if len(keep) < limit:
            keep.add(path)
    for path in set(newest_first) - keep:
        (path / MANIFEST).unlink(missing_ok=True)  # first, so that a kill in between leaves nothing that looks whole
        shutil.rmtree(path)


@contextmanager
def removed_if_unwritten(folder: Path) -> Iterator[None]:
    """Turn a failure to write a checkpoint into one line, and remove what was written of it.

    Raises:
        CheckpointError: In the place of an OSError, or of what torch and safetensors make of one.
    """
    try:
        with clear_write_errors(folder.with_name(folder.name.removeprefix("unfinished-"))):
            yield
    except OutputError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(f"{error}; earlier checkpoints are untouched") from error


def _put_back_replaced(output_dir: Path) -> None:
    """A kill between the two renames of `publish_checkpoint` leaves the old checkpoint under its other name."""
    for replaced in output_dir.glob(f"{_REPLACED}*"):
        final = replaced.with_name(_PREFIX + replaced.name.removeprefix(_REPLACED))
        if not final.exists() and find_defect(replaced) is None:
            with suppress(FileNotFoundError):  # another rank was faster
                replaced.rename(final)


def _by_step(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Directories that are named as checkpoints, the newest first."""
    found = [path for path in Path(output_dir).glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True)
