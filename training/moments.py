"""Running means and second moments of pairs of vectors, in memory that does not grow with their number."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

# So many rows are multiplied at a time: with fewer, reading and writing the products takes longer than computing them.
_ROWS = 1024
_COLUMNS = 512  # that are multiplied by all behind them at a time


@dataclass
class Moments:
    """Count, means and centred second moments of pairs (x, y), in float64.

    Rows are centred around their own mean and merged by the update of Chan, Golub and LeVeque (1979), so that a mean
    far from zero costs no digits.

    Args:
        size_x: Width of x.
        size_y: Width of y.

    Attributes:
        count: Pairs so far.
        mean_x, mean_y: Their means (size_x,), (size_y,).
        xx, yy, xy: Sums of products of what is left without the means (size_x, size_x), (size_y, size_y),
            (size_x, size_y).
    """

    size_x: int
    size_y: int
    count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.mean_x, self.mean_y = _zeros(self.size_x), _zeros(self.size_y)
        self.xx = _zeros(self.size_x, self.size_x)
        self.yy = _zeros(self.size_y, self.size_y)
        self.xy = _zeros(self.size_x, self.size_y)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._is_half = False  # xx and yy lack their lower halves

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in pairs: rows of x (B, size_x) and y (B, size_y)."""
        self._waiting.append((x.double().cpu(), y.double().cpu()))
        if sum(len(rows) for rows, _ in self._waiting) >= _ROWS:
            self._merge_waiting()

    def flush(self) -> "Moments":
        """Compute what still waits for more rows; before that the attributes lack it."""
        self._merge_waiting()
        if self._is_half:
            for moments in (self.xx, self.yy):
                moments.copy_(moments.triu() + moments.triu(1).T)
            self._is_half = False
        return self

    def _merge_waiting(self) -> None:
        if self._waiting:
            x, y = (torch.cat(rows) for rows in zip(*self._waiting, strict=True))
            self._waiting = []
            for start in range(0, len(x), _ROWS):
                self._merge_rows(x[start : start + _ROWS], y[start : start + _ROWS])

    def _merge_rows(self, x: Tensor, y: Tensor) -> None:
        new, total = len(x), self.count + len(x)
        mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
        shift_x, shift_y = mean_x - self.mean_x, mean_y - self.mean_y
        # The distance of the means is one more row of what is multiplied.
        weight = (self.count * new / total) ** 0.5
        x = torch.cat([x - mean_x, weight * shift_x.unsqueeze(0)])
        y = torch.cat([y - mean_y, weight * shift_y.unsqueeze(0)])
        _add_own_products(self.xx, x)
        _add_own_products(self.yy, y)
        self.xy.addmm_(x.T, y)
        self._is_half = True
        self.mean_x += shift_x * new / total
        self.mean_y += shift_y * new / total
        self.count = total

    def is_finite(self) -> bool:
        """Whether no pair so far has a value that is NaN or infinite."""
        self.flush()
        return bool(self.xx.diagonal().isfinite().all() and self.yy.diagonal().isfinite().all())

    def merge_ranks(self, device: torch.device) -> "Moments":
        """The moments of the pairs of all ranks, on every rank.

        Args:
            device: Where the collectives of the process group run.
        """
        self.flush()
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return self
        own_count, own_x, own_y = self.count, self.mean_x, self.mean_y
        self.count = int(_summed(torch.tensor(float(own_count), dtype=torch.float64), device))
        self.mean_x = _summed(own_x * own_count, device) / max(1, self.count)
        self.mean_y = _summed(own_y * own_count, device) / max(1, self.count)
        x, y = own_x - self.mean_x, own_y - self.mean_y
        self.xx = _summed(self.xx.addr_(x, x, alpha=own_count), device)
        self.yy = _summed(self.yy.addr_(y, y, alpha=own_count), device)
        self.xy = _summed(self.xy.addr_(x, y, alpha=own_count), device)
        return self

    def and_rows(self, x: Tensor, y: Tensor) -> "Moments":
        """These moments with further pairs, as a copy."""
        self.flush()
        merged = Moments(self.size_x, self.size_y)
        merged.count = self.count
        merged.mean_x, merged.mean_y = self.mean_x.clone(), self.mean_y.clone()
        merged.xx, merged.yy, merged.xy = self.xx.clone(), self.yy.clone(), self.xy.clone()
        merged.add(x, y)
        return merged.flush()


def _add_own_products(total: Tensor, rows: Tensor) -> None:
    """Add rows' rows (D, D), which is symmetric, to the upper half of `total`, in less than half the time."""
    for start in range(0, len(total), _COLUMNS):
        end = start + _COLUMNS
        total[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])


def _zeros(*size: int) -> Tensor:
    return torch.zeros(*size, dtype=torch.float64)


def _summed(values: Tensor, device: torch.device) -> Tensor:
    shared = values.to(device)
    dist.all_reduce(shared)
    return shared.cpu()
