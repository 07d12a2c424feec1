"""One pass over the data through frozen towers, whose features are kept on disk for all epochs and runs to come."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_edgeglass import EdgeGlassModel, EdgeGlassProcessor
from modeling_edgeglass.captions import hash_captions
from modeling_edgeglass.distributed import rank, world_size
from training.batches import tokenize
from training.checkpointing import CheckpointingTrainer
from training.config import PairsConfig
from training.data import BadRowError, PixmoParquetImageTextDataset, content_hash
from training.errors import ConfigError, UserError, told_by_each_rank
from training.feature_cache import ENTRIES_PER_SHARD, Entry, FeatureCache
from training.files import fingerprint
from training.identity import weights_checksum
from training.signals import Interrupted, SignalListener, heed_parent_alone

_BATCH_SIZE = 64  # of the towers' passes; fixed, because the last bits of features depend on it
_SAMPLED_CAPTIONS = 256  # that tell how long captions are

Batch = dict[str, Tensor]


def cache_features(
    config: PairsConfig,
    model: EdgeGlassModel,
    trainer: CheckpointingTrainer,
    processor: EdgeGlassProcessor,
    datasets: Mapping[str, PixmoParquetImageTextDataset],
    signals: SignalListener | None = None,
) -> None:
    """Fill the caches of `datasets` from the frozen towers of `model`, and open them; if the config says so.

    Each rank computes its share of the files that are missing. A cache is of these weights, this preprocessing and
    this content alone: with anything else changed there is another one.

    Raises:
        ConfigError: The disk has not the room, or a feature is too large for `dataset.cache_dtype`.
        Interrupted: A signal came.
    """
    if config.cache == "off":
        return
    signals = signals or SignalListener()
    parent = Path(config.cache_dir or Path(HF_HOME) / "edgeglass")
    passes = _passes(config, model, trainer, processor, datasets, parent)
    todo = _of_rank_0(lambda: _find_missing(passes, parent, model, trainer))
    for work, missing in zip(passes, todo, strict=True):
        if missing:
            _fill(work, missing, model, trainer, signals)
        work.attach()


class _Pass(Dataset[tuple[Any, int]]):
    """What one tower has to see of a data set: the item of an entry, or why it is bad, and its content id."""

    batch_size = _BATCH_SIZE

    def __init__(self, title: str, dataset: PixmoParquetImageTextDataset, cache: FeatureCache) -> None:
        self.title, self.dataset, self.cache = title, dataset, cache

    def collate(self, items: Sequence[Any]) -> Batch:
        """Good items as a batch."""
        raise NotImplementedError

    def encode(
        self, model: EdgeGlassModel, trainer: CheckpointingTrainer, batch: Batch
    ) -> Iterator[tuple[Tensor, int]]:
        """Features without padding (N, D), or pooled (D,), and the token hash, of each item."""
        raise NotImplementedError

    def bytes_per_entry(self, model: EdgeGlassModel, trainer: CheckpointingTrainer) -> float:
        """About what an entry takes on disk."""
        raise NotImplementedError

    def attach(self) -> None:
        """Give the cache to the data set."""
        raise NotImplementedError


class _Pictures(_Pass):
    """Every view of every picture."""

    def __getitem__(self, entry: int) -> tuple[Any, int]:
        index, view = divmod(entry, self.dataset.views)
        row = self.dataset.pairs[index]
        content_id = content_hash(row.image_bytes or b"")
        try:
            return self.dataset.pixels(row, self.dataset.view_rng(view, index)), content_id
        except BadRowError as error:
            return error, content_id

    def collate(self, items: Sequence[Tensor]) -> Batch:
        return {"pixel_values": torch.stack(list(items))}

    def encode(
        self, model: EdgeGlassModel, trainer: CheckpointingTrainer, batch: Batch
    ) -> Iterator[tuple[Tensor, int]]:
        encoder = model.vision_encoder
        with torch.no_grad(), trainer.accelerator.autocast():
            features = encoder.features(batch["pixel_values"].to(trainer.args.device))
            if self.cache.is_pooled:
                features = encoder.pool(features)
        for kept in features.cpu():
            yield kept, 0

    def bytes_per_entry(self, model: EdgeGlassModel, trainer: CheckpointingTrainer) -> float:
        (kept, _), *_ = self.encode(model, trainer, self.collate([self.dataset.blank_pixels()]))
        tokens = torch.atleast_2d(kept)
        return len(tokens) * self.cache.bytes_per_token(tokens.shape[1])

    def attach(self) -> None:
        self.dataset.image_cache = self.cache


class _Captions(_Pass):
    """Every caption and, behind them, the empty one, for text dropout."""

    batch_size = ENTRIES_PER_SHARD  # so many can be sorted by length

    def __init__(
        self,
        title: str,
        dataset: PixmoParquetImageTextDataset,
        cache: FeatureCache,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__(title, dataset, cache)
        self.tokenizer = tokenizer

    def __getitem__(self, entry: int) -> tuple[Any, int]:
        if entry == len(self.dataset):
            return "", 0
        row = self.dataset.pairs.without_image(entry)
        content_id = content_hash((row.caption or "").encode())
        try:
            return self.dataset.caption(row), content_id
        except BadRowError as error:
            return error, content_id

    def collate(self, items: Sequence[str]) -> Batch:
        return tokenize(self.tokenizer, items)

    def encode(
        self, model: EdgeGlassModel, trainer: CheckpointingTrainer, batch: Batch
    ) -> Iterator[tuple[Tensor, int]]:
        encoder, device = model.text_encoder, trainer.args.device
        input_ids, real = batch["input_ids"], batch["attention_mask"].bool()
        found: list[Tensor] = [torch.empty(0)] * len(real)
        for chunk in real.sum(dim=1).argsort(stable=True).split(_BATCH_SIZE):
            columns = real[chunk].any(dim=0)  # padding of the longest in the chunk
            ids, mask = input_ids[chunk][:, columns].to(device), batch["attention_mask"][chunk][:, columns].to(device)
            with torch.no_grad(), trainer.accelerator.autocast():
                features, mask = encoder.features(ids, mask)
                if self.cache.is_pooled:
                    features = encoder.pool(features, mask)
            for place, kept, is_real in zip(chunk.tolist(), features.cpu(), mask.bool().cpu(), strict=True):
                found[place] = kept if self.cache.is_pooled else kept[is_real]
        yield from zip(found, hash_captions(input_ids, batch["attention_mask"]).tolist(), strict=True)

    def bytes_per_entry(self, model: EdgeGlassModel, trainer: CheckpointingTrainer) -> float:
        encoder = model.text_encoder
        if self.cache.is_pooled:
            return self.cache.bytes_per_token(encoder.pooled_size)
        sampled = range(0, len(self.dataset), -(-len(self.dataset) // _SAMPLED_CAPTIONS))
        captions = [item for item, _ in map(self.__getitem__, sampled) if isinstance(item, str)] or [""]
        tokens = self.collate(captions)["attention_mask"].sum().item() / len(captions)
        return tokens * self.cache.bytes_per_token(encoder.hidden_size)

    def attach(self) -> None:
        self.dataset.text_cache = self.cache


def _passes(
    config: PairsConfig,
    model: EdgeGlassModel,
    trainer: CheckpointingTrainer,
    processor: EdgeGlassProcessor,
    datasets: Mapping[str, PixmoParquetImageTextDataset],
    parent: Path,
) -> list[_Pass]:
    dtype, is_pooled = config.cache_dtype, config.cache == "pooled"
    towers = {
        name: {
            "weights": weights_checksum(encoder.backbone.state_dict()),
            "config": encoder.backbone.config.to_json_string(),
            "layers": encoder.feature_layers,
            "pooled by": "itself" if encoder.pooling is None else "us",
            "autocast": str(trainer.accelerator.mixed_precision),
            **({"pooling": _pooling_hash(encoder.pooling)} if is_pooled else {}),
        }
        for name, encoder in (("vision", model.vision_encoder), ("text", model.text_encoder))
        if encoder.freeze
    }
    passes: list[_Pass] = []
    for split, dataset in datasets.items():
        origin = {"content": dataset.pairs.fingerprint, "max_image_pixels": dataset.max_image_pixels}
        if "vision" in towers and "vision" in dataset.towers:
            views = config.cache_views if split == "train" else 0
            dataset.views = max(1, views)
            seen = {"column": dataset.pairs.image_column, "transform": repr(dataset.image_transforms)}
            drawn = {"views": views, "seed": dataset.seed} if views else {}
            cache = FeatureCache(
                parent,
                "vision",
                towers["vision"] | origin | seen | drawn,
                len(dataset) * dataset.views,
                dtype,
                is_pooled,
            )
            title = f"{split} pictures" + (f" in {views} views" if views else "")
            passes.append(_Pictures(title, dataset, cache))
        if "text" in towers and "text" in dataset.towers:
            read = {"column": dataset.pairs.caption_column, "max_text_length": dataset.max_text_length}
            read["tokenizer"] = _saved_hash(processor.tokenizer)
            cache = FeatureCache(parent, "text", towers["text"] | origin | read, len(dataset) + 1, dtype, is_pooled)
            passes.append(_Captions(f"{split} captions", dataset, cache, processor.tokenizer))
    return passes


def _pooling_hash(pooling: torch.nn.Module | None) -> str:
    """What tells a pooling layer, and its weights, from another one."""
    return "mean" if pooling is None else f"{type(pooling).__name__} {weights_checksum(pooling.state_dict())}"


def _saved_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that a tokenizer saves."""
    tokenize(tokenizer, [""])  # a fast one also saves how it was last called
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return fingerprint(sorted(str(path) for path in Path(folder).iterdir() if path.is_file()))


