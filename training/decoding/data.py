"""Pictures, or captions in their place, with what is asked and what is to be said of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modeling_edgeglass import EdgeGlassDecodingProcessor, EdgeGlassModel
from training.bad_samples import BadSample
from training.batches import ImageTextCollator
from training.data import PixmoParquetImageTextDataset
from training.decoding.config import DecodingConfig
from training.errors import DataError, printable
from training.parquet import ParquetPath, Row
from training.transforms import Transform


class AnswersDataset(PixmoParquetImageTextDataset):
    """As the data set of an alignment, with a question to every caption, which is the answer.

    Args:
        parquet_path: A parquet file, a glob, or a list of them.
        image_transforms: Makes a tensor (3, S, S) of an RGB picture and a `random.Random`.
        max_text_length: Longest answer in tokens; further words are cut.
        source: `"images"`; or `"text"`, which reads the caption in the place of the picture, and wants none.
        prompt: What is asked where there is no question.
        **options: As for `PixmoParquetImageTextDataset`.

    Raises:
        DataError: A file or a column is missing or of a wrong kind, or there are no rows.
    """

    def __init__(
        self,
        parquet_path: ParquetPath,
        image_transforms: Transform,
        max_text_length: int = 128,
        *,
        source: str = "images",
        prompt: str = "Describe the picture.",
        **options: Any,
    ) -> None:
        needs_images = source == "images"
        super().__init__(
            parquet_path, image_transforms, max_text_length, with_questions=True, needs_images=needs_images, **options
        )
        self.towers = ("vision",) if needs_images else ("text",)
        self.prompt = prompt

    def _image(self, epoch: int, index: int, row: Row) -> dict[str, Any]:
        return super()._image(epoch, index, row) if "vision" in self.towers else {}

    def _text(self, epoch: int, index: int, row: Row) -> dict[str, Any]:
        question = (row.question or "").strip() or self.prompt
        return super()._text(epoch, index, row) | {"question": question, "answer": self.caption(row)}

    def _placeholder(self, bad: BadSample) -> dict[str, Any]:
        return super()._placeholder(bad) | {"question": self.prompt, "answer": ""}


class AnswersCollator:
    """Items of an `AnswersDataset` as a batch.

    Args:
        processor: Makes token ids of questions and answers, and of captions those that the alignment reads.
        max_text_tokens: That question and answer may have together; None is no limit.
    """

    def __init__(self, processor: EdgeGlassDecodingProcessor, max_text_tokens: int | None = None) -> None:
        self.processor, self.max_text_tokens = processor, max_text_tokens
        self._collate = ImageTextCollator(processor.alignment_tokenizer)

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Batch `items`.

        Returns:
            What is described: `pixel_values` (B, 3, S, S) or `image_features`; of captions `caption_inputs`, which the
            alignment's text tower takes. `input_ids`, `attention_mask` and `labels` (B, L); the lists `questions`,
            `answers`, `sample_ids` and `bad_samples`; for evaluation also `image_ids` and `is_valid` (B,).

        Raises:
            DataError: A question and its answer have too many tokens.
        """
        batch: dict[str, Any] = {"sample_ids": [item["sample_id"] for item in items]}
        batch["bad_samples"] = [bad for item in items for bad in item["bad_samples"]]
        batch["questions"], batch["answers"] = ([item[name] for item in items] for name in ("question", "answer"))
        if "image" in items[0]:
            batch["pixel_values"] = torch.stack([item["image"] for item in items])
        elif "image_features" in items[0]:
            batch["image_features"] = torch.stack([item["image_features"] for item in items])
        else:
            batch["caption_inputs"] = self._collate.captions(items)
        batch |= self.processor.encode_answers(batch["questions"], batch["answers"])
        self._check_lengths(batch)
        if "is_valid" in items[0]:
            batch["image_ids"] = torch.tensor([item["image_id"] for item in items])
            batch["is_valid"] = torch.tensor([item["is_valid"] for item in items])
        return batch

    def _check_lengths(self, batch: dict[str, Any]) -> None:
        longest, row = batch["attention_mask"].sum(dim=1).max(dim=0)
        if self.max_text_tokens is not None and longest > self.max_text_tokens:
            raise DataError(
                f"sample_id {printable(batch['sample_ids'][row])}: question and answer are {longest} tokens, and the "
                f"language model has positions for {self.max_text_tokens} behind the prefix; leave the row out, or "
                "lower dataset.max_text_length"
            )


@torch.no_grad()
def embed(alignment: EdgeGlassModel, batch: Mapping[str, Any]) -> Tensor:
    """Embeddings (B, D) of a batch's pictures, or of the captions in their place, or of what is kept."""
    if (captions := batch.get("caption_inputs")) is not None:
        return alignment.text_encoder(
            captions.get("input_ids"), captions.get("attention_mask"), captions.get("text_features")
        )
    return alignment.vision_encoder(batch.get("pixel_values"), batch.get("image_features"))


def build_answers_datasets(
    config: DecodingConfig, *, train_transforms: Transform, val_transforms: Transform, seed: int
) -> dict[str, AnswersDataset]:
    """The data sets of a run, `train` and `val`; val is always of pictures.

    Raises:
        DataError: A file or column is missing or of a wrong kind, or a set has no rows.
    """
    cfg = config.dataset
    options: dict[str, Any] = {
        "seed": seed,
        "prompt": cfg.prompt,
        "on_bad_sample": cfg.on_bad_sample,
        "max_image_pixels": cfg.max_image_pixels,
        "image_column": cfg.image_column,
        "caption_column": cfg.caption_column,
        "sample_id_column": cfg.sample_id_column,
        "question_column": cfg.question_column,
    }
    train = AnswersDataset(cfg.train_parquet, train_transforms, cfg.max_text_length, source=cfg.source, **options)
    val = AnswersDataset(cfg.val_parquet, val_transforms, cfg.max_text_length, for_evaluation=True, **options)
    if len(val) < 2:
        raise DataError(f"{cfg.val_parquet}: one picture is no val set: another one's embedding is compared with")
    return {"train": train, "val": val}
