"""InfoNCE at every Matryoshka size for about the price of the largest."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SHORTEST = 1e-12  # F.normalize's eps: a vector is divided by its length, or by this if it is shorter
_TILE = 1024  # queries, and gallery items, at a time: enough for fast matrix products; 4 MiB of float32
_MAX_KEPT_PRODUCTS = 1 << 24  # of all sizes together; more are computed again in the backward pass


def prefix_info_nce(
    queries: Tensor,
    gallery: Tensor,
    logit_scale: Tensor,
    dimensions: Sequence[int],
    *,
    query_captions: Tensor | None = None,
    gallery_captions: Tensor | None = None,
    first_match: int = 0,
    both_ways: bool = False,
) -> Tensor:
    """InfoNCE of prefixes, each cut and scaled to unit length, at several sizes.

    The dot products at one size are those at the size before plus the ones of the block of dimensions between,
    and squared lengths add up alike: all sizes together take the multiplications of the largest. The gradient
    goes back through the same blocks. Unit vectors are never stored, and logits for one tile at a time.

    Args:
        queries: Vectors (B, D) of any length, in float32 or wider.
        gallery: Vectors (G, D) of the same type.
        logit_scale: 1 / temperature, a positive scalar.
        dimensions: Sizes in rising order, each in 1..D.
        query_captions: One integer per query (B,): no gallery item with an equal one is its negative. None with
            `gallery_captions`: all are, but for the match.
        gallery_captions: One integer per gallery item (G,).
        first_match: Place of the first query's match in the gallery; those of the others follow in order.
        both_ways: Take the mean of this and the loss with the two sides exchanged. Wants B = G.

    Returns:
        One loss per size (K,), the mean over queries.
    """
    assert len(gallery) == len(queries) if both_ways else 0 <= first_match <= len(gallery) - len(queries)
    return _PrefixInfoNCE.apply(
        queries, gallery, logit_scale, tuple(dimensions), query_captions, gallery_captions, first_match, both_ways
    )


class _PrefixInfoNCE(torch.autograd.Function):
    """Logits are in bits, which is over ln 2: on a CPU 2**x takes a third of the time of e**x."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        gallery: Tensor,
        logit_scale: Tensor,
        dimensions: tuple[int, ...],
        query_captions: Tensor | None,
        gallery_captions: Tensor | None,
        first_match: int,
        both_ways: bool,
    ) -> Tensor:
        K, B, G = len(dimensions), len(queries), len(gallery)
        query_inverse, gallery_inverse = _inverse_lengths(queries, dimensions), _inverse_lengths(gallery, dimensions)
        query_scale = query_inverse * (logit_scale / math.log(2))  # (K, B)
        match_logits = queries.new_empty(K, B)
        query_totals = queries.new_full((K, B), -math.inf)  # log-sum-exp over the gallery
        gallery_totals = queries.new_full((K, G), -math.inf)  # and over the queries
        kept: list[Tensor] = []
        for tile in _tiles(B, G, first_match):
            products = _products(queries[tile.rows], gallery[tile.columns], dimensions)
            false_negatives = _false_negatives(query_captions, gallery_captions, tile)
            for k in range(K):
                logits = _logits(
                    products[k], query_scale[k, tile.rows], gallery_inverse[k, tile.columns], false_negatives
                )
                match_logits[k, tile.rows_with_match] = logits.diagonal(tile.diagonal)
                _logaddexp2_(query_totals[k, tile.rows], logits, dim=1)
                if both_ways:
                    _logaddexp2_(gallery_totals[k, tile.columns], logits, dim=0)
            if K * B * G <= _MAX_KEPT_PRODUCTS:
                kept += products
            del products, logits  # the next tile's take their memory
        inputs = queries, gallery, logit_scale, query_captions, gallery_captions
        ctx.save_for_backward(*inputs, query_inverse, gallery_inverse, query_totals, gallery_totals, *kept)
        ctx.dimensions, ctx.first_match, ctx.both_ways = dimensions, first_match, both_ways
        losses = (query_totals - match_logits).mean(dim=1)
        if both_ways:
            losses = (losses + (gallery_totals - match_logits).mean(dim=1)) / 2
        return losses * math.log(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, gallery, logit_scale, query_captions, gallery_captions = ctx.saved_tensors[:5]
        query_inverse, gallery_inverse, query_totals, gallery_totals, *kept = ctx.saved_tensors[5:]
        K, B, G = len(ctx.dimensions), len(queries), len(gallery)
        directions = 2 if ctx.both_ways else 1
        query_scale = query_inverse * (logit_scale / math.log(2))
        query_weight = query_inverse * (logit_scale * gradient / (directions * B)).unsqueeze(1)  # (K, B)
        d_queries, d_gallery = torch.zeros_like(queries), torch.zeros_like(gallery)
        query_radial, gallery_radial = torch.zeros_like(query_inverse), torch.zeros_like(gallery_inverse)
        with torch.autocast(queries.device.type, enabled=False):
            for number, tile in enumerate(_tiles(B, G, ctx.first_match)):
                rows, columns = tile.rows, tile.columns
                products = kept[number * K : (number + 1) * K]
                products = products or _products(queries[rows], gallery[columns], ctx.dimensions)
                false_negatives = _false_negatives(query_captions, gallery_captions, tile)
                d_block = torch.zeros_like(products[0])  # a block's products are part of its size and all larger ones
                for k, block in reversed(list(enumerate(_blocks(ctx.dimensions)))):
                    product = products.pop()  # of this size; its memory is free for the next
                    logits = _logits(product, query_scale[k, rows], gallery_inverse[k, columns], false_negatives)
                    # The gradient of a cross-entropy is its softmax, less one at the match.
                    d_logits = (logits - query_totals[k, rows, None]).exp2_()
                    if ctx.both_ways:
                        d_logits += logits.sub_(gallery_totals[k, columns]).exp2_()
                    d_logits.diagonal(tile.diagonal).sub_(directions)
                    d_products = d_logits.mul_(query_weight[k, rows, None]).mul_(gallery_inverse[k, columns])
                    radial = torch.mul(d_products, product, out=logits)
                    query_radial[k, rows] += radial.sum(dim=1)
                    gallery_radial[k, columns] += radial.sum(dim=0)
                    d_block += d_products
                    d_queries[rows, block].addmm_(d_block, gallery[columns, block])
                    d_gallery[columns, block].addmm_(d_block.T, queries[rows, block])
                del product, logits, radial, d_logits, d_products, d_block  # the next tile's take their memory
            _subtract_radial_(d_queries, queries, query_radial, query_inverse, ctx.dimensions)
            _subtract_radial_(d_gallery, gallery, gallery_radial, gallery_inverse, ctx.dimensions)
        return d_queries, d_gallery, query_radial.sum() / logit_scale, None, None, None, None, None


class _Tile(NamedTuple):
    """Some queries against some of the gallery: matches lie on a diagonal, if there are any."""

    rows: slice
    columns: slice
    diagonal: int
    rows_with_match: slice


def _tiles(num_queries: int, num_gallery: int, first_match: int) -> Iterator[_Tile]:
    for row in range(0, num_queries, _TILE):
        for column in range(0, num_gallery, _TILE):
            rows = slice(row, min(num_queries, row + _TILE))
            columns = slice(column, min(num_gallery, column + _TILE))
            start = max(row, columns.start - first_match)
            stop = max(start, min(rows.stop, columns.stop - first_match))
            yield _Tile(rows, columns, first_match + row - column, slice(start, stop))


def _blocks(dimensions: Sequence[int]) -> list[slice]:
    """What each size has over the one before."""
    return [slice(start, stop) for start, stop in zip((0, *dimensions), dimensions, strict=False)]


def _inverse_lengths(vectors: Tensor, dimensions: Sequence[int]) -> Tensor:
    """1 / length of every prefix (K, N) of vectors (N, D)."""
    lengths = torch.stack([torch.linalg.vector_norm(vectors[:, block], dim=1) for block in _blocks(dimensions)])
    return 1 / lengths.square().cumsum(dim=0).sqrt().clamp(min=_SHORTEST)


def _products(queries: Tensor, gallery: Tensor, dimensions: Sequence[int]) -> list[Tensor]:
    """Dot products (rows, columns) of the prefixes as they are, not scaled to unit length, at every size."""
    first, *others = _blocks(dimensions)
    products = [queries[:, first] @ gallery[:, first].T]
    for block in others:
        products.append(torch.addmm(products[-1], queries[:, block], gallery[:, block].T))
    return products


def _false_negatives(query_captions: Tensor | None, gallery_captions: Tensor | None, tile: _Tile) -> Tensor | None:
    """Where captions are equal outside of a pair (rows, columns)."""
    if query_captions is None or gallery_captions is None:
        return None
    equal = query_captions[tile.rows].unsqueeze(1) == gallery_captions[tile.columns]
    equal.diagonal(tile.diagonal).fill_(False)
    return equal


def _logits(products: Tensor, query_scale: Tensor, gallery_scale: Tensor, false_negatives: Tensor | None) -> Tensor:
    logits = products * query_scale.unsqueeze(1)
    logits *= gallery_scale
    return logits if false_negatives is None else logits.masked_fill_(false_negatives, -math.inf)


def _logaddexp2_(totals: Tensor, logits: Tensor, dim: int) -> None:
    """Add powers of two, summed over `dim`, to a total of which `totals` is the logarithm."""
    highest = logits.amax(dim, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)  # -inf - -inf is NaN
    sums = (logits - highest).exp2_().sum(dim)
    torch.logaddexp2(totals, sums.log2_() + highest.squeeze(dim), out=totals)


def _subtract_radial_(
    gradient: Tensor, vectors: Tensor, radial: Tensor, inverse_lengths: Tensor, dimensions: Sequence[int]
) -> None:
    """Take out of the gradient what would make a prefix longer: its length has no part in the loss.

    Args:
        gradient: As though lengths were constants (N, D).
        vectors: The vectors (N, D).
        radial: Dot product of each prefix with its own loss' gradient (K, N).
        inverse_lengths: 1 / length of every prefix (K, N).
        dimensions: The sizes (K,).
    """
    # A vector below the shortest is divided by a constant.
    factors = (radial * inverse_lengths.square()).masked_fill(inverse_lengths == 1 / _SHORTEST, 0.0)
    factors = factors.flip(0).cumsum(dim=0).flip(0)  # a block is part of its size and all larger ones
    for factor, block in zip(factors, _blocks(dimensions), strict=True):
        gradient[:, block].addcmul_(vectors[:, block], factor.unsqueeze(1), value=-1)
