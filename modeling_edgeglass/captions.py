"""Telling equal captions of a batch from their token ids."""

import torch
from torch import Tensor


def hash_captions(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """One 64-bit integer per caption (B,), equal exactly where the real tokens are.

    A sum of mixed (token, position) pairs, positions counted from the first real token, so that padding on
    either side changes nothing. Two different captions of a batch of B collide with a chance of B^2 / 2^65.

    Args:
        input_ids: Token ids (B, L).
        attention_mask: 1 for a real token, 0 for padding (B, L); None takes all as real.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    positions = attention_mask.long().cumsum(dim=-1)  # (B, L)
    mixed = input_ids.long() * 0x1E3779B97F4A7C15 + positions * 0x3F58476D1CE4E5B9
    for shift in (30, 27, 31):  # the finaliser of SplitMix64 (Steele et al., OOPSLA 2014); int64 wraps
        mixed = (mixed ^ (mixed >> shift)) * 0x14D049BB133111EB
    return (mixed * attention_mask.long()).sum(dim=-1)
