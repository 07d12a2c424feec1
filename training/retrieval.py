"""Retrieval metrics: who finds whom, both ways and at every size, from embeddings that were encoded once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_edgeglass.matryoshka import truncate_embeds

QUERIES_PER_CHUNK = 1024
RECALL_KS = (1, 5, 10)


@dataclass(frozen=True)
class EncodedPairs:
    """A set of N pairs that was encoded once.

    Args:
        image_embeds: Unit vectors (N, D).
        text_embeds: Unit vectors (N, D); text i is the caption of image i.
        rows: Their places in the dataset (N,): bad rows are left out.
        match_ids: Integer columns (N,); rows with an equal id in any of them match each other.
        dataset: The dataset.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    rows: Tensor
    match_ids: Sequence[Tensor] = ()
    dataset: Any = None


def retrieval_metrics(
    image_embeds: Tensor, text_embeds: Tensor, dimensions: Sequence[int], match_ids: Sequence[Tensor] = ()
) -> dict[str, float]:
    """Recall, median rank, mAP and NDCG of image-to-text (`i2t`) and text-to-image (`t2i`) retrieval.

    Args:
        image_embeds: Unit vectors (N, D).
        text_embeds: Unit vectors (N, D); text i is the caption of image i.
        dimensions: Matryoshka sizes besides D.
        match_ids: Integer columns (N,); rows with an equal id in any of them match each other.

    Returns:
        `i2t_r1`, `i2t_r5`, `i2t_r10`: share of queries with a match among the first K, 0..1 (the field's R@K);
        `i2t_medr`: median rank of the best match, from 1; `i2t_map` and `i2t_ndcg`: mean average precision and
        normalised discounted cumulative gain over the whole ranking, 0..1; the same for `t2i`; and all of them
        at every size d as `i2t_r1@d`.

    Raises:
        ValueError: An embedding is NaN or infinite, or a size is none.
    """
    metrics = {}
    D = image_embeds.shape[-1]
    for dimension in (D, *dimensions):
        images, texts = truncate_embeds(image_embeds, dimension), truncate_embeds(text_embeds, dimension)
        suffix = "" if dimension == D else f"@{dimension}"
        for direction, queries, gallery in (("i2t", images, texts), ("t2i", texts, images)):
            for name, value in _summarise(match_ranks(queries, gallery, match_ids)).items():
                metrics[f"{direction}_{name}{suffix}"] = value
    return metrics


def match_ranks(
    queries: Tensor, gallery: Tensor, match_ids: Sequence[Tensor] = (), *, rows: Tensor | None = None
) -> Tensor:
    """Ranks of the matches of every query, the best first.

    Gallery item j matches query i when they are the same row, or rows with an equal id: equal captions, or
    equal pictures. Where a match and another item are just as similar the other goes first, so that a
    collapsed model finds nothing. At no time there are more than `QUERIES_PER_CHUNK` rows of similarities.

    Args:
        queries: Unit vectors (N, D).
        gallery: Unit vectors (N, D); item i belongs to query i.
        match_ids: Integer columns (N,), on any device.
        rows: The queries that are asked (Q,); None asks all N.

    Returns:
        Ranks (Q, M) from 1, where M is the largest number of matches of a query; infinity where one has fewer.

    Raises:
        ValueError: An embedding is NaN or infinite.
    """
    if not (queries.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("embeddings are NaN or infinite, so that nothing can be ranked: training has diverged")
    items = torch.arange(len(queries), device=queries.device)
    rows = items if rows is None else rows
    match_ids = [items, *(ids.to(queries.device) for ids in match_ids)]
    chunks = [_rank_chunk(chunk, queries, gallery, match_ids) for chunk in rows.split(QUERIES_PER_CHUNK)]
    most = max(chunk.shape[1] for chunk in chunks)
    padded = [torch.nn.functional.pad(chunk, (0, most - chunk.shape[1]), value=float("inf")) for chunk in chunks]
    return torch.cat(padded)


def _rank_chunk(chunk: Tensor, queries: Tensor, gallery: Tensor, match_ids: Sequence[Tensor]) -> Tensor:
    similarities = queries[chunk] @ gallery.T  # (C, N)
    matches = torch.zeros_like(similarities, dtype=torch.bool)
    for ids in match_ids:
        matches |= ids[chunk].unsqueeze(1) == ids
    most = int(matches.sum(dim=1).max())
    nothing = float("-inf")
    best = similarities.masked_fill(~matches, nothing).topk(most, dim=1).values  # (C, M), -inf where there are fewer
    others = similarities.masked_fill_(matches, nothing)
    if most <= 8:
        ahead = torch.stack([(others >= match.unsqueeze(1)).sum(dim=1) for match in best.unbind(dim=1)], dim=1)
    else:  # a pass per match would cost more than to sort once
        ahead = others.shape[1] - torch.searchsorted(others.sort(dim=1).values, best)
    matches_ahead = torch.arange(1, most + 1, device=chunk.device)
    return (ahead + matches_ahead).double().masked_fill(best == nothing, float("inf"))


def _summarise(ranks: Tensor) -> dict[str, float]:
    """Metrics of ranks (N, M) as `match_ranks` gives them."""
    first = ranks[:, 0]
    position = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    exists = ranks.isfinite()
    average_precision = (position / ranks).sum(dim=1) / exists.sum(dim=1)
    gain = (1 / torch.log2(1 + ranks)).sum(dim=1)
    ideal_gain = (exists / torch.log2(1 + position)).sum(dim=1)
    summary = {f"r{k}": (first <= k).double().mean().item() for k in RECALL_KS}
    summary["medr"] = first.quantile(0.5).item()
    return summary | {"map": average_precision.mean().item(), "ndcg": (gain / ideal_gain).mean().item()}
