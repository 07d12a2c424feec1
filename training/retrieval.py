"""Retrieval metrics: who finds whom, both ways and at every size, from embeddings that were encoded once.

A prefix's dot products are those of the next smaller one plus those of the block between them, so that all sizes
together cost the multiplications of the largest; and a tile of them serves both directions: its rows are images that
look for texts, its columns texts that look for images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from modeling_edgeglass.matryoshka import at_least_float32, truncate_embeds

TILE = 2048  # rows and columns of similarities that are held at a time
RECALL_KS = (1, 5, 10)

# float32 sums the products of one dot product in another order at another place: what differs by less is a tie.
_ROUNDING = 2e-6
_NO_COSINE = -2.0  # less than any
_MATCHED_ROWS = 256  # of the tiles on the diagonal that hold the matches: the smaller, the less is wasted
_MANY_MATCHES = 64  # per query: from there on it is faster to sort a tile's rows than to go through them for each


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
    D = image_embeds.shape[-1]
    sizes = sorted({D, *dimensions})
    images, texts = _nested(image_embeds, sizes), _nested(text_embeds, sizes)
    queries, items = _find_matches(match_ids, torch.arange(len(images), device=image_embeds.device), len(texts))
    similarities = _match_similarities(images, texts, queries, items)
    back = items.argsort(stable=True)  # whoever matches is matched: the same pairs, in the order of the texts
    directions = {
        "i2t": _AheadOfMatches(queries, similarities),
        "t2i": _AheadOfMatches(items[back], similarities[:, back]),
    }
    for rows, columns, tiles in _tiles(images, texts, queries, items):
        for i, cosines in enumerate(tiles):
            directions["i2t"].count(i, cosines, rows.start)
            directions["t2i"].count(i, cosines.T, columns.start)
    metrics = {}
    for dimension in (D, *dimensions):
        suffix = "" if dimension == D else f"@{dimension}"
        for direction, ahead in directions.items():
            for name, value in _summarise(ahead.ranks(sizes.index(dimension))).items():
                metrics[f"{direction}_{name}{suffix}"] = value
    return metrics


def match_ranks(
    queries: Tensor, gallery: Tensor, match_ids: Sequence[Tensor] = (), *, rows: Tensor | None = None
) -> Tensor:
    """Ranks of the matches of every query, the best first.

    Gallery item j matches query i when they are the same row, or rows with an equal id: equal captions, or
    equal pictures. Where a match and another item are just as similar the other goes first, so that a
    collapsed model finds nothing. At no time there are more than `TILE` x `TILE` similarities.

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
    rows = torch.arange(len(queries), device=queries.device) if rows is None else rows.to(queries.device)
    sizes = [queries.shape[-1]]
    asking, asked = _nested(queries, sizes)[rows], _nested(gallery, sizes)
    lines, items = _find_matches(match_ids, rows, len(gallery))
    ahead = _AheadOfMatches(lines, _match_similarities(asking, asked, lines, items))
    for tile_rows, _, (cosines,) in _tiles(asking, asked, lines, items):
        ahead.count(0, cosines, tile_rows.start)
    return ahead.ranks(0)


@dataclass(frozen=True)
class _Nested:
    """Embeddings (N, D), and the lengths (K, N) of their prefixes of K sizes, the smallest first."""

    embeds: Tensor
    lengths: Tensor
    sizes: Sequence[int]

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: Tensor | slice) -> "_Nested":
        return _Nested(self.embeds[rows], self.lengths[:, rows], self.sizes)


def _nested(embeds: Tensor, sizes: Sequence[int]) -> _Nested:
    if not all(rows.isfinite().all() for rows in embeds.split(TILE)):  # of all at once would take a copy of them
        raise ValueError("embeddings are NaN or infinite, so that nothing can be ranked: training has diverged")
    for size in sizes:
        truncate_embeds(embeds[:0], size)  # refuses what is no size
    embeds = at_least_float32(embeds)
    lengths = [embeds[:, :size].norm(dim=1).clamp_min(1e-12) for size in sizes]  # as F.normalize does
    return _Nested(embeds, torch.stack(lengths), sizes)


def _cosines(queries: _Nested, gallery: _Nested) -> Iterator[Tensor]:
    """Similarities (Q, G) at one size after the other; each is overwritten by the next."""
    products = queries.embeds.new_zeros(len(queries), len(gallery))
    cosines = torch.empty_like(products)
    for i, (start, end) in enumerate(pairwise([0, *queries.sizes])):
        products.addmm_(queries.embeds[:, start:end], gallery.embeds[:, start:end].T)
        torch.div(products, gallery.lengths[i], out=cosines)
        yield cosines.div_(queries.lengths[i].unsqueeze(1))


