"""The closed form of an alignment: ridge-regularised canonical correlation analysis, chosen on pairs held out.

Of features x and y with covariances Cx, Cy and Cxy the directions are those of the singular value decomposition
U S V' = (Cx + rx I)^(-1/2) Cxy (Cy + ry I)^(-1/2), sorted by their correlations S: every prefix of an embedding is the
best one of its size (Hotelling 1936; the ridge is Vinod's, 1976). Each direction is weighted by S^p, as CSA does with
p = 1 (arXiv:2410.07610).

The roots and the decomposition are taken in the principal axes of each side: an eigendecomposition per side serves
every ridge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from modeling_edgeglass.matryoshka import truncate_embeds
from training.moments import Moments
from training.retrieval import retrieval_metrics

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # by the mean variance of an axis; the best differ tenfold between data
POWERS = (0.5, 1.0, 1.5, 2.0, 3.0)

_SMALLEST = 1e-10  # variance of an axis by the largest one's; below it is rounding
_CONSTANT = 1e-12  # variance by the squared mean; below it is what a tower in float32 gives for equal input
_NEGLIGIBLE = 0.01  # variance of an axis by the ridge; below it is passed over where ridges are compared


class NoVarianceError(ValueError):
    """All features of one side are the same; the message says of which."""


@dataclass(frozen=True)
class PrincipalAxes:
    """Where the features of one side vary.

    Args:
        mean: Of the features (D,).
        axes: Orthonormal columns (D, K), for each variance above rounding.
        variances: Along them (K,), falling.
        mean_variance: Over all D dimensions: what a ridge is relative to.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor
    mean_variance: float

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> "PrincipalAxes":
        """The axes of a covariance (D, D); none where it is zero."""
        variances, axes = torch.linalg.eigh(covariance)  # in float64: in float32 it may fail to converge
        variances, axes = variances.flip(0), axes.flip(1)
        is_real = (variances > 0) & (variances > _SMALLEST * variances[0])
        if covariance.trace() <= _CONSTANT * mean.square().sum():
            is_real = torch.zeros_like(is_real)
        return cls(mean, axes[:, is_real], variances[is_real], float(covariance.diagonal().mean()))

    def leading(self, least_variance: float) -> "PrincipalAxes":
        """The axes alone whose variance is at least `least_variance` times the mean."""
        is_kept = self.variances >= least_variance * self.mean_variance
        return PrincipalAxes(self.mean, self.axes[:, is_kept], self.variances[is_kept], self.mean_variance)

    def whitening(self, ridge: float) -> Tensor:
        """Factors (K,) that bring the axes to the same variance, as far as the ridge lets them."""
        return (self.variances + ridge * self.mean_variance).rsqrt()

    def affine_map(self, weight: Tensor) -> "AffineMap":
        """The map of features that `weight` (K, L) makes of their coordinates along the axes."""
        energy = float((self.variances.unsqueeze(1) * weight.square()).sum())
        return AffineMap((self.axes @ weight).T, self.mean, self.mean_variance * len(self.mean), energy)


@dataclass(frozen=True)
class Directions:
    """Canonical directions, as columns in whatever coordinates they were solved in.

    Args:
        x, y: (Kx, K), (Ky, K), the most correlated first.
        correlations: 0..1, falling (K,); with a ridge they are smaller than on the data.
    """

    x: Tensor
    y: Tensor
    correlations: Tensor

    def weighted(self, power: float) -> tuple[Tensor, Tensor]:
        """Both sides, each direction times its `correlation ** power`."""
        weights = self.correlations**power
        return self.x * weights, self.y * weights


def canonical_directions(
    x: PrincipalAxes, y: PrincipalAxes, cross_covariance: Tensor, ridge: tuple[float, float]
) -> Directions:
    """Solve for the directions, in the coordinates of the axes.

    Args:
        x, y: Axes of both sides.
        cross_covariance: In these axes (Kx, Ky).
        ridge: Of x and of y, by their mean variances; 0 or more.
    """
    whitening_x, whitening_y = x.whitening(ridge[0]).unsqueeze(1), y.whitening(ridge[1]).unsqueeze(1)
    left, correlations, right = _singular_vectors(whitening_x * cross_covariance * whitening_y.T)
    return Directions(whitening_x * left, whitening_y * right, correlations)


def _singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors (m, K), values (K,) and right vectors (n, K) of a matrix (m, n), without those that are rounding.

    By the eigendecomposition of the smaller product: faster, and it converges where LAPACK's own may not. Values
    below 1e-7 of the largest are lost by squaring; as correlations they are none.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = _singular_vectors(matrix.T)
        return left, values, right
    squares, right = torch.linalg.eigh(matrix.T @ matrix)
    squares, right = squares.flip(0), right.flip(1)
    is_real = squares > 1e-14 * squares[:1].clamp_min(1e-30)
    right, values = right[:, is_real], squares[is_real].sqrt()
    return matrix @ right / values, values.clamp(max=1.0), right


@dataclass(frozen=True)
class AffineMap:
    """features -> weight @ (features - mean).

    Args:
        weight: (K, D).
        mean: (D,).
        variance: Of the features it was solved for, in all dimensions together.
        energy: Mean squared length of what it makes of them.
    """

    weight: Tensor
    mean: Tensor
    variance: float
    energy: float

    def __call__(self, features: Tensor) -> Tensor:
        """Map features (B, D) to (B, K)."""
        return (features.to(self.mean) - self.mean) @ self.weight.T


