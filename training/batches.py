"""From samples to batches: their order, and how they are put together."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from modeling_edgeglass.captions import hash_captions
from training.randomness import keyed_rng


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
            `pixel_values` (B, 3, S, S), or `image_features` (B, N, D) of items that have them; `input_ids` (B, L), or
            `text_features` (B, L, D); `attention_mask` (B, L) of these; pooled features are (B, D), without mask;
            `token_hashes` (B,), equal where the tokens
            are; the lists `sample_ids` and `bad_samples`; for evaluation also `image_ids`, `caption_ids` and
            `is_valid` (B,).
        """

        def column(name: str) -> list[Any]:
            return [item[name] for item in items]

        batch: dict[str, Any] = {}
        if "image" in items[0]:
            batch["pixel_values"] = torch.stack(column("image"))
        else:
            batch["image_features"] = torch.stack(column("image_features"))
        batch |= self.captions(items)
        if "text" in items[0]:
            batch["token_hashes"] = hash_captions(batch["input_ids"], batch["attention_mask"])
        else:
            batch["token_hashes"] = torch.tensor(column("token_hash"))
        batch["sample_ids"] = column("sample_id")
        batch["bad_samples"] = [bad for found in column("bad_samples") for bad in found]
        if "is_valid" in items[0]:
            batch["image_ids"] = torch.tensor(column("image_id"))
            batch["caption_ids"] = torch.tensor(column("caption_id"))
            batch["is_valid"] = torch.tensor(column("is_valid"))
        return batch

    def captions(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """What a text tower takes: `input_ids` or `text_features`, with the `attention_mask` of these."""
        if "text" in items[0]:
            return tokenize(self.tokenizer, [item["text"] for item in items])
        features = [item["text_features"] for item in items]
        found = {"text_features": pad_sequence(features, batch_first=True)}
        if features[0].ndim == 2:
            lengths = torch.tensor([len(tokens) for tokens in features])
            found["attention_mask"] = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
        return found


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B, L) of texts, cut to the tokenizer's `model_max_length`."""
    return dict(
        tokenizer(list(texts), padding=True, truncation=True, return_token_type_ids=False, return_tensors="pt")
    )


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