def _find_matches(match_ids: Sequence[Tensor], rows: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """All matches as pairs: numbers of `rows` (P,), in ascending order, and the items (P,) that match them."""
    numbers = torch.arange(len(rows), device=rows.device)
    pairs = [numbers * num_items + rows]
    for ids in match_ids:
        ordered, items = ids.to(rows.device).sort()
        wanted = ids.to(rows.device)[rows]
        start = torch.searchsorted(ordered, wanted)
        count = torch.searchsorted(ordered, wanted, right=True) - start
        lines = numbers.repeat_interleave(count)
        nth = torch.arange(len(lines), device=rows.device) - (count.cumsum(0) - count)[lines]
        pairs.append(lines * num_items + items[start[lines] + nth])
    distinct = torch.cat(pairs).unique()
    return distinct // num_items, distinct % num_items


def _match_similarities(queries: _Nested, gallery: _Nested, lines: Tensor, items: Tensor) -> Tensor:
    """Similarities (K, P) of the pairs that match."""
    similarities = queries.embeds.new_empty(len(queries.sizes), len(lines))
    for rows, window in _windows(lines, len(queries), min(TILE, _MATCHED_ROWS)):
        columns, places = items[window].unique(return_inverse=True)
        for part in _slices(len(columns), TILE):
            here = _within(places, part)
            row, column = lines[window][here] - rows.start, places[here] - part.start
            for i, cosines in enumerate(_cosines(queries[rows], gallery[columns[part]])):
                similarities[i, window][here] = cosines[row, column]
    return similarities


def _tiles(
    queries: _Nested, gallery: _Nested, lines: Tensor, items: Tensor
) -> Iterator[tuple[slice, slice, Iterator[Tensor]]]:
    """Similarities tile by tile, and of each size by size, without those of the pairs that match."""
    nothing = torch.tensor(_NO_COSINE, dtype=queries.embeds.dtype, device=lines.device)
    for rows, window in _windows(lines, len(queries), TILE):
        for columns in _slices(len(gallery), TILE):
            here = _within(items[window], columns)
            matches = lines[window][here] - rows.start, items[window][here] - columns.start
            sizes = _cosines(queries[rows], gallery[columns])
            yield rows, columns, (cosines.index_put_(matches, nothing) for cosines in sizes)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _windows(lines: Tensor, num_lines: int, step: int) -> list[tuple[slice, slice]]:
    """Every `step` lines, and where the pairs of these lines are."""
    tiles = _slices(num_lines, step)
    stops = torch.searchsorted(lines, torch.tensor([tile.stop for tile in tiles], device=lines.device))
    return list(zip(tiles, map(slice, [0, *stops[:-1].tolist()], stops.tolist()), strict=True))


def _within(numbers: Tensor, part: slice) -> Tensor:
    return ((numbers >= part.start) & (numbers < part.stop)).nonzero().flatten()


class _AheadOfMatches:
    """How many items that do not match are at least as similar to a query as each of its matches.

    Args:
        lines: The queries (P,) of the pairs that match, in ascending order; each has one at least.
        similarities: Of these pairs (K, P), at K sizes.
    """

    def __init__(self, lines: Tensor, similarities: Tensor) -> None:
        self.lines = lines
        self.thresholds = similarities - _ROUNDING
        self.ahead = torch.zeros_like(similarities)
        self.num_matches = lines.bincount()
        self.is_first = lines.diff(prepend=lines.new_tensor([-1])) > 0
        self.windows = {tile.start: window for tile, window in _windows(lines, len(self.num_matches), TILE)}

    def count(self, size: int, cosines: Tensor, start: int) -> None:
        """Add those of a tile (Q, G) at size number `size`, whose first row is query `start`."""
        window = self.windows[start]
        lines, is_first = self.lines[window] - start, self.is_first[window]
        thresholds, ahead = self.thresholds[size, window], self.ahead[size, window]
        if len(lines) == len(cosines):  # a match each
            ahead += _count_reaching(cosines, thresholds)
            return
        ahead[is_first] += _count_reaching(cosines, thresholds[is_first])
        cosines, more = cosines.contiguous(), (~is_first).nonzero().flatten()
        if len(more) > _MANY_MATCHES * len(cosines):
            ahead[more] += _count_reaching_by_sorting(cosines, lines[more], thresholds[more])
            return
        for part in more.split(len(cosines)):
            ahead[part] += _count_reaching(cosines[lines[part]], thresholds[part])

    def ranks(self, size: int) -> Tensor:
        """Ranks (Q, M) of the matches, the best first; infinity where a query has fewer than M."""
        order = self.ahead[size].argsort()
        order = order[self.lines[order].argsort(stable=True)]
        first = self.num_matches.cumsum(0) - self.num_matches
        place = torch.arange(len(self.lines), device=order.device) - first[self.lines]
        ranks = self.ahead.new_full((len(first), int(self.num_matches.max())), float("inf"), dtype=torch.double)
        ranks[self.lines, place] = self.ahead[size, order].double() + place + 1
        return ranks


def _count_reaching(cosines: Tensor, thresholds: Tensor) -> Tensor:
    """How many of each row (Q, G) reach the row's threshold (Q,)."""
    reaching = torch.empty_like(cosines)  # numbers, which sum up several times as fast as booleans
    return torch.ge(cosines, thresholds.unsqueeze(1), out=reaching).sum(dim=1)


def _count_reaching_by_sorting(cosines: Tensor, lines: Tensor, thresholds: Tensor) -> Tensor:
    """How many of row `lines[p]` reach `thresholds[p]` (P,), for many p."""
    # Rows 4 apart are one ordered sequence: cosines are within 2 of 0.
    shift = 4.0 * torch.arange(len(cosines), dtype=torch.double, device=lines.device)
    ordered = (cosines.sort(dim=1).values + shift.unsqueeze(1)).flatten()
    below = torch.searchsorted(ordered, thresholds + shift[lines])
    return ((lines + 1) * cosines.shape[1] - below).to(thresholds.dtype)


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
