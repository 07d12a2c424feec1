"""Second moments of a stream are those of the whole."""

import pytest
import torch

from training.moments import Moments

X, Y = 7, 4


def pairs(count: int, mean: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = mean + torch.randn(count, X, generator=generator, dtype=torch.float64)
    return x, x[:, :Y] ** 2 + torch.randn(count, Y, generator=generator, dtype=torch.float64)


def assert_moments_of(moments: Moments, x: torch.Tensor, y: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert moments.count == len(x)
    both = torch.cat([x, y], dim=1)
    expected = torch.cov(both.T, correction=0) * len(x)
    found = torch.cat([torch.cat([moments.xx, moments.xy], 1), torch.cat([moments.xy.T, moments.yy], 1)])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(torch.cat([moments.mean_x, moments.mean_y]), both.mean(dim=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 64, 5000])
def test_a_stream_has_the_moments_of_the_whole(batch_size: int):
    x, y = pairs(2500)
    moments = Moments(X, Y)
    for rows in zip(x.split(batch_size), y.split(batch_size), strict=True):
        moments.add(*rows)
    assert_moments_of(moments.flush(), x, y)


def test_the_order_of_pairs_changes_nothing():
    x, y = pairs(3000)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    moments = Moments(X, Y)
    moments.add(x[order], y[order])
    assert_moments_of(moments.flush(), x, y)


def test_a_mean_far_from_zero_costs_no_digits():
    x, y = pairs(3000)
    moments = Moments(X, Y)
    moments.add(x + 1e6, y - 1e6)
    moments.flush()
    torch.testing.assert_close(moments.xx, torch.cov(x.T, correction=0) * 3000, rtol=1e-6, atol=1e-4)


def test_further_pairs_are_taken_in_by_a_copy():
    x, y = pairs(300)
    moments = Moments(X, Y)
    moments.add(x[:100], y[:100])
    assert_moments_of(moments.and_rows(x[100:], y[100:]), x, y)
    assert_moments_of(moments.flush(), x[:100], y[:100])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_noticed(value: float):
    x, y = pairs(10)
    x[3, 2] = value
    moments = Moments(X, Y)
    moments.add(x, y)
    assert not moments.is_finite()
    assert Moments(X, Y).is_finite()
