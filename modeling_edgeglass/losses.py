"""The alignment loss: CLIP at the full size and Matryoshka at the smaller ones."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import gather, gather_with_grad, rank
from .matryoshka import at_least_float32, truncate_embeds


@dataclass
class AlignmentLossOutput:
    """Losses of one batch: `loss` is the weighted sum, the rest is its parts.

    `mrl_dimension` is the Matryoshka size that `loss_mrl` was taken at; None where it is the mean over all.
    """

    loss: Tensor
    loss_clip: Tensor
    loss_mrl: Tensor
    mrl_dimension: int | None


class AlignmentLoss(nn.Module):
    """Symmetric InfoNCE at the full size and at the Matryoshka sizes: `cw * loss_clip + mw * loss_mrl`.

    CLIP (arXiv:2103.00020, fig. 3) on prefixes of the embeddings, as Matryoshka representation learning
    (arXiv:2205.13147, eq. 1) does it for classes: each prefix is cut, scaled to unit length and has a loss of
    its own. In training one size is drawn per step, which costs two losses instead of six and is an unbiased
    estimate of the mean over sizes; in eval mode the mean itself is taken, so that it depends on no draw.

    Negatives come from every rank, with gradient. Rows are the rank's own pairs, columns those of all ranks;
    the mean over ranks is the loss of one process with the whole batch.

    Args:
        contrastive_weight: Weight of the loss at the full size.
        mrl_weight: Weight of the loss at the Matryoshka sizes.
        mrl_dimensions: The Matryoshka sizes; without any, `loss_mrl` is zero.
        sample_single_mrl_dim: Draw one size per training step; False takes the mean over all of them.
        mask_equal_captions: Pairs with equal captions are not each other's negatives.
        seed: Seed of the draws. A size is a function of (seed, step): the same on every rank and after a restart.
    """

    def __init__(
        self,
        contrastive_weight: float = 0.25,
        mrl_weight: float = 1.0,
        mrl_dimensions: Sequence[int] = (2048, 1024, 512, 256, 128),
        sample_single_mrl_dim: bool = True,
        *,
        mask_equal_captions: bool = True,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.contrastive_weight = contrastive_weight
        self.mrl_weight = mrl_weight
        self.mrl_dimensions = tuple(mrl_dimensions)
        self.sample_single_mrl_dim = sample_single_mrl_dim
        self.mask_equal_captions = mask_equal_captions
        self.seed = seed
        self.num_calls = 0

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        *,
        logit_scale: Tensor,
        caption_ids: Tensor | None = None,
        step: int | None = None,
        gather_negatives: bool = True,
    ) -> AlignmentLossOutput:
        """Loss of the pairs (image i, text i).

        Args:
            image_embeds: This rank's image embeddings (B, D), of any length.
            text_embeds: Their captions' embeddings (B, D).
            logit_scale: 1 / temperature, already exponentiated, a scalar.
            caption_ids: One integer per caption (B,), equal where the captions are; None where all differ.
            step: Optimizer step that the drawn size belongs to; None counts the training calls instead.
            gather_negatives: Take the pairs of other ranks as negatives; False keeps to this rank's.

        Returns:
            The losses as float32 scalars, whatever the autocast.

        Raises:
            ValueError: The batch, over all ranks, is a single pair; or a Matryoshka size exceeds D.
        """
        if self.training:
            step, self.num_calls = self.num_calls if step is None else step, self.num_calls + 1
        dimensions, mrl_dimension = self.mrl_dimensions, None
        if self.training and self.sample_single_mrl_dim and dimensions:
            mrl_dimension = random.Random(f"{self.seed}/{step}/mrl_dimension").choice(dimensions)
            dimensions = (mrl_dimension,)

        with torch.autocast(image_embeds.device.type, enabled=False):
            image_embeds, text_embeds, logit_scale = map(at_least_float32, (image_embeds, text_embeds, logit_scale))
            pairs = _Pairs(
                image_embeds, text_embeds, caption_ids if self.mask_equal_captions else None, gather_negatives
            )
            loss_clip = pairs.info_nce(logit_scale, truncate_dim=None)
            losses_mrl = [pairs.info_nce(logit_scale, truncate_dim=dimension) for dimension in dimensions]
            loss_mrl = torch.stack(losses_mrl).mean() if losses_mrl else torch.zeros_like(loss_clip)
            loss = self.contrastive_weight * loss_clip + self.mrl_weight * loss_mrl
        return AlignmentLossOutput(loss, loss_clip, loss_mrl, mrl_dimension)


class _Pairs:
    """A rank's pairs as queries, against the pairs of all ranks, or its own alone, as gallery."""

    def __init__(
        self, image_embeds: Tensor, text_embeds: Tensor, caption_ids: Tensor | None, gather_negatives: bool
    ) -> None:
        self.image_embeds, self.text_embeds = image_embeds, text_embeds  # (B, D)
        self.all_image_embeds = gather_with_grad(image_embeds) if gather_negatives else image_embeds  # (G, D)
        self.all_text_embeds = gather_with_grad(text_embeds) if gather_negatives else text_embeds
        B, G = len(image_embeds), len(self.all_image_embeds)
        if G < 2:
            raise ValueError("a contrastive loss needs two pairs or more in a batch, got one: there is no negative")
        self.targets = torch.arange(B, device=image_embeds.device) + (rank() * B if gather_negatives else 0)
        self.false_negatives = None  # (B, G)
        if caption_ids is not None:
            all_caption_ids = gather(caption_ids) if gather_negatives else caption_ids
            equal = caption_ids.unsqueeze(1) == all_caption_ids
            self.false_negatives = equal.scatter(1, self.targets.unsqueeze(1), False)

    def info_nce(self, logit_scale: Tensor, truncate_dim: int | None) -> Tensor:
        """Symmetric InfoNCE of prefixes: the mean of image-to-text and text-to-image cross-entropy."""
        image_to_text = self._cross_entropy(self.image_embeds, self.all_text_embeds, logit_scale, truncate_dim)
        text_to_image = self._cross_entropy(self.text_embeds, self.all_image_embeds, logit_scale, truncate_dim)
        return (image_to_text + text_to_image) / 2

    def _cross_entropy(
        self, queries: Tensor, gallery: Tensor, logit_scale: Tensor, truncate_dim: int | None
    ) -> Tensor:
        queries, gallery = truncate_embeds(queries, truncate_dim), truncate_embeds(gallery, truncate_dim)
        logits = logit_scale * queries @ gallery.T  # (B, G)
        if self.false_negatives is not None:
            logits = logits.masked_fill(self.false_negatives, float("-inf"))
        return F.cross_entropy(logits, self.targets)
