"""Picture-caption pairs as samples and batches."""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from training.bad_samples import BadSample
from training.config import DatasetConfig
from training.errors import DataError, printable
from training.images import UndecodableImageError, decode_image
from training.parquet import ParquetPairs, ParquetPath
from training.randomness import keyed_rng

Transform = Callable[[Image.Image, random.Random], Tensor]

_MAX_REPLACEMENTS = 100  # tries to find a good row in the place of a bad one


class PixmoParquetImageTextDataset(Dataset[dict[str, Any]]):
    """Pairs of a picture and a caption, decoded when they are asked for.

    `datasets` converts the parquet once into a memory-mapped Arrow cache, so that rows are read at random
    without ever holding the file in memory. Columns are found by name: the picture as bytes or as `datasets`'
    Image struct (`image_bytes`, `image`, `jpg`), the caption (`caption`, `text`, `txt`), and the id
    (`sample_id`, `key`), which falls back to the row number.

    What sample i looks like in epoch e depends on (seed, e, i) alone, and so does what stands in the place of a
    bad one. Ask for `dataset[i]`, which is epoch 0, or for `dataset[e, i]`, as `EpochSampler` does.

    Args:
        parquet_path: A parquet file, a glob, or a list of them, with the same columns.
        image_transforms: Makes a tensor (3, S, S) of an RGB picture and a `random.Random`.
        max_text_length: Longest caption in tokens. A word has at least one, so that further words are cut
            before they cost the tokenizer any time.
        text_dropout_prob: 0..1, share of captions that are replaced by the empty one.
        seed: Seed of every random draw.
        for_evaluation: Items also have `image_id` and `caption_id`, 64-bit hashes of the picture's bytes and the
            caption, because what is equal counts as a match in retrieval; and `is_valid`, which is false where
            the row is bad: there it is left out, never replaced.
        on_bad_sample: What to do with a picture that cannot be decoded and an empty caption: `"replace"` it by
            another sample, or `"raise"`.
        max_image_pixels: Width times height that is still decoded.
        image_column: Column of the picture; None finds it.
        caption_column: Column of the caption; None finds it.
        sample_id_column: Column of the id; None finds it.

    Raises:
        DataError: A file or a column is missing or of a wrong kind, or there are no rows.
    """

    def __init__(
        self,
        parquet_path: ParquetPath,
        image_transforms: Transform,
        max_text_length: int = 512,
        text_dropout_prob: float = 0.0,
        *,
        seed: int = 42,
        for_evaluation: bool = False,
        on_bad_sample: str = "replace",
        max_image_pixels: int = 40_000_000,
        image_column: str | None = None,
        caption_column: str | None = None,
        sample_id_column: str | None = None,
    ) -> None:
        self.pairs = ParquetPairs(
            parquet_path,
            image_column=image_column,
            caption_column=caption_column,
            sample_id_column=sample_id_column,
        )
        self.image_transforms = image_transforms
        self.max_text_length = max_text_length
        self.text_dropout_prob = text_dropout_prob
        self.seed = seed
        self.for_evaluation = for_evaluation
        self.on_bad_sample = on_bad_sample
        self.max_image_pixels = max_image_pixels

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Sample `index` of epoch 0, or sample `index[1]` of epoch `index[0]`.

        Returns:
            `image` float32 (3, S, S), `text`, `sample_id`, and `bad_samples`, the bad rows that were met; for
            evaluation also `image_id`, `caption_id` and `is_valid`.

        Raises:
            DataError: The row is bad and is to raise, or no good one was found in its place.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        item = self._make_item(epoch, index)
        if not isinstance(item, BadSample):
            return item | {"bad_samples": []}
        bad = [item]
        if self.on_bad_sample == "raise":
            raise DataError(f"{item.file}: row {item.row} (sample_id {item.sample_id}): {item.reason}")
        if self.for_evaluation:
            return self._placeholder(item)
        for attempt in range(_MAX_REPLACEMENTS):
            substitute = keyed_rng(self.seed, epoch, index, "replacement", attempt).randrange(len(self))
            item = self._make_item(epoch, substitute)
            if not isinstance(item, BadSample):
                return item | {"bad_samples": bad}
            bad.append(item)
        raise DataError(f"{bad[0].file}: {len(bad)} rows in a row are bad, such as {bad[0].row}: {bad[0].reason}")

    def pair(self, index: int) -> tuple[Image.Image, str]:
        """Picture and caption of a row as they are, RGB and without transform.

        Raises:
            UndecodableImageError: The row has no picture that can be read.
        """
        row = self.pairs[index]
        return decode_image(row.image_bytes or b"", self.max_image_pixels), row.caption or ""

    def _make_item(self, epoch: int, index: int) -> dict[str, Any] | BadSample:
        row = self.pairs[index]
        file, number = self.pairs.where(index)
        sample_id = printable(row.sample_id)
        if row.defect:
            return BadSample(file, number, sample_id, row.defect)
        if not row.image_bytes:
            return BadSample(file, number, sample_id, "the picture is empty, or not embedded")
        if row.caption is None or not row.caption.strip():
            return BadSample(file, number, sample_id, "the caption is empty")
        try:
            image = decode_image(row.image_bytes, self.max_image_pixels)
        except UndecodableImageError as error:
            return BadSample(file, number, sample_id, f"no readable picture: {printable(str(error), 200)}")
        text = cut_words(row.caption, self.max_text_length)
        item = {
            "image": self.image_transforms(image, keyed_rng(self.seed, epoch, index, "image")),
            "text": drop_caption(text, self.text_dropout_prob, keyed_rng(self.seed, epoch, index, "text_dropout")),
            "sample_id": row.sample_id,
        }
        if self.for_evaluation:
            ids = {"image_id": content_hash(row.image_bytes), "caption_id": content_hash(row.caption.encode())}
            item |= {**ids, "is_valid": True}
        return item

    def _placeholder(self, bad: BadSample) -> dict[str, Any]:
        """Something of the right shape, so that batches stay whole; evaluation drops it."""
        white = Image.new("RGB", (64, 64), "white")
        return {
            "image": self.image_transforms(white, random.Random(0)),
            "text": "",
            "sample_id": bad.sample_id,
            "image_id": 0,
            "caption_id": 0,
            "is_valid": False,
            "bad_samples": [bad],
        }


