"""Features of frozen towers on disk: written once, checked, and mapped into memory."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.errors import ConfigError, DataError, clear_write_errors
from training.files import checksum, sync

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
ENTRIES_PER_SHARD = 512  # what is lost when a run is killed while it writes

_FORMAT = 1  # of the files, and of what is in them
_INT8_MAX = 127
_ORIGIN = "origin.json"


@dataclass(frozen=True)
class Entry:
    """What is kept of one picture or caption.

    Args:
        features: What its tower's `features` gave, without padding (N, D), or what was pooled of it (D,); None where
            there is a defect.
        content_id: Hash of the picture's bytes or the caption, which says what is equal in retrieval.
        token_hash: `hash_captions` of the caption's tokens, which says what is equal in a batch; 0 of a picture.
        defect: Why the row cannot be used.
    """

    features: Tensor | None
    content_id: int = 0
    token_hash: int = 0
    defect: str | None = None


@dataclass
class FeatureCache:
    """A folder with the features of `num_entries` pictures or captions, in files of `ENTRIES_PER_SHARD`.

    A file is a safetensors file: features of all its entries (T, D) one behind the other, int8 with a scale per token,
    and where each begins. Beside it lies its checksum, written last: a file without one, or of another content,
    counts as missing. A file whose size and time are those of when it was last checked is not read again.

    Args:
        parent: Directory of all caches.
        name: `vision` or `text`.
        origin: All that decides the features, as JSON can hold it; its hash names the folder.
        num_entries: Size of the whole.
        dtype: A key of `DTYPES`.
        is_pooled: Entries have one vector (D,) instead of tokens.
    """

    parent: Path
    name: str
    origin: Mapping[str, Any]
    num_entries: int
    dtype: str
    is_pooled: bool = False
    _open: dict[int, tuple[Any, dict[str, Tensor], dict[int, str]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        described = json.dumps(
            {"format": _FORMAT, "dtype": self.dtype, "entries": self.num_entries, **self.origin}, sort_keys=True
        )
        self.folder = self.parent / f"{self.name}-{hashlib.blake2b(described.encode(), digest_size=10).hexdigest()}"
        self._description = described

    def __len__(self) -> int:
        return self.num_entries

    @property
    def shards(self) -> range:
        """Numbers of its files."""
        return range(-(-self.num_entries // ENTRIES_PER_SHARD))

    def entries_of(self, shard: int) -> range:
        """Entries that a file holds."""
        start = shard * ENTRIES_PER_SHARD
        return range(start, min(start + ENTRIES_PER_SHARD, self.num_entries))

    def missing_shards(self, progress: Iterable[int] | None = None) -> list[int]:
        """Files that are not there or are damaged; what changed since it was last checked is read whole.

        Args:
            progress: `shards`, or a bar around them.
        """
        return [shard for shard in progress or self.shards if not self._is_whole(shard)]

    def write(self, shard: int, entries: Sequence[Entry]) -> None:
        """Write a file, whole or not at all.

        Raises:
            ConfigError: A feature is too large for the type.
            OutputError: The disk is full, or the directory cannot be written.
        """
        tokens = [None if entry.features is None else torch.atleast_2d(entry.features) for entry in entries]
        kept = [features for features in tokens if features is not None]
        features = torch.cat(kept) if kept else torch.empty(0, 1)
        lengths = [0 if features is None else len(features) for features in tokens]
        tensors = {
            "ends": torch.tensor(lengths).cumsum(dim=0),
            "content_ids": torch.tensor([entry.content_id for entry in entries]),
            "token_hashes": torch.tensor([entry.token_hash for entry in entries]),
            **self._stored(features),
        }
        defects = {place: entry.defect for place, entry in enumerate(entries) if entry.defect is not None}
        path, aside = self._path(shard), self._path(shard).with_suffix(f".{os.getpid()}.tmp")
        with clear_write_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                (self.folder / _ORIGIN).write_text(self._description)
                self._mark_path(shard).unlink(missing_ok=True)
                save_file(tensors, aside)
                shutil.copymode(self.folder / _ORIGIN, aside)  # safetensors lets nobody else read it
                sync(aside)
                aside.replace(path)
                self._mark(shard, checksum(path), defects)
            finally:
                aside.unlink(missing_ok=True)

    def __getitem__(self, entry: int) -> Entry:
        shard, place = divmod(entry, ENTRIES_PER_SHARD)
        if shard not in self._open:
            self._open[shard] = self._open_shard(shard)
        file, index, defects = self._open[shard]
        content_id, token_hash = int(index["content_ids"][place]), int(index["token_hashes"][place])
        if place in defects:
            return Entry(None, content_id, token_hash, defects[place])
        tokens = slice(int(index["ends"][place - 1]) if place else 0, int(index["ends"][place]))
        features = file.get_slice("features")[tokens]
        if self.dtype == "int8":
            features = features.float() * index["scales"][tokens].unsqueeze(1)
        return Entry(features[0] if self.is_pooled else features, content_id, token_hash)

    def blank(self) -> Tensor:
        """Zeros in the shape of the first good entry's features."""
        whole = next((entry for entry in map(self.__getitem__, range(len(self))) if entry.features is not None), None)
        if whole is None or whole.features is None:
            raise DataError(f"{self.folder}: not one row is good")
        return torch.zeros_like(whole.features)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a worker opens the files itself

    def bytes_per_token(self, width: int) -> int:
        """Bytes that a token of `width` numbers takes."""
        return width * DTYPES[self.dtype].itemsize + (4 if self.dtype == "int8" else 0)

    def _stored(self, features: Tensor) -> dict[str, Tensor]:
        """Features (T, D) in the cache's type."""
        if self.dtype == "int8":  # symmetric, one scale per token
            scales = features.float().abs().amax(dim=1) / _INT8_MAX
            steps = features.float() / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
            return {"features": steps.round().to(torch.int8), "scales": scales}
        stored = features.to(DTYPES[self.dtype])
        if (stored.isinf() & features.isfinite()).any():
            largest = float(features.abs().max())
            raise ConfigError(
                f"the {self.name} tower gives values up to {largest:.3g}, too large for dataset.cache_dtype "
                f"{self.dtype}: set bfloat16"
            )
        return {"features": stored}

    def _open_shard(self, shard: int) -> tuple[Any, dict[str, Tensor], dict[int, str]]:
        file = safe_open(self._path(shard), "pt")
        names = set(file.keys()) - {"features"}
        index = {name: file.get_tensor(name) for name in names}
        defects = json.loads(self._mark_path(shard).read_text())["defects"]
        return file, index, {int(place): reason for place, reason in defects.items()}

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.safetensors"

    def _mark_path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.json"

    def _mark(self, shard: int, digest: str, defects: Mapping[int, str]) -> None:
        """Note that a file is whole."""
        aside = self._mark_path(shard).with_suffix(f".{os.getpid()}.tmp")
        mark = {"checksum": digest, **_stamp(self._path(shard)), "defects": defects}
        aside.write_text(json.dumps(mark))
        aside.replace(self._mark_path(shard))

    def _is_whole(self, shard: int) -> bool:
        try:
            mark = json.loads(self._mark_path(shard).read_text())
            if any(mark[key] != value for key, value in _stamp(self._path(shard)).items()):
                if checksum(self._path(shard)) != mark["checksum"]:
                    return False
                self._mark(shard, mark["checksum"], mark["defects"])  # copied, or touched
            self._open_shard(shard)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            return False
        return True


def _stamp(path: Path) -> dict[str, int]:
    """What tells a file that was written to since."""
    status = path.stat()
    return {"size": status.st_size, "modified_ns": status.st_mtime_ns}