def _find_missing(
    passes: Sequence[_Pass], parent: Path, model: EdgeGlassModel, trainer: CheckpointingTrainer
) -> list[list[int]]:
    """The files that each cache lacks; says what they will take.

    Raises:
        ConfigError: The disk has not the room.
    """
    todo, needed = [], 0.0
    for work in passes:
        shards = tqdm(work.cache.shards, desc=f"check features of {work.title}", disable=trainer.args.disable_tqdm)
        missing = work.cache.missing_shards(shards)
        entries = sum(len(work.cache.entries_of(shard)) for shard in missing)
        todo.append(missing)
        if missing:
            size = entries * work.bytes_per_entry(model, trainer) / 1e9
            needed += size
            tqdm.write(f"features of {entries} {work.title}: about {size:.2f} GB in {work.cache.folder}")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free / 1e9
    except OSError as error:
        raise ConfigError(f"dataset.cache_dir {parent} cannot be made: {error.strerror}") from error
    if needed > free:
        raise ConfigError(
            f"the features need about {needed:.2f} GB, and {parent} has {free:.2f} GB free: name another "
            "dataset.cache_dir, take dataset.cache=pooled, dataset.cache_dtype=int8 or fewer dataset.cache_views, or "
            "set dataset.cache=off"
        )
    return todo