def build_image_datasets_from_parquet(
    cfg: DatasetConfig,
    *,
    train_parquet_path: ParquetPath,
    val_parquet_path: ParquetPath,
    test_parquet_path: ParquetPath | None = None,
    train_transforms: Transform,
    val_transforms: Transform,
    max_text_length: int,
    text_dropout_prob: float,
    seed: int = 42,
) -> dict[str, PixmoParquetImageTextDataset]:
    """The datasets of a run: `train`, `val` and, where it has a path, `test`.

    Captions are dropped in `train` alone; `val` and `test` are for evaluation.

    Args:
        cfg: Names of columns, and what to do with bad rows.
        train_parquet_path: A file, a glob, or a list of them; so are the next two.
        val_parquet_path: Two pairs or more.
        test_parquet_path: None for no test set.
        train_transforms: Transform of training pictures.
        val_transforms: Transform of pictures in evaluation.
        max_text_length: Longest caption in tokens.
        text_dropout_prob: 0..1, share of training captions that are replaced by the empty one.
        seed: Seed of every random draw.

    Raises:
        DataError: A file or column is missing or of a wrong kind, or a set has too few rows.
    """
    options: dict[str, Any] = {
        "seed": seed,
        "on_bad_sample": cfg.on_bad_sample,
        "max_image_pixels": cfg.max_image_pixels,
        "image_column": cfg.image_column,
        "caption_column": cfg.caption_column,
        "sample_id_column": cfg.sample_id_column,
    }
    built = {
        "train": PixmoParquetImageTextDataset(
            train_parquet_path, train_transforms, max_text_length, text_dropout_prob, **options
        )
    }
    for split, path in (("val", val_parquet_path), ("test", test_parquet_path)):
        if path is not None:
            built[split] = PixmoParquetImageTextDataset(
                path, val_transforms, max_text_length, for_evaluation=True, **options
            )
            if len(built[split]) < 2:
                raise DataError(f"{path}: one pair is no {split} set: retrieval needs two or more")
    if len(built["train"]) < 2:
        raise DataError(f"{train_parquet_path}: one pair is no train set: a contrastive loss needs two or more")
    return built


class ImageTextCollator:
    """Items of a dataset as a batch: pictures stacked, captions tokenised together and padded to the longest.

    Args:
        tokenizer: Its `model_max_length` is the longest caption in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Batch `items`.

        Returns:
            `pixel_values` (B, 3, S, S), `input_ids` and `attention_mask` (B, L), and the lists `sample_ids` and
            `bad_samples`; for evaluation also `image_ids`, `caption_ids` and `is_valid` (B,).
        """
        texts = self.tokenizer(
            [item["text"] for item in items],
            padding=True,
            truncation=True,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        batch: dict[str, Any] = {"pixel_values": torch.stack([item["image"] for item in items]), **texts}
        batch["sample_ids"] = [item["sample_id"] for item in items]
        batch["bad_samples"] = [bad for item in items for bad in item["bad_samples"]]
        if "is_valid" in items[0]:
            batch["image_ids"] = torch.tensor([item["image_id"] for item in items])
            batch["caption_ids"] = torch.tensor([item["caption_id"] for item in items])
            batch["is_valid"] = torch.tensor([item["is_valid"] for item in items])
        return batch


class EpochSampler(Sampler[tuple[int, int]]):
    """A new order of the samples every epoch, in whole batches, as indices that carry their epoch.

    A short last batch has fewer negatives than all others, and one of a single pair has none: what does not
    fill a batch is left out of the epoch, other samples each time. A set smaller than one batch is taken whole.

    Args:
        num_samples: Size of the dataset.
        total_batch_size: Samples of a batch over all ranks.
        seed: The order is a function of (seed, epoch).
    """

    def __init__(self, num_samples: int, total_batch_size: int, seed: int) -> None:
        self.num_samples = num_samples
        self.total_batch_size = total_batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Trainer does so."""
        self.epoch = epoch

    def __len__(self) -> int:
        left_out = self.num_samples % self.total_batch_size
        return self.num_samples if left_out == self.num_samples else self.num_samples - left_out

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(keyed_rng(self.seed, self.epoch, "order").getrandbits(63))
        for index in torch.randperm(self.num_samples, generator=generator)[: len(self)].tolist():
            yield self.epoch, index


def drop_caption(caption: str, probability: float, rng: random.Random) -> str:
    """The caption, or with `probability` (0..1) the empty one."""
    return "" if rng.random() < probability else caption


def cut_words(caption: str, max_words: int) -> str:
    """The caption up to the end of its word number `max_words`; what is before it stays as it is."""
    last_word = next(islice(re.finditer(r"\S+", caption), max_words - 1, None), None)
    return caption if last_word is None else caption[: last_word.end()]


def content_hash(content: bytes) -> int:
    """A signed 64-bit integer that is equal for equal content."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
