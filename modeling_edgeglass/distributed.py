"""Gathering over ranks; on one process every function is the identity."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process' place among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_with_grad(rows: Tensor) -> Tensor:
    """Rows (B, ...) of every rank as (world size x B, ...), in the order of ranks; gradients flow back to all.

    The backward pass sums over the ranks, so that a loss that each rank takes as the mean over its own rows
    gets, after DDP's averaging, the gradient of one process with the whole batch.
    """
    return _GatherWithGrad.apply(rows) if world_size() > 1 else rows


def gather(rows: Tensor) -> Tensor:
    """Rows (B, ...) of every rank as (world size x B, ...), without gradients."""
    if world_size() == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        return gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.num_rows : (rank() + 1) * ctx.num_rows]