def _of_rank_0(find: Callable[[], list[list[int]]]) -> list[list[int]]:
    """What rank 0 finds, or its error, on every rank."""
    found: list[Any] = [None]
    if rank() == 0:
        try:
            found = [find()]
        except UserError as error:
            found = [error]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def _fill(
    work: _Pass,
    missing: Sequence[int],
    model: EdgeGlassModel,
    trainer: CheckpointingTrainer,
    signals: SignalListener,
) -> None:
    """Write the missing files, each rank its share; all ranks stop together.

    Raises:
        Interrupted: Some rank got a signal.
        UserError: Of this rank, or that another has one.
    """
    mine = missing[rank() :: world_size()]
    total = sum(len(work.cache.entries_of(shard)) for shard in mine)
    is_shown = rank() == 0 and not trainer.args.disable_tqdm
    with tqdm(total=total, desc=f"features of {work.title}", disable=not is_shown) as bar, told_by_each_rank():
        written = _write(work, mine, model, trainer, signals, bar)
        done = 0
        for _ in missing[:: world_size()]:
            error: UserError | None = None
            try:
                new = next(written, 0)
            except UserError as raised:
                error, new = raised, 0
            any_error, any_signal = trainer.agree(error is not None, signals.received)
            if any_error:
                raise error or ConfigError("the features cannot be kept without the rank that has an error")
            if any_signal:
                raise Interrupted
            done += new
            if rank() == 0 and not is_shown:
                tqdm.write(f"features of {work.title}: {done} of {total}")


def _write(
    work: _Pass,
    shards: Sequence[int],
    model: EdgeGlassModel,
    trainer: CheckpointingTrainer,
    signals: SignalListener,
    bar: "tqdm[Any]",
) -> Iterator[int]:
    """Write one file after the other; gives the number of entries of each, and ends at a signal."""
    batches = [
        list(entries[start : start + work.batch_size])
        for entries in map(work.cache.entries_of, shards)
        for start in range(0, len(entries), work.batch_size)
    ]
    loader: Any = DataLoader(
        work,
        batch_sampler=batches,
        collate_fn=partial(_split_bad, work),
        num_workers=trainer.args.dataloader_num_workers,
        worker_init_fn=partial(heed_parent_alone, then=None),
    )
    results = iter(loader)
    for shard in shards:
        entries: list[Entry] = []
        while len(entries) < len(work.cache.entries_of(shard)):
            if signals.received:
                return
            batch, marks = next(results)
            good = work.encode(model, trainer, batch) if batch else iter(())
            for content_id, defect in marks:
                features, token_hash = (None, 0) if defect else next(good)
                entries.append(Entry(features, content_id, token_hash, defect))
            bar.update(len(marks))
        work.cache.write(shard, entries)
        yield len(entries)


def _split_bad(work: _Pass, rows: Sequence[tuple[Any, int]]) -> tuple[Batch | None, list[tuple[int, str | None]]]:
    """The good rows as a batch, and of every row its content id and its defect."""
    good = [item for item, _ in rows if not isinstance(item, BadRowError)]
    marks = [(content_id, str(item) if isinstance(item, BadRowError) else None) for item, content_id in rows]
    return work.collate(good) if good else None, marks
