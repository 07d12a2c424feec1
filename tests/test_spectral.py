"""The closed form: against a naive solution, and whatever the data."""

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA

from training.moments import Moments
from training.spectral import AffineMap, NoVarianceError, PrincipalAxes, Setting, SpectralSolver
from training.spectral_search import Grid, HeldOutPairs, SettingSearch

X, Y, N = 9, 6, 400


def pairs(count: int = N, noise: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs that share four hidden numbers of different strength."""
    fixed, generator = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    to_x, to_y = (torch.randn(4, size, generator=fixed, dtype=torch.float64) for size in (X, Y))
    hidden = torch.randn(count, 4, generator=generator, dtype=torch.float64) * torch.tensor([4.0, 3.0, 2.0, 1.0])
    x, y = (torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (X, Y))
    return 1 + hidden @ to_x + noise * x, hidden @ to_y - 2 + noise * y


def moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    found = Moments(x.shape[1], y.shape[1])
    found.add(x, y)
    return found


def solver(x: torch.Tensor, y: torch.Tensor) -> SpectralSolver:
    return SpectralSolver(moments(x, y))


def naive_embeds(x: torch.Tensor, y: torch.Tensor, ridge: tuple[float, float], power: float) -> list[torch.Tensor]:
    """S^p U' Wx (x - mean) and S^p V' Wy (y - mean), by dense roots and LAPACK's own decomposition."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)

    def inverse_root(values: torch.Tensor, ridge: float) -> torch.Tensor:
        covariance = values.T @ values / len(values)
        covariance += ridge * covariance.trace() / len(covariance) * torch.eye(len(covariance), dtype=torch.float64)
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        return vectors @ torch.diag(eigenvalues.rsqrt()) @ vectors.T

    root_x, root_y = inverse_root(x, ridge[0]), inverse_root(y, ridge[1])
    left, correlations, right = torch.linalg.svd(root_x @ (x.T @ y / len(x)) @ root_y, full_matrices=False)
    return [x @ root_x @ left * correlations**power, y @ root_y @ right.T * correlations**power]


@pytest.mark.parametrize("ridge", [(0.0, 0.0), (0.03, 10.0), (1.0, 0.3)])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_similarities_are_those_of_a_naive_dense_solution_at_every_size(ridge: tuple[float, float], power: float):
    x, y = pairs()
    to_x, to_y = solver(x, y).solve(Setting((X, Y), ridge, power))
    expected_x, expected_y = naive_embeds(x, y, ridge, power)
    for size in range(1, Y + 1):  # directions have no sign of their own, products of both sides have none
        expected = expected_x[:, :size] @ expected_y[:, :size].T
        torch.testing.assert_close(to_x(x)[:, :size] @ to_y(y)[:, :size].T, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(to_x(x)[:, :size] @ to_x(x)[:, :size].T,
                                   expected_x[:, :size] @ expected_x[:, :size].T, rtol=1e-8, atol=1e-8)  # fmt: skip


def test_without_ridge_it_is_scikit_learns_canonical_correlation_analysis():
    x, y = pairs()
    peer_x, peer_y = CCA(n_components=4, scale=False, max_iter=5000, tol=1e-12).fit_transform(x.numpy(), y.numpy())
    to_x, to_y = solver(x, y).solve(Setting((X, Y), (0.0, 0.0), 0.0))
    correlations = solver(x, y).directions((X, Y), (0.0, 0.0)).correlations
    for i in range(4):
        for ours, peers in ((to_x(x)[:, i], peer_x[:, i]), (to_y(y)[:, i], peer_y[:, i])):
            assert abs(np.corrcoef(ours.numpy(), peers)[0, 1]) == pytest.approx(1, abs=1e-4)
        assert float(correlations[i]) == pytest.approx(np.corrcoef(peer_x[:, i], peer_y[:, i])[0, 1], abs=1e-6)


def test_directions_of_whitened_sides_are_uncorrelated_and_sorted():
    x, y = pairs()
    found = solver(x, y)
    to_x, _ = found.solve(Setting((X, Y), (0.0, 0.0), 0.0))
    torch.testing.assert_close(torch.cov(to_x(x).T, correction=0), torch.eye(Y, dtype=torch.float64))
    correlations = found.directions((X, Y), (0.0, 0.0)).correlations
    assert torch.equal(correlations, correlations.sort(descending=True).values)


def test_order_and_batches_of_pairs_change_nothing():
    x, y = pairs(1500)
    moments = Moments(X, Y)
    for start in range(0, 1500, 7):
        moments.add(x.flip(0)[start : start + 7], y.flip(0)[start : start + 7])
    setting = Setting((X, Y), (0.3, 1.0), 1.0)
    for ours, whole in zip(SpectralSolver(moments).solve(setting), solver(x, y).solve(setting), strict=True):
        torch.testing.assert_close(ours.weight.abs(), whole.weight.abs(), rtol=1e-8, atol=1e-8)


SICK = {
    "collinear": lambda x, y: (torch.cat([x, x[:, :3] * 2, x[:, :1]], dim=1), y.repeat(1, 3)),
    "constant columns": lambda x, y: (
        torch.cat([x, torch.ones(len(x), 5)], dim=1),
        y * torch.tensor([1, 0, 1, 0, 1, 1]),
    ),
    "fewer pairs than dimensions": lambda x, y: (x[:4], y[:4]),
    "two pairs": lambda x, y: (x[:2], y[:2]),
    "equal captions": lambda x, y: (x, y[:3].repeat(len(y) // 3 + 1, 1)[: len(y)]),
    "half precision": lambda x, y: (x.half(), y.half()),
    "tiny": lambda x, y: (x * 1e-30, y * 1e-30),
    "huge and tiny columns": lambda x, y: (x * torch.logspace(-12, 12, X), y),
    "one column": lambda x, y: (x[:, :1], y[:, :1]),
}


@pytest.mark.parametrize("ridge", [(0.0, 0.0), (0.03, 0.03), (10.0, 10.0)])
@pytest.mark.parametrize("sick", SICK)
def test_whatever_the_features_the_solution_is_finite(sick: str, ridge: tuple[float, float]):
    x, y = SICK[sick](*pairs())
    to_x, to_y = solver(x, y).solve(Setting((x.shape[1], y.shape[1]), ridge, 1.0))
    for solved, features in ((to_x, x), (to_y, y)):
        assert len(solved.weight) >= 1
        assert solved.weight.isfinite().all()
        assert solved(features).isfinite().all()
        assert 0 < solved.energy < float("inf")


def test_features_that_are_all_the_same_are_named():
    x, y = pairs()
    with pytest.raises(NoVarianceError, match="caption"):
        solver(x, torch.ones_like(y) * 0.1).solve(Setting((X, Y), (1.0, 1.0), 1.0))
    with pytest.raises(NoVarianceError, match="picture"):
        solver(torch.ones_like(x) * 0.1, y).solve(Setting((X, Y), (1.0, 1.0), 1.0))


def test_energy_and_variance_are_those_of_the_data():
    x, y = pairs()
    to_x, _ = solver(x, y).solve(Setting((X, Y), (1.0, 0.3), 1.5))
    assert to_x.energy == pytest.approx(float(to_x(x).square().sum(dim=1).mean()))
    assert to_x.variance == pytest.approx(float((x - x.mean(dim=0)).square().sum(dim=1).mean()))


def held_out(count: int = 100, noise: float = 0.5) -> HeldOutPairs:
    x, y = pairs(count, noise, seed=1)
    return HeldOutPairs(x, y, torch.arange(count))


def test_the_search_ends_where_no_side_can_do_better():
    x, y = pairs(noise=2.0)
    grid = Grid([4, X], [3, Y])
    search = SettingSearch(moments(x, y), held_out(noise=2.0), [2, 4], grid)
    best = search.best()
    found = search.scores[best]
    (columns_x, columns_y), (ridge_x, ridge_y) = best.columns, best.ridge
    neighbours = [
        *(((columns, columns_y), best.ridge) for columns in grid.columns_x),
        *(((columns_x, columns), best.ridge) for columns in grid.columns_y),
        *((best.columns, (ridge, ridge_y)) for ridge in grid.ridges_x),
        *((best.columns, (ridge_x, ridge)) for ridge in grid.ridges_y),
    ]
    for columns, ridge in neighbours:
        assert all(search.scores[Setting(columns, ridge, power)] <= found for power in grid.powers)


def test_noise_wants_a_ridge_and_columns_of_noise_are_left_out():
    """Of forty pairs, with thirty columns of noise as strong as the rest behind those that say something."""
    generator = torch.Generator().manual_seed(3)
    x, y = pairs(40)
    fresh = held_out(200)
    noisy = [
        torch.cat([v, 5 * torch.randn(len(v), 30, generator=generator, dtype=torch.float64)], 1) for v in (x, fresh.x)
    ]
    noisy_pairs = HeldOutPairs(noisy[1], fresh.y, fresh.caption_ids)

    def search(grid: Grid) -> SettingSearch:
        return SettingSearch(moments(noisy[0], y), noisy_pairs, [2, 4], grid)

    assert search(Grid([X, X + 30], [Y])).best().columns == (X, Y)
    searches = [search(Grid([X + 30], [Y], [ridge], [ridge])) for ridge in (0.0, 0.3)]
    without, with_ridge = (found.scores[found.best()] for found in searches)
    assert with_ridge > without


def test_a_setting_that_is_given_is_taken():
    search = SettingSearch(moments(*pairs()), held_out(), [2, 4], Grid([X], [Y], [0.5], [2.0], [1.25]))
    assert search.best() == Setting((X, Y), (0.5, 2.0), 1.25)


@pytest.mark.parametrize("ridge", [(0.3, 1.0), (0.0, 1.0)])
def test_held_out_embeddings_are_those_of_the_solution(ridge: tuple[float, float]):
    pairs_out, setting = held_out(), Setting((5, Y), ridge, 1.5)
    grid = Grid([5], [Y], [ridge[0]], [ridge[1]], [1.5])
    x, y = SettingSearch(moments(*pairs()), pairs_out, [2, 4], grid).embed(setting)
    to_x, to_y = solver(*pairs()).solve(setting)
    expected_x, expected_y = to_x(pairs_out.x[:, :5]), to_y(pairs_out.y)
    expected = torch.nn.functional.normalize(expected_x, dim=1) @ torch.nn.functional.normalize(expected_y, dim=1).T
    torch.testing.assert_close(x @ y.T, expected.float(), rtol=1e-4, atol=1e-4)


def test_float32_that_does_not_converge_is_decomposed_in_float64(monkeypatch: pytest.MonkeyPatch):
    real, seen = torch.linalg.eigh, []

    def fail_in_float32(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError
        return real(matrix)

    found, setting = moments(*pairs()), Setting((X, Y), (0.3, 1.0), 1.0)
    expected = SpectralSolver(found, dtype=torch.float32).directions(setting.columns, setting.ridge)
    monkeypatch.setattr(torch.linalg, "eigh", fail_in_float32)
    directions = SpectralSolver(found, dtype=torch.float32).directions(setting.columns, setting.ridge)
    assert torch.float64 in seen
    assert directions.correlations.dtype == torch.float32
    torch.testing.assert_close(directions.correlations, expected.correlations, rtol=1e-3, atol=1e-4)


def test_axes_that_are_passed_over_vary_less_than_told():
    axes = PrincipalAxes.of(torch.zeros(4), torch.diag(torch.tensor([4.0, 2.0, 1e-3, 0.0], dtype=torch.float64)))
    assert axes.variances.tolist() == [4.0, 2.0, 1e-3]
    assert axes.leading(0.01).variances.tolist() == [4.0, 2.0]


def test_an_affine_map_subtracts_its_mean_first():
    solved = AffineMap(torch.tensor([[2.0, 0.0]]), torch.tensor([1.0, 5.0]), 1.0, 1.0)
    assert solved(torch.tensor([[3.0, 7.0]])).tolist() == [[4.0]]
