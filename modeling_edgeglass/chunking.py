"""Batches that are too large for a tower at once."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_in_chunks(tower: nn.Module, chunk_size: int | None, *inputs: Tensor | None) -> Tensor:
    """`tower(*inputs)` for `chunk_size` samples at a time, with the memory of one chunk also for the backward pass.

    What GradCache does (Gao et al., arXiv:2101.06983): only embeddings are kept; in the backward pass each chunk is
    run again, with the same random draws, and takes the gradient of its embeddings. Here that is torch's activation
    checkpointing of each chunk, so that one backward call does it all, under DDP and autocast too. The price is a
    second forward pass of the tower. A batch norm that trains has the statistics of a chunk, not of the batch.

    Args:
        tower: Maps every sample by itself.
        chunk_size: Samples; None runs all at once.
        *inputs: Batches (B, ...), or None where the tower takes none.

    Returns:
        Its outputs (B, ...).
    """
    if chunk_size is None:
        return tower(*inputs)
    batch_size = next(len(batch) for batch in inputs if batch is not None)
    outputs = []
    for start in range(0, batch_size, chunk_size):
        chunk = [None if batch is None else batch[start : start + chunk_size] for batch in inputs]
        outputs.append(checkpoint(tower, *chunk, use_reentrant=False, context_fn=partial(_contexts, tower)))
    return torch.cat(outputs)


def _contexts(tower: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _keeping_statistics(tower)


@contextmanager
def _keeping_statistics(tower: nn.Module) -> Iterator[None]:
    """While a chunk is run again, running statistics that already took it in stay as they are."""
    norms = [module for module in tower.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    norms = [norm for norm in norms if norm.training and norm.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches
