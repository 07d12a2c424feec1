"""Checkpoints that are whole or not there: written aside, synced, listed in a manifest, then renamed.

A checkpoint is a directory `checkpoint-STEP`. Its `manifest.json`, written last, has the size and checksum of
every other file and the identity of the run; a directory without a manifest that holds is not a checkpoint.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PREFIX, _ASIDE, _REPLACED = "checkpoint-", "unfinished-checkpoint-", "replaced-checkpoint-"


def checkpoint_path(output_dir: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint of a step lies once it is whole."""
    return Path(output_dir) / f"{_PREFIX}{step}"


def begin_checkpoint(output_dir: str | os.PathLike[str], step: int) -> Path:
    """An empty directory aside to write a checkpoint into; what an earlier kill left there is removed."""
    output_dir = Path(output_dir)
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
        _sync(path)
        files[path.name] = {"size": path.stat().st_size, "blake2b": checksum(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"identity": dict(identity), "files": files}, indent=2) + "\n")
    _sync(manifest)
    _sync(folder)
    step = folder.name.removeprefix(_ASIDE)
    final = folder.with_name(_PREFIX + step)
    replaced = folder.with_name(_REPLACED + step)
    if final.exists():
        final.rename(replaced)
    folder.rename(final)
    _sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint that is whole; which ones were passed over, and why, is logged as a warning."""
    for path in _by_step(output_dir, newest_first=True):
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
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    for name, size, expected in files:
        path = checkpoint / Path(name).name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if checksum(path) != expected:
            return f"{name} is not what was written: its checksum differs"
    return None


def read_identity(checkpoint: Path) -> dict[str, Any]:
    """The identity of the run that wrote a whole checkpoint."""
    identity: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())["identity"]
    return identity


def remove_old_checkpoints(output_dir: str | os.PathLike[str], limit: int | None, best: str | None) -> None:
    """Keep the newest `limit` checkpoints and the best one; None keeps all.

    To be called after a checkpoint was published: the newest is then whole, and is always kept. The best one
    counts among the `limit`, except that the newest stays besides it when `limit` is 1.
    """
    if limit is None or limit < 1:
        return
    newest_first = list(_by_step(output_dir, newest_first=True))
    keep = set(newest_first[:1])
    keep |= {path for path in newest_first if best is not None and path.name == Path(best).name}
    for path in newest_first:
        if len(keep) < limit:
            keep.add(path)
    for path in set(newest_first) - keep:
        (path / MANIFEST).unlink(missing_ok=True)  # first, so that a kill in between leaves nothing that looks whole
        shutil.rmtree(path)


def checksum(path: Path) -> str:
    """BLAKE2b of a file's content, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def clear_write_errors(folder: Path) -> Iterator[None]:
    """Turn a failure to write into one line, and remove what was written of the checkpoint.

    Raises:
        CheckpointError: In the place of an OSError, or of what torch and safetensors make of one.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if not _is_write_error(error):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 1e6
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{folder.name.removeprefix('unfinished-')} could not be written to {folder.parent} ({reason}; "
            f"{free:.0f} MB free); earlier checkpoints are untouched: make room and start the same command again"
        ) from error


def _is_write_error(error: Exception) -> bool:
    """torch and safetensors wrap what the system says into exceptions of their own."""
    words = ("file write failed", "os error", os.strerror(errno.ENOSPC).lower(), "inline_container")
    return isinstance(error, OSError) or any(word in str(error).lower() for word in words)


def _by_step(output_dir: str | os.PathLike[str], *, newest_first: bool) -> list[Path]:
    found = [path for path in Path(output_dir).glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=newest_first)


def _sync(path: Path) -> None:
    """Have the system write a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
