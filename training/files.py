"""Files: are they whole, what do they hold, do they last?"""

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

_HASHED_WHOLE, _BLOCK, _BLOCKS_PER_FILE = 1 << 30, 1 << 16, 16  # bytes, bytes, count


def checksum(path: Path) -> str:
    """BLAKE2b of a file's content, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(files: Sequence[str]) -> str:
    """Hash of files: of all they hold up to 1 GiB together, some seconds; of more, their sizes and sampled blocks.

    Those are 16 of 64 KiB in each file, its footer among them, so that a change between them goes unseen.
    """
    digest = hashlib.blake2b(digest_size=16)
    sizes = [os.path.getsize(file) for file in files]
    for file, size in zip(files, sizes, strict=True):
        digest.update(size.to_bytes(8, "big"))
        with open(file, "rb") as stream:
            if sum(sizes) <= _HASHED_WHOLE:
                digest.update(hashlib.file_digest(stream, partial(hashlib.blake2b, digest_size=16)).digest())
                continue
            for i in range(_BLOCKS_PER_FILE):
                stream.seek(max(0, (size - _BLOCK) * i // (_BLOCKS_PER_FILE - 1)))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def weights_fingerprint(folder: Path) -> str:
    """`fingerprint` of a saved model's weights: what was measured with it or made of it goes with no other."""
    return fingerprint(sorted(str(path) for path in folder.glob("*.safetensors")))


def sync(path: Path) -> None:
    """Have the system write a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
