"""What single queries find: the nearest items of the other kind, and at which rank the match is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.retrieval import match_ranks

NUM_FOUND = 5


@dataclass(frozen=True)
class Gallery:
    """Q queries and the five items nearest to each, as numbers of pairs.

    Args:
        queries: Pairs that ask (Q,).
        found: Pairs that were found, the nearest first (Q, 5), or fewer where there are fewer.
        hits: Which of them match: the same pair, an equal caption or an equal picture (Q, 5).
        ranks: Rank of the best match in the whole set, from 1 (Q,).
    """

    queries: Tensor
    found: Tensor
    hits: Tensor
    ranks: Tensor


def find_nearest(
    queries: Tensor, query_embeds: Tensor, gallery_embeds: Tensor, match_ids: Sequence[Tensor] = ()
) -> Gallery:
    """Search for some pairs' queries among all.

    Args:
        queries: Numbers of the pairs that ask (Q,).
        query_embeds: Unit vectors of all pairs (N, D): pictures, or captions.
        gallery_embeds: Unit vectors of the other kind (N, D); item i matches query i.
        match_ids: As for `training.retrieval.match_ranks`.
    """
    similarities = query_embeds[queries] @ gallery_embeds.T  # (Q, N)
    found = similarities.topk(min(NUM_FOUND, len(gallery_embeds)), dim=1).indices  # (Q, 5)
    hits = torch.zeros_like(found, dtype=torch.bool)
    for ids in (torch.arange(len(gallery_embeds)), *match_ids):
        hits |= ids[queries].unsqueeze(1) == ids[found]
    ranks = match_ranks(query_embeds, gallery_embeds, match_ids, rows=queries)[:, 0]
    return Gallery(queries, found, hits, ranks)