@dataclass(frozen=True)
class Setting:
    """What an alignment in closed form can be told.

    Args:
        columns: Leading columns of x and of y that are used: of statistics pooling the mean alone, or all.
        ridge: Of x and of y, by the mean variance; 0 or more.
        power: Of the correlations.
    """

    columns: tuple[int, int]
    ridge: tuple[float, float]
    power: float


class SpectralSolver:
    """Solves for any setting; what settings share is computed once.

    Args:
        moments: Of the pairs.
        negligible: Axes with a variance below this times the mean are passed over.

    Raises:
        NoVarianceError: From its methods, where all features of one side are the same.
    """

    def __init__(self, moments: Moments, negligible: float = 0.0) -> None:
        self.moments = moments.flush()
        self.negligible = negligible
        self._axes: dict[tuple[str, int], PrincipalAxes] = {}
        self._cross: dict[tuple[int, int], Tensor] = {}

    def axes(self, columns: tuple[int, int]) -> tuple[PrincipalAxes, PrincipalAxes]:
        """The principal axes of the leading columns of x and of y."""
        of = self.moments
        return (
            self._side("picture", columns[0], of.mean_x, of.xx),
            self._side("caption", columns[1], of.mean_y, of.yy),
        )

    def directions(self, columns: tuple[int, int], ridge: tuple[float, float]) -> Directions:
        """The canonical directions, in the coordinates of `axes(columns)`."""
        x, y = self.axes(columns)
        if columns not in self._cross:
            cross = self.moments.xy[: columns[0], : columns[1]] / self.moments.count
            self._cross[columns] = x.axes.T @ cross @ y.axes
        return canonical_directions(x, y, self._cross[columns], ridge)

    def solve(self, setting: Setting) -> tuple[AffineMap, AffineMap]:
        """The maps of both sides that a setting gives."""
        x, y = self.axes(setting.columns)
        to_x, to_y = self.directions(setting.columns, setting.ridge).weighted(setting.power)
        return x.affine_map(to_x), y.affine_map(to_y)

    def _side(self, name: str, columns: int, mean: Tensor, moments: Tensor) -> PrincipalAxes:
        if (name, columns) not in self._axes:
            axes = PrincipalAxes.of(mean[:columns], moments[:columns, :columns] / self.moments.count)
            if not len(axes.variances):
                raise NoVarianceError(name)
            self._axes[name, columns] = axes.leading(self.negligible)
        return self._axes[name, columns]


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
    for another. It is sought along one side after the other (its columns and ridge) until neither moves; the power is
    the best one at each place.

    Args:
        solver: Of the other pairs.
        held_out: The pairs.
        sizes: Matryoshka sizes that count.
    """

    def __init__(self, solver: SpectralSolver, held_out: HeldOutPairs, sizes: Sequence[int]) -> None:
        self.solver, self.held_out, self.sizes = solver, held_out, sizes
        self.scores: dict[Setting, float] = {}
        self._coordinates: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def best(self, grid: Grid) -> Setting:
        """The best setting of a grid."""
        sides_x = list(product(grid.columns_x, grid.ridges_x))
        sides_y = list(product(grid.columns_y, grid.ridges_y))
        x, y = sides_x[len(sides_x) // 2], sides_y[len(sides_y) // 2]
        while True:
            before = x, y
            y = max(sides_y, key=lambda side: self._best_power(x, side, grid.powers)[0])
            x = max(sides_x, key=lambda side: self._best_power(side, y, grid.powers)[0])
            if (x, y) == before:
                return self._best_power(x, y, grid.powers)[1]

    def embed(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """The held-out pairs as unit vectors (N, K), in float32."""
        directions = self.solver.directions(setting.columns, setting.ridge)
        return self._embed(setting.columns, directions, setting.power)

    def _best_power(
        self, x: tuple[int, float], y: tuple[int, float], powers: Sequence[float]
    ) -> tuple[float, Setting]:
        columns, ridge = (x[0], y[0]), (x[1], y[1])
        settings = [Setting(columns, ridge, power) for power in powers]
        if settings[0] not in self.scores:
            directions = self.solver.directions(columns, ridge)
            for setting in settings:
                self.scores[setting] = self._score(*self._embed(columns, directions, setting.power))
        best = max(settings, key=self.scores.__getitem__)
        return self.scores[best], best

    def _embed(self, columns: tuple[int, int], directions: Directions, power: float) -> tuple[Tensor, Tensor]:
        x, y = self._held_out_coordinates(columns)
        to_x, to_y = directions.weighted(power)
        return truncate_embeds(x @ to_x.float(), None), truncate_embeds(y @ to_y.float(), None)

    def _held_out_coordinates(self, columns: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The held-out features along the axes; in float32, which is enough to rank them."""
        if columns not in self._coordinates:
            x, y = self.solver.axes(columns)
            self._coordinates[columns] = (
                ((self.held_out.x[:, : columns[0]].double() - x.mean) @ x.axes).float(),
                ((self.held_out.y[:, : columns[1]].double() - y.mean) @ y.axes).float(),
            )
        return self._coordinates[columns]

    def _score(self, x: Tensor, y: Tensor) -> float:
        full = min(x.shape[1], max(self.sizes))
        sizes = [size for size in self.sizes if size < full]
        metrics = retrieval_metrics(x[:, :full], y[:, :full], sizes, [self.held_out.caption_ids])
        precisions = [value for name, value in metrics.items() if name[3:].startswith("_map")]
        return sum(precisions) / len(precisions)
