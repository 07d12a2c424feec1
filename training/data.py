"""Picture-caption pairs as samples."""

import hashlib
import random
import re
from itertools import islice
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from training.bad_samples import BadSample
from training.config import DatasetConfig
from training.errors import DataError, printable
from training.feature_cache import Entry, FeatureCache
from training.images import UndecodableImageError, decode_image
from training.parquet import ParquetPairs, ParquetPath, Row
from training.randomness import keyed_rng
from training.transforms import Transform, load_pixels

_MAX_REPLACEMENTS = 100  # tries to find a good row in the place of a bad one


class BadRowError(ValueError):
    """A row cannot be used; the message says why."""


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
        **columns: As for `ParquetPairs`.

    Attributes:
        image_cache: Features of the pictures, `views` of each one behind the other: items then have them, as
            `image_features` (N, D), pooled (D,), and no picture is decoded. None: there is none.
        text_cache: Features of the captions and, behind them, of the empty one: items then have `text_features`
            (L, D), pooled (D,), and `token_hash`. None: there is none.
        views: Views of a picture in the cache; one is drawn by (seed, epoch, index).
        towers: Which towers items are for, `"vision"`, `"text"` or both.

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
        **columns: Any,
    ) -> None:
        self.pairs = ParquetPairs(parquet_path, **columns)
        self.image_transforms = image_transforms
        self.max_text_length = max_text_length
        self.text_dropout_prob = text_dropout_prob
        self.seed = seed
        self.for_evaluation = for_evaluation
        self.on_bad_sample = on_bad_sample
        self.max_image_pixels = max_image_pixels
        self.image_cache: FeatureCache | None = None
        self.text_cache: FeatureCache | None = None
        self.views = 1
        self.towers: tuple[str, ...] = ("vision", "text")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Sample `index` of epoch 0, or sample `index[1]` of epoch `index[0]`.

        Returns:
            `image` float32 (3, S, S), `text`, `sample_id`, and `bad_samples`, the bad rows that were met; for
            evaluation also `image_id`, `caption_id` and `is_valid`. With a cache, what is in it.

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

    def caption(self, row: Row) -> str:
        """The caption of a row, cut to the longest that is read.

        Raises:
            BadRowError: It is empty, or the row cannot be read.
        """
        if row.defect:
            raise BadRowError(row.defect)
        if row.caption is None or not row.caption.strip():
            raise BadRowError("the caption is empty")
        return cut_words(row.caption, self.max_text_length)

    def pixels(self, row: Row, rng: random.Random) -> Tensor:
        """The picture of a row, transformed (3, S, S).

        Raises:
            BadRowError: It cannot be decoded, or the row cannot be read.
        """
        if row.defect:
            raise BadRowError(row.defect)
        if not row.image_bytes:
            raise BadRowError("the picture is empty, or not embedded")
        try:
            return load_pixels(row.image_bytes, self.image_transforms, rng, self.max_image_pixels)
        except UndecodableImageError as error:
            raise BadRowError(f"no readable picture: {printable(str(error), 200)}") from error

    def blank_pixels(self) -> Tensor:
        """A white picture, transformed (3, S, S)."""
        return self.image_transforms(Image.new("RGB", (64, 64), "white"), random.Random(0))

    def view_rng(self, view: int, index: int) -> random.Random:
        """Draws of a random view: that of an epoch, or of a number in the cache."""
        return keyed_rng(self.seed, view, index, "image")

    def _make_item(self, epoch: int, index: int) -> dict[str, Any] | BadSample:
        decodes = self.image_cache is None and "vision" in self.towers
        row = self.pairs[index] if decodes else self.pairs.without_image(index)
        try:
            texts, images = self._text(epoch, index, row), self._image(epoch, index, row)
        except BadRowError as error:
            return BadSample(*self.pairs.where(index), printable(row.sample_id), str(error))
        item = images | texts | {"sample_id": row.sample_id}
        return item | {"is_valid": True} if self.for_evaluation else item

    def _image(self, epoch: int, index: int, row: Row) -> dict[str, Any]:
        if self.image_cache is None:
            item: dict[str, Any] = {"image": self.pixels(row, self.view_rng(epoch, index))}
            return item | {"image_id": content_hash(row.image_bytes or b"")} if self.for_evaluation else item
        view = keyed_rng(self.seed, epoch, index, "view").randrange(self.views)
        kept = _good(self.image_cache[index * self.views + view])
        item = {"image_features": kept.features}
        return item | {"image_id": kept.content_id} if self.for_evaluation else item

    def _text(self, epoch: int, index: int, row: Row) -> dict[str, Any]:
        rng = keyed_rng(self.seed, epoch, index, "text_dropout")
        if self.text_cache is None:
            item: dict[str, Any] = {"text": drop_caption(self.caption(row), self.text_dropout_prob, rng)}
            return item | {"caption_id": content_hash((row.caption or "").encode())} if self.for_evaluation else item
        own = _good(self.text_cache[index])
        kept = self.text_cache[len(self.pairs)] if is_dropped(self.text_dropout_prob, rng) else own
        item = {"text_features": kept.features, "token_hash": kept.token_hash}
        return item | {"caption_id": own.content_id} if self.for_evaluation else item

    def _placeholder(self, bad: BadSample) -> dict[str, Any]:
        """Something of the right shape, so that batches stay whole; evaluation drops it."""
        item: dict[str, Any] = {"sample_id": bad.sample_id, "is_valid": False, "bad_samples": [bad]}
        item |= {"image_id": 0, "caption_id": 0}
        if self.image_cache is None:
            item["image"] = self.blank_pixels()
        else:
            item["image_features"] = self.image_cache.blank()
        if self.text_cache is None:
            return item | {"text": ""}
        return item | {"text_features": self.text_cache.blank(), "token_hash": 0}


def _good(entry: Entry) -> Entry:
    if entry.defect is not None:
        raise BadRowError(entry.defect)
    return entry


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


def drop_caption(caption: str, probability: float, rng: random.Random) -> str:
    """The caption, or with `probability` (0..1) the empty one."""
    return "" if is_dropped(probability, rng) else caption


def is_dropped(probability: float, rng: random.Random) -> bool:
    """True with `probability` (0..1)."""
    return rng.random() < probability


def cut_words(caption: str, max_words: int) -> str:
    """The caption up to the end of its word number `max_words`; what is before it stays as it is."""
    last_word = next(islice(re.finditer(r"\S+", caption), max_words - 1, None), None)
    return caption if last_word is None else caption[: last_word.end()]


def content_hash(content: bytes) -> int:
    """A signed 64-bit integer that is equal for equal content."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
