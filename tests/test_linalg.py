"""The solver against a float64 SVD, degenerate input included; the order statistic against a sort."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import energy_rank, truncate

from cart_hf.linalg import DecompositionError, MagnitudeHistogram, rank_for_energy, sum_of_low_rank
from cart_hf.linalg.low_rank import top_right_singular_vectors


def matrix(m: int, n: int, spectrum, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    u, v = np.linalg.qr(rng.standard_normal((m, m)))[0], np.linalg.qr(rng.standard_normal((n, n)))[0]
    k = min(m, n)
    return (u[:, :k] * spectrum(np.arange(1, k + 1))) @ v[:, :k].T


def low_rank(d: np.ndarray, k: int) -> np.ndarray:
    return sum_of_low_rank(torch.from_numpy(d.astype(np.float32))[None], [1.0], rank=k)[...].double().numpy()


SHAPES = [(96, 96), (200, 48), (48, 200), (5, 1), (1, 5), (1, 1)]
SPECTRA = {
    "power law": lambda i: i**-0.6,
    "exponential": lambda i: np.exp(-i / 5.0),
    "spike": lambda i: np.where(i == 1, 1e3, i**-2.0),
    "spike over a flat bulk": lambda i: np.where(i == 1, 1e3, 1.0 - 1e-4 * i),
    "rank deficient": lambda i: np.where(i <= 3, 4.0 - i, 0.0),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_update_is_the_truth_within_1e6(shape, spectrum):
    for ratio in (0.05, 0.3, 0.9):
        d = matrix(*shape, SPECTRA[spectrum]).astype(np.float32)
        k = max(1, int(ratio * min(shape)))
        truth = truncate(d.astype(np.float64), k)
        assert np.linalg.norm(low_rank(d, k) - truth) <= 1e-6 * np.linalg.norm(truth)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e18])
def test_any_scale(scale):
    d = (matrix(60, 40, SPECTRA["power law"]) * scale).astype(np.float32)
    truth = truncate(d.astype(np.float64), 8)
    assert np.linalg.norm(low_rank(d, 8) - truth) <= 2e-6 * np.linalg.norm(truth)


@pytest.mark.parametrize("spectrum", [lambda i: np.ones(len(i)), lambda i: np.where(i <= 10, 1.0, 0.5)])
def test_tied_singular_values_are_still_optimal(spectrum):
    """With a tie at k the best approximation is not unique, but its error is."""
    d = matrix(40, 30, spectrum).astype(np.float32)
    for k in (1, 5, 20):
        best = np.linalg.norm(d - truncate(d.astype(np.float64), k))
        assert np.linalg.norm(d - low_rank(d, k)) <= best * (1 + 1e-6)


def test_zero_and_constant_rows():
    assert not low_rank(np.zeros((6, 4)), 2).any()
    d = np.zeros((20, 30))
    d[:8] = np.random.default_rng(0).standard_normal((8, 30))
    np.testing.assert_allclose(low_rank(d, 8), d, atol=1e-6)
    assert top_right_singular_vectors(torch.zeros(6, 4), rank=2) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_what_is_not_finite_is_refused(value):
    d = torch.ones(4, 4)
    d[1, 2] = value
    if value == 1e38:  # finite, and its square fits float64
        assert torch.isfinite(sum_of_low_rank(d[None], [1.0], rank=1)).all()
        return
    with pytest.raises(DecompositionError, match="not finite"):
        sum_of_low_rank(d[None], [1.0], rank=1)


def test_sum_over_models_with_weights():
    stack = np.stack([matrix(50, 30, SPECTRA["power law"], seed) for seed in range(4)]).astype(np.float32)
    weights = [1.0, 0.0, -2.0, 0.5]
    truth = sum(w * truncate(d.astype(np.float64), 6) for w, d in zip(weights, stack, strict=True))
    got = sum_of_low_rank(torch.from_numpy(stack), weights, rank=6).numpy()
    assert np.linalg.norm(got - truth) <= 1e-6 * np.linalg.norm(truth)


@pytest.mark.parametrize("energy", [0.01, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_energy_gives_the_least_sufficient_rank(energy, spectrum):
    d = matrix(40, 30, SPECTRA[spectrum])
    values = np.sort(np.linalg.svd(d, compute_uv=False) ** 2)
    k = rank_for_energy(values, energy)
    if energy < 1:
        assert k == energy_rank(d, energy)
    rows = top_right_singular_vectors(torch.from_numpy(d), energy=energy)
    kept = np.linalg.norm(d @ rows.numpy().T) ** 2
    assert kept >= energy * np.linalg.norm(d) ** 2 * (1 - 1e-9)


def test_threads_agree_with_each_other():
    """The LAPACK calls run without Python's lock, from several threads at once."""
    stack = torch.randn(8, 80, 60)
    expected = [top_right_singular_vectors(d, rank=9) for d in stack]
    found: list = [None] * len(stack)

    def work(i: int) -> None:
        found[i] = top_right_singular_vectors(stack[i], rank=9)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(stack))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200), st.data())
def test_order_statistic_equals_a_sort(numbers, data):
    k = data.draw(st.integers(1, len(numbers)))
    histogram = MagnitudeHistogram()
    parts = torch.tensor(numbers, dtype=torch.float32).split(7)
    for part in parts:
        histogram.add(part)
    histogram.narrow(k)
    for part in parts:
        other = histogram.fork()
        other.add(part)
        histogram.join(other)
    assert histogram.value() == float(np.sort(np.abs(np.asarray(numbers, dtype=np.float32)))[k - 1])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_equals_the_truth(shape):
    d = matrix(*shape, SPECTRA["power law"]).astype(np.float32)
    k = max(1, min(shape) // 4)
    got = sum_of_low_rank(torch.from_numpy(d)[None].cuda(), [1.0], rank=k).double().cpu().numpy()
    truth = truncate(d.astype(np.float64), k)
    assert np.linalg.norm(got - truth) <= 1e-5 * np.linalg.norm(truth)
