"""What a closed form can be told, chosen by pairs that are held out of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_edgeglass.matryoshka import truncate_embeds
from training.moments import Moments
from training.retrieval import retrieval_metrics
from training.spectral import SAFE_RIDGE, Directions, Regression, Setting, SpectralSolver, canonical_directions

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # by the mean variance of an axis; the best differ tenfold between data
POWERS = (0.5, 1.0, 1.5, 2.0, 3.0)

_NEGLIGIBLE = 0.01  # variance of an axis by the smallest ridge; below it is passed over


@dataclass(frozen=True)
class HeldOutPairs:
    """Pairs that are in no moments, to choose by.

    Args:
        x, y: Features (N, Dx), (N, Dy).
        caption_ids: (N,), equal where the captions are.
    """

    x: Tensor
    y: Tensor
    caption_ids: Tensor


@dataclass(frozen=True)
class Grid:
    """The settings to choose from; a single value of each is a choice already made.

    Args:
        columns_x, columns_y: Leading columns of x and of y.
        ridges_x, ridges_y: Relative to the mean variance.
        powers: Of the correlations.
    """

    columns_x: Sequence[int]
    columns_y: Sequence[int]
    ridges_x: Sequence[float] = RIDGES
    ridges_y: Sequence[float] = RIDGES
    powers: Sequence[float] = POWERS

    @property
    def negligible(self) -> float:
        """Variance, by the mean, below which an axis makes no difference to any setting."""
        return _NEGLIGIBLE * min(*self.ridges_x, *self.ridges_y)


class SettingSearch:
    """Finds the setting under which held-out pairs find each other best.

    The score is the mean average precision, over both ways and all sizes: smoother than R@1, and no size is given up
    for another. Columns and ridges are sought one after the other until none moves; the power is the best one at each
    place. Computed in float32, which is enough to compare, unless a ridge is too small for it.

    Args:
        moments: Of the other pairs.
        held_out: The pairs.
        sizes: Matryoshka sizes that count.
        grid: The settings.

    Raises:
        NoVarianceError: From its methods, where all features of one side are the same.
    """

    def __init__(self, moments: Moments, held_out: HeldOutPairs, sizes: Sequence[int], grid: Grid) -> None:
        dtype = torch.float32 if min(*grid.ridges_x, *grid.ridges_y) >= SAFE_RIDGE else torch.float64
        self.solver = SpectralSolver(moments, grid.negligible, dtype)
        self.held_out, self.sizes, self.grid = held_out, sizes, grid
        self.scores: dict[Setting, float] = {}
        self._coordinates: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._predicted: dict[Any, Regression] = {}  # the latest alone

    def best(self) -> Setting:
        """The best setting of the grid."""
        grid = self.grid
        choices: list[Sequence[Any]] = [grid.columns_x, grid.columns_y, grid.ridges_y, grid.ridges_x]
        place = [values[len(values) // 2] for values in choices]
        while True:
            before = list(place)
            for i, values in enumerate(choices):
                tried = [[*place[:i], value, *place[i + 1 :]] for value in values]
                place = max(tried, key=lambda other: self._best_power(other)[0])
            if place == before:
                return self._best_power(place)[1]

    def embed(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """The held-out pairs as unit vectors (N, K), in float32."""
        return self._embed(setting.columns, self._directions(setting.columns, setting.ridge), setting.power)

    def _best_power(self, place: Sequence[Any]) -> tuple[float, Setting]:
        columns_x, columns_y, ridge_y, ridge_x = place
        columns, ridge = (columns_x, columns_y), (ridge_x, ridge_y)
        settings = [Setting(columns, ridge, power) for power in self.grid.powers]
        if settings[0] not in self.scores:
            directions = self._directions(columns, ridge)
            for setting in settings:
                self.scores[setting] = self._score(*self._embed(columns, directions, setting.power))
        best = max(settings, key=self.scores.__getitem__)
        return self.scores[best], best

    def _directions(self, columns: tuple[int, int], ridge: tuple[float, float]) -> Directions:
        """Canonical directions: of x the held-out pairs along them (N, K), which is quicker; of y themselves."""
        key = columns, ridge[0]
        if key not in self._predicted:
            regression = self.solver.regression(columns, ridge[0])
            x, _ = self._held_out_coordinates(columns)
            self._predicted = {key: Regression(x @ regression.coefficients, regression.explained)}
        _, y = self.solver.axes(columns)
        return canonical_directions(self._predicted[key], y, ridge[1])

    def _embed(self, columns: tuple[int, int], directions: Directions, power: float) -> tuple[Tensor, Tensor]:
        x, to_y = directions.weighted(power)
        _, y = self._held_out_coordinates(columns)
        return truncate_embeds(x.float(), None), truncate_embeds((y @ to_y).float(), None)

    def _held_out_coordinates(self, columns: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The held-out features along the axes."""
        if columns not in self._coordinates:
            x, y = self.solver.axes(columns)
            self._coordinates[columns] = (
                (self.held_out.x[:, : columns[0]].to(x.mean) - x.mean) @ x.axes,
                (self.held_out.y[:, : columns[1]].to(y.mean) - y.mean) @ y.axes,
            )
        return self._coordinates[columns]

    def _score(self, x: Tensor, y: Tensor) -> float:
        full = min(x.shape[1], max(self.sizes))
        sizes = [size for size in self.sizes if size < full]
        metrics = retrieval_metrics(x[:, :full], y[:, :full], sizes, [self.held_out.caption_ids])
        precisions = [value for name, value in metrics.items() if name[3:].startswith("_map")]
        return sum(precisions) / len(precisions)
