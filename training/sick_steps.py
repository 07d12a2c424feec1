"""What is known of an optimizer step, in case its loss or gradient is NaN or infinite."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from training.errors import printable

_MAX_SHOWN = 16  # samples


@dataclass
class StepRecord:
    """The batches of one optimizer step on this rank."""

    losses: list[Tensor] = field(default_factory=list)
    sample_ids: list[str] = field(default_factory=list)
    grad_norm: Any = 0.0
    buffers_before: Mapping[str, Tensor] = field(default_factory=dict)  # running statistics, where needed

    def loss_is_finite(self) -> bool:
        """Whether every loss of this rank is."""
        return all(math.isfinite(float(loss)) for loss in self.losses)

    def is_finite(self, *, check_gradient: bool) -> bool:
        """Whether losses and gradient are; with fp16 an infinite gradient is for the loss scaler to handle."""
        return self.loss_is_finite() and (not check_gradient or math.isfinite(float(self.grad_norm)))

    def describe(self) -> str:
        """Losses, gradient and samples, as words of a message."""
        shown = ", ".join(map(printable, self.sample_ids[:_MAX_SHOWN]))
        more = f" and {len(self.sample_ids) - _MAX_SHOWN} more" if len(self.sample_ids) > _MAX_SHOWN else ""
        loss = ", ".join(f"{float(loss):g}" for loss in self.losses)
        return f"the loss is {loss} and the gradient's norm {float(self.grad_norm):g} (samples {shown}{more})"


def describe_sick_step(record: StepRecord, world_size: int) -> str:
    """What is wrong with a step, and with which samples; a collective.

    The gradient is already the mean over all ranks, so that it is sick on every one. The ranks that speak are those
    whose own loss is not finite, and all of them only where that is nobody's.
    """
    if world_size == 1:
        return record.describe()
    told: list[Any] = [None] * world_size
    dist.all_gather_object(told, (record.loss_is_finite(), record.describe()))
    sick = [rank for rank, (is_finite, _) in enumerate(told) if not is_finite]
    return "; ".join(f"rank {rank}: {told[rank][1]}" for rank in sick or range(world_size))
