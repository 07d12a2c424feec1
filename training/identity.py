"""What must stay the same when a run is resumed, so that it ends with the bits of an uninterrupted one."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from training.checkpoints import read_identity
from training.data import PixmoParquetImageTextDataset
from training.errors import CheckpointError

# Keys that may change between the sessions of a run: how long it is, where it lies and what it says meanwhile.
# Paths of data are not compared, their content is.
_FREE_KEYS = {
    "dataset.train_parquet",
    "dataset.val_parquet",
    "dataset.test_parquet",
    "dataset.max_bad_fraction",
    "dataset.cache_dir",
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
_FREE_PREFIXES = (
    "generation.",
    "trainer.dataloader_",
    "trainer.hub_",
    "trainer.push_to_hub",
    "trainer.log_",
    "trainer.trackio_",
)


def run_identity(
    config: Any,
    frozen: Mapping[str, Mapping[str, Tensor]],
    data: Mapping[str, PixmoParquetImageTextDataset],
    world_size: int,
) -> dict[str, Any]:
    """Keys and values of a run that a later session must share.

    Args:
        config: Its settings, but for those that change nothing in the result.
        frozen: The weights that it starts from and leaves as they are, by the config key that names them.
        data: Its train and val set, by content.
        world_size: Number of ranks: it decides the batches.
    """
    settings: Any = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    identity = {
        f"{section}.{key}": value
        for section, keys in settings.items()
        for key, value in keys.items()
        if f"{section}.{key}" not in _FREE_KEYS and not f"{section}.{key}".startswith(_FREE_PREFIXES)
    }
    identity |= {f"content of dataset.{split}_parquet": data[split].pairs.fingerprint for split in ("train", "val")}
    identity |= {f"weights of {key}": weights_checksum(state) for key, state in frozen.items()}
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


def weights_checksum(state: Mapping[str, Tensor]) -> str:
    """Hash of names, types and values of weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
