"""Matryoshka embeddings: every prefix of a vector is an embedding of its own (arXiv:2205.13147)."""

import torch.nn.functional as F
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """`values` as they are, or in float32 where they are narrower."""
    return values if values.dtype.itemsize >= 4 else values.float()


def check_truncate_dim(truncate_dim: int, dim: int) -> None:
    """Raise a ValueError unless embeddings of size `dim` have a prefix of size `truncate_dim`."""
    is_integer = isinstance(truncate_dim, int) and not isinstance(truncate_dim, bool)
    if not (is_integer and 0 < truncate_dim <= dim):
        raise ValueError(f"truncate_dim must be in 1..{dim}, got {truncate_dim!r}")


def truncate_embeds(embeds: Tensor, truncate_dim: int | None) -> Tensor:
    """Cut embeddings (..., D) to their first `truncate_dim` numbers, then scale them to unit length.

    Cut first, then normalise: a prefix of a unit vector is shorter than one, so that dot products of
    prefixes alone would not be cosines.

    Args:
        embeds: Embeddings (..., D), of any length.
        truncate_dim: Size kept, 1..D; None keeps all D.

    Returns:
        Unit vectors (..., truncate_dim), in float32 or wider.

    Raises:
        ValueError: `truncate_dim` is no integer in 1..D.
    """
    if truncate_dim is not None:
        check_truncate_dim(truncate_dim, embeds.shape[-1])
    # In half precision a squared norm can overflow, and F.normalize's eps of 1e-12 is zero.
    return F.normalize(at_least_float32(embeds[..., :truncate_dim]), dim=-1)
