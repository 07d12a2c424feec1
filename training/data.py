"""Picture-caption pairs from parquet files with embedded picture bytes."""

import glob
import hashlib
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from training.config import DatasetConfig
from training.errors import DataError
from training.images import decode_image
from training.randomness import keyed_rng

# Names that a column is found by, the first match first: PixMo's, datasets', img2dataset's.
IMAGE_COLUMNS = ("image_bytes", "image", "jpg")
CAPTION_COLUMNS = ("caption", "text", "txt")
SAMPLE_ID_COLUMNS = ("sample_id",)

ParquetPath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Transform = Callable[[Image.Image, random.Random], Tensor]


class PixmoParquetImageTextDataset(Dataset[dict[str, Any]]):
    """Pairs of a picture and a caption, decoded when they are asked for.

    `datasets` converts the parquet once into a memory-mapped Arrow cache, so that rows are read at random
    without ever holding the file in memory. Columns are found by name: the picture as bytes or as `datasets`'
    Image struct (`image_bytes`, `image`, `jpg`), the caption (`caption`, `text`, `txt`), and `sample_id`,
    which falls back to the row number.

    What sample i looks like in epoch e depends on (seed, e, i) alone. Ask for `dataset[i]`, which is epoch 0,
    or for `dataset[e, i]`, as `EpochSampler` does.

    Args:
        parquet_path: A parquet file, a glob, or a list of them, with the same columns.
        image_transforms: Makes a tensor (3, S, S) of an RGB picture and a `random.Random`.
        max_text_length: Longest caption in tokens. A word has at least one, so that further words are cut
            before they cost the tokenizer any time.
        text_dropout_prob: 0..1, share of captions that are replaced by the empty one.
        seed: Seed of every random draw.
        with_match_ids: Items also have `image_id` and `caption_id`, 64-bit hashes of the picture's bytes and
            the caption: what is equal counts as a match in retrieval.
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
        with_match_ids: bool = False,
        image_column: str | None = None,
        caption_column: str | None = None,
        sample_id_column: str | None = None,
    ) -> None:
        self.files = find_parquet_files(parquet_path)
        self.image_transforms = image_transforms
        self.max_text_length = max_text_length
        self.text_dropout_prob = text_dropout_prob
        self.seed = seed
        self.with_match_ids = with_match_ids
        columns = _read_metadata(self.files[0]).schema.to_arrow_schema().names
        self.image_column = _find_column("image", image_column, IMAGE_COLUMNS, columns, self.files[0])
        self.caption_column = _find_column("caption", caption_column, CAPTION_COLUMNS, columns, self.files[0])
        self.sample_id_column = None
        if sample_id_column is not None or set(SAMPLE_ID_COLUMNS) & set(columns):
            self.sample_id_column = _find_column(
                "sample_id", sample_id_column, SAMPLE_ID_COLUMNS, columns, self.files[0]
            )
        self.rows = self._load_rows()

    def _load_rows(self) -> datasets.Dataset:
        columns = [self.image_column, self.caption_column]
        columns += [self.sample_id_column] if self.sample_id_column is not None else []
        files_with_rows = [file for file in self.files if _read_metadata(file).num_rows > 0]
        if not files_with_rows:
            raise DataError(f"{', '.join(self.files)}: no rows")
        try:
            rows = datasets.Dataset.from_parquet(files_with_rows, columns=columns)
        except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowException, OSError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise DataError(f"{', '.join(self.files)}: cannot be read: {reason}") from error
        assert isinstance(rows, datasets.Dataset)
        feature = rows.features[self.image_column]
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        elif not (isinstance(feature, dict) and "bytes" in feature) and "binary" not in str(feature.dtype):
            raise DataError(
                f"{self.files[0]}: column {self.image_column!r} holds {feature}, not the bytes of pictures"
            )
        caption_feature = rows.features[self.caption_column]
        if "string" not in str(getattr(caption_feature, "dtype", "")):
            raise DataError(f"{self.files[0]}: column {self.caption_column!r} holds {caption_feature}, not text")
        return rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Sample `index` of epoch 0, or sample `index[1]` of epoch `index[0]`.

        Returns:
            `image` float32 (3, S, S), `text`, `sample_id`; with match ids also `image_id` and `caption_id`.

        Raises:
            DataError: The picture cannot be decoded, or the caption is null.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        row = self.rows[index]
        sample_id = str(row[self.sample_id_column] if self.sample_id_column is not None else index)
        image_bytes, caption = row[self.image_column], row[self.caption_column]
        if isinstance(image_bytes, dict):
            image_bytes = image_bytes["bytes"]
        if image_bytes is None or caption is None:
            column = self.image_column if image_bytes is None else self.caption_column
            raise DataError(f"{', '.join(self.files)}: row {index} (sample_id {sample_id}): {column} is empty")
        try:
            image = decode_image(image_bytes)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"{', '.join(self.files)}: row {index} (sample_id {sample_id}): no readable picture: {error}"
            ) from error
        text = cut_words(caption, self.max_text_length)
        item = {
            "image": self.image_transforms(image, keyed_rng(self.seed, epoch, index, "image")),
            "text": drop_caption(text, self.text_dropout_prob, keyed_rng(self.seed, epoch, index, "text_dropout")),
            "sample_id": sample_id,
        }
        if self.with_match_ids:
            item |= {"image_id": content_hash(image_bytes), "caption_id": content_hash(caption.encode())}
        return item


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

    Captions are dropped in `train` alone; `val` and `test` have match ids.

    Args:
        cfg: Names of columns.
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
    columns: dict[str, Any] = {
        "image_column": cfg.image_column,
        "caption_column": cfg.caption_column,
        "sample_id_column": cfg.sample_id_column,
    }
    built = {
        "train": PixmoParquetImageTextDataset(
            train_parquet_path, train_transforms, max_text_length, text_dropout_prob, seed=seed, **columns
        )
    }
    for split, path in (("val", val_parquet_path), ("test", test_parquet_path)):
        if path is not None:
            built[split] = PixmoParquetImageTextDataset(
                path, val_transforms, max_text_length, seed=seed, with_match_ids=True, **columns
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
            `pixel_values` (B, 3, S, S), `input_ids` and `attention_mask` (B, L), `sample_ids`; where the items have
            them also `image_ids` and `caption_ids` (B,).
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
        if "image_id" in items[0]:
            batch["image_ids"] = torch.tensor([item["image_id"] for item in items])
            batch["caption_ids"] = torch.tensor([item["caption_id"] for item in items])
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


def find_parquet_files(parquet_path: ParquetPath) -> list[str]:
    """The files that a path, a glob or a list of them names; those of a glob in the order of their names.

    Raises:
        DataError: A path or glob matches no file.
    """
    paths = [parquet_path] if isinstance(parquet_path, str | os.PathLike) else parquet_path
    files = []
    for path in [os.fspath(path) for path in paths]:
        matches = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not matches:
            folder = os.path.dirname(path) or "."
            beside = sorted(
                os.path.basename(name) for name in glob.glob(os.path.join(glob.escape(folder), "*.parquet"))
            )
            found = f"there are {', '.join(beside[:10])}" if beside else "nor any other parquet file beside it"
            raise DataError(f"{path}: no such file; {found}")
        files += matches
    if not files:
        raise DataError("no parquet file given")
    return files


def _read_metadata(file: str) -> pyarrow.parquet.FileMetaData:
    try:
        return pyarrow.parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: is no parquet file: {str(error).splitlines()[0]}") from error


def _find_column(kind: str, wanted: str | None, usual: Sequence[str], columns: Sequence[str], file: str) -> str:
    """The column to read: the wanted one, or the first usual one that there is."""
    for name in usual if wanted is None else (wanted,):
        if name in columns:
            return name
    expected = f"column {wanted!r}" if wanted else f"{kind} column ({', '.join(usual)})"
    raise DataError(
        f"{file}: no {expected}; it has {', '.join(columns)}; dataset.{kind}_column in the config names another"
    )
