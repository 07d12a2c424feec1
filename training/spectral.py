"""The closed form of an alignment: ridge-regularised canonical correlation analysis.

Of features x and y with covariances Cx, Cy and Cxy the directions are those of the singular value decomposition
U S V' = (Cx + rx I)^(-1/2) Cxy (Cy + ry I)^(-1/2), sorted by their correlations S: every prefix of an embedding is the
best one of its size (Hotelling 1936; the ridge is Vinod's, 1976). Each direction is weighted by S^p, as CSA does with
p = 1 (arXiv:2410.07610).

They are found as the axes of what a ridge regression on x explains of a whitened y. In the principal axes of each side
an eigendecomposition per side serves every ridge; `training.spectral_search` chooses among them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.moments import Moments

SAFE_RIDGE = 0.01  # by the mean variance; from here on no covariance is near to singular

_SMALLEST = 1e-10  # variance of an axis by the largest one's; below it is rounding
_CONSTANT = 1e-12  # variance by the squared mean; below it is what a tower in float32 gives for equal input


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
        variances, axes = _eigenvectors(covariance)
        is_real = (variances > 0) & (variances > max(_SMALLEST, _rounding(variances)) * variances[0])
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


@dataclass(frozen=True)
class Regression:
    """Ridge regression of y on x, in the principal axes of both.

    Args:
        coefficients: (Kx, Ky); or whatever they were multiplied by from the left (N, Kx).
        explained: What it explains of the covariance of y (Ky, Ky).
    """

    coefficients: Tensor
    explained: Tensor

    @classmethod
    def of(cls, x: PrincipalAxes, cross_covariance: Tensor, ridge: float) -> "Regression":
        """Solve for the coefficients.

        Args:
            x: Axes of x.
            cross_covariance: In the axes of both sides (Kx, Ky).
            ridge: By the mean variance of x; 0 or more.
        """
        coefficients = x.whitening(ridge).square().unsqueeze(1) * cross_covariance
        return cls(coefficients, cross_covariance.T @ coefficients)


def canonical_directions(regression: Regression, y: PrincipalAxes, ridge: float) -> Directions:
    """Canonical directions, in the coordinates of the axes; without those whose correlation is rounding.

    They are the axes of what x explains of a whitened y, and their squared correlations its variances. So another
    ridge of y costs one decomposition, and it converges where LAPACK's singular values may not.

    Args:
        regression: Of y on x.
        y: Axes of y.
        ridge: By the mean variance of y; 0 or more.
    """
    whitening = y.whitening(ridge).unsqueeze(1)
    squares, vectors = _eigenvectors(whitening * regression.explained * whitening.T)
    is_real = squares > _rounding(squares) * squares[:1].clamp_min(1e-30)
    to_y, correlations = whitening * vectors[:, is_real], squares[is_real].sqrt()
    return Directions(regression.coefficients @ to_y / correlations, to_y, correlations.clamp(max=1.0))


def _eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,), falling, and eigenvectors (D, D) of a symmetric matrix."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # in float32 it may fail to converge
        values, vectors = torch.linalg.eigh(matrix.double())
    return values.flip(0).to(matrix.dtype), vectors.flip(1).to(matrix.dtype)


def _rounding(values: Tensor) -> float:
    """Eigenvalues below this share of the largest are rounding."""
    return 50 * torch.finfo(values.dtype).eps


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
        dtype: To compute in; in float32 it takes half the time, and wants a ridge.

    Raises:
        NoVarianceError: From its methods, where all features of one side are the same.
    """

    def __init__(self, moments: Moments, negligible: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        self.moments = moments.flush()
        self.negligible, self.dtype = negligible, dtype
        self._axes: dict[tuple[str, int], PrincipalAxes] = {}
        self._cross: dict[tuple[int, int], Tensor] = {}

    def axes(self, columns: tuple[int, int]) -> tuple[PrincipalAxes, PrincipalAxes]:
        """The principal axes of the leading columns of x and of y."""
        of = self.moments
        return (
            self._side("picture", columns[0], of.mean_x, of.xx),
            self._side("caption", columns[1], of.mean_y, of.yy),
        )

    def regression(self, columns: tuple[int, int], ridge: float) -> Regression:
        """Of the leading columns of y on those of x, in the coordinates of `axes(columns)`."""
        x, y = self.axes(columns)
        if columns not in self._cross:
            cross = self.moments.xy[: columns[0], : columns[1]].to(self.dtype) / self.moments.count
            self._cross[columns] = x.axes.T @ cross @ y.axes
        return Regression.of(x, self._cross[columns], ridge)

    def directions(self, columns: tuple[int, int], ridge: tuple[float, float]) -> Directions:
        """The canonical directions, in the coordinates of `axes(columns)`."""
        return canonical_directions(self.regression(columns, ridge[0]), self.axes(columns)[1], ridge[1])

    def solve(self, setting: Setting) -> tuple[AffineMap, AffineMap]:
        """The maps of both sides that a setting gives.

        With a ridge, the regression on x is solved without its axes, whose decomposition takes far longer.
        """
        if setting.ridge[0] >= SAFE_RIDGE:
            return self._solve_without_axes(setting)
        x, y = self.axes(setting.columns)
        to_x, to_y = self.directions(setting.columns, setting.ridge).weighted(setting.power)
        return x.affine_map(to_x), y.affine_map(to_y)

    def _solve_without_axes(self, setting: Setting) -> tuple[AffineMap, AffineMap]:
        of, (columns_x, columns_y) = self.moments, setting.columns
        y = self._side("caption", columns_y, of.mean_y, of.yy)
        mean, covariance = self._mean_and_covariance("picture", columns_x, of.mean_x, of.xx)
        cross = of.xy[:columns_x, :columns_y].to(self.dtype) / of.count @ y.axes
        ridged = covariance.clone()
        ridged.diagonal().add_(setting.ridge[0] * covariance.diagonal().mean())
        coefficients = torch.cholesky_solve(cross, torch.linalg.cholesky(ridged))
        directions = canonical_directions(Regression(coefficients, cross.T @ coefficients), y, setting.ridge[1])
        to_x, to_y = directions.weighted(setting.power)
        energy = float((to_x * (covariance @ to_x)).sum())
        return AffineMap(to_x.T, mean, float(covariance.trace()), energy), y.affine_map(to_y)

    def _side(self, name: str, columns: int, mean: Tensor, moments: Tensor) -> PrincipalAxes:
        if (name, columns) not in self._axes:
            axes = PrincipalAxes.of(*self._mean_and_covariance(name, columns, mean, moments))
            self._axes[name, columns] = axes.leading(self.negligible)
        return self._axes[name, columns]

    def _mean_and_covariance(self, name: str, columns: int, mean: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Of the leading columns of a side.

        Raises:
            NoVarianceError: They are the same in all pairs.
        """
        mean, covariance = (
            mean[:columns].to(self.dtype),
            moments[:columns, :columns].to(self.dtype) / self.moments.count,
        )
        if covariance.trace() <= _CONSTANT * mean.square().sum():
            raise NoVarianceError(name)
        return mean, covariance
