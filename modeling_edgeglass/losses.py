"""The alignment loss: CLIP at the full size and Matryoshka at the smaller ones."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .distributed import gather, gather_with_grad, rank, world_size
from .matryoshka import at_least_float32, check_truncate_dim
from .prefix_info_nce import prefix_info_nce


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
    its own. All of them together cost about as much as the one at the full size (`prefix_info_nce`). In training
    one size can be drawn per step, an unbiased estimate of the mean over sizes; in eval mode the mean itself is
    taken, so that it depends on no draw.

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
            ValueError: The batch, over all ranks, is a single pair; a Matryoshka size exceeds D; or the two sides
                differ in shape.
        """
        if image_embeds.shape != text_embeds.shape:
            shapes = f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}"
            raise ValueError(f"image_embeds and text_embeds are pairs and must have the same shape, got {shapes}")
        if self.training:
            step, self.num_calls = self.num_calls if step is None else step, self.num_calls + 1
        dimensions, mrl_dimension = self.mrl_dimensions, None
        if self.training and self.sample_single_mrl_dim and dimensions:
            mrl_dimension = random.Random(f"{self.seed}/{step}/mrl_dimension").choice(dimensions)
            dimensions = (mrl_dimension,)
        for dimension in dimensions:
            check_truncate_dim(dimension, image_embeds.shape[1])
        sizes = sorted({*dimensions, image_embeds.shape[1]})
        with torch.autocast(image_embeds.device.type, enabled=False):
            losses = _info_nce(
                at_least_float32(image_embeds),
                at_least_float32(text_embeds),
                at_least_float32(logit_scale),
                sizes,
                caption_ids if self.mask_equal_captions else None,
                gather_negatives,
            )
            loss_clip = losses[-1]
            losses_mrl = [losses[sizes.index(dimension)] for dimension in dimensions]
            loss_mrl = torch.stack(losses_mrl).mean() if losses_mrl else torch.zeros_like(loss_clip)
            loss = self.contrastive_weight * loss_clip + self.mrl_weight * loss_mrl
        return AlignmentLossOutput(loss, loss_clip, loss_mrl, mrl_dimension)


def _info_nce(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    sizes: Sequence[int],
    caption_ids: Tensor | None,
    gather_negatives: bool,
) -> Tensor:
    """Symmetric InfoNCE of this rank's pairs at every size (K,): the mean of image-to-text and text-to-image."""
    num_pairs = len(image_embeds) * (world_size() if gather_negatives else 1)
    if num_pairs < 2:
        raise ValueError("a contrastive loss needs two pairs or more in a batch, got one: there is no negative")
    info_nce = partial(prefix_info_nce, logit_scale=logit_scale, dimensions=sizes, query_captions=caption_ids)
    if num_pairs == len(image_embeds):
        return info_nce(image_embeds, text_embeds, gallery_captions=caption_ids, both_ways=True)
    all_caption_ids = None if caption_ids is None else gather(caption_ids)
    info_nce = partial(info_nce, gallery_captions=all_caption_ids, first_match=rank() * len(image_embeds))
    image_to_text = info_nce(image_embeds, gather_with_grad(text_embeds))
    text_to_image = info_nce(text_embeds, gather_with_grad(image_embeds))
    return (image_to_text + text_to_image) / 2
