"""What must stay the same when a run is resumed, so that it ends with the bits of an uninterrupted one."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from modeling_edgeglass import EdgeGlassModel
from training.checkpoints import read_identity
from training.config import AlignmentConfig
from training.data import PixmoParquetImageTextDataset
from training.errors import CheckpointError

# Keys that may change between the sessions of a run: how long it is, where it lies and what it says meanwhile.
# Paths of data are not compared, their content is.
_FREE_KEYS = {
    "dataset.train_parquet",
    "dataset.val_parquet",
    "dataset.test_parquet",
    "dataset.max_bad_fraction",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.output_dir",
    "trainer.resume",
    "trainer.project",
    "trainer.run_name",
    "trainer.report_to",
    "trainer.disable_tqdm",
    "trainer.save_total_limit",
    "optimization.early_stopping_patience",
}
_FREE_PREFIXES = ("trainer.dataloader_", "trainer.hub_", "trainer.push_to_hub", "trainer.log_", "trainer.trackio_")

_HASHED_WHOLE, _BLOCK, _BLOCKS_PER_FILE = 1 << 30, 1 << 16, 16  # bytes, bytes, count


def run_identity(
    config: AlignmentConfig, model: EdgeGlassModel, data: Mapping[str, PixmoParquetImageTextDataset], world_size: int
) -> dict[str, Any]:
    """Keys and values of a run that a later session must share.

    Args:
        config: Its settings, but for those that change nothing in the result.
        model: Its frozen backbones, by their weights.
        data: Its train and val set, by content.
        world_size: Number of ranks: it decides the batches.
    """
    settings: Any = OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # type: ignore[call-overload]
    identity = {
        f"{section}.{key}": value
        for section, keys in settings.items()
        for key, value in keys.items()
        if f"{section}.{key}" not in _FREE_KEYS and not f"{section}.{key}".startswith(_FREE_PREFIXES)
    }
    identity |= {
        f"content of dataset.{split}_parquet": fingerprint(data[split].pairs.files) for split in ("train", "val")
    }
    for name in ("vision_encoder", "text_encoder"):
        encoder: Any = model.get_submodule(name)
        if encoder.freeze:
            identity[f"weights of {name}.model_name"] = weights_checksum(encoder.backbone.state_dict())
    return identity | {"number of processes": world_size}


def check_same_run(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of a run with other settings.

    Raises:
        CheckpointError: Names every key that differs, with both values.
    """
    before = read_identity(checkpoint)
    differing = [
        f"{key} was {before.get(key)!r} and is {identity.get(key)!r}"
        for key in sorted(before.keys() | identity.keys())
        if before.get(key) != identity.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint.parent} holds a run with other settings: {'; '.join(differing)}; "
            "set them back, or set trainer.output_dir to another directory"
        )


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


def weights_checksum(state: Mapping[str, Tensor]) -> str:
    """Hash of names, types and values of weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
