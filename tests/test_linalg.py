"""The solver against a float64 SVD, degenerate input included; the order statistic against a sort."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import energy_rank, truncate

from cart_hf.linalg import gram as gram_ways
from cart_hf.linalg import lanczos
from cart_hf.linalg.gram import DecompositionError, rank_for_energy
from cart_hf.linalg.low_rank import factorize, weighted_sum
from cart_hf.linalg.magnitude import MagnitudeHistogram


@cache
def directions(m: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.standard_normal((m, m)))[0], np.linalg.qr(rng.standard_normal((n, n)))[0]


def matrix(m: int, n: int, spectrum, seed: int = 0) -> np.ndarray:
    u, v = directions(m, n, seed)
    k = min(m, n)
    return (u[:, :k] * spectrum(np.arange(1, k + 1))) @ v[:, :k].T


def low_rank(d: np.ndarray, k: int, solver: str = "exact") -> np.ndarray:
    return sum_of_low_rank(torch.from_numpy(d.astype(np.float32))[None], [1.0], rank=k, solver=solver).double().numpy()


def sum_of_low_rank(matrices: torch.Tensor, weight, **how) -> torch.Tensor:
    return weighted_sum(factorize(matrices, **how), weight)


def errors(d: np.ndarray, ranks: Iterable[int], solver: str) -> dict[int, float]:
    """Return how far from the truth the approximation of each rank is, with one decomposition for all of them."""
    u, s, vt = np.linalg.svd(d.astype(np.float64), full_matrices=False)
    truths = {k: (u[:, :k] * s[:k]) @ vt[:k] for k in ranks}
    return {k: np.linalg.norm(low_rank(d, k, solver) - t) / np.linalg.norm(t) for k, t in truths.items()}


SHAPES = [(96, 96), (200, 48), (48, 200), (5, 1), (1, 5), (1, 1)]
SPECTRA = {
    "power law": lambda i: i**-0.6,
    "steep power law": lambda i: i**-2.0,
    "exponential": lambda i: np.exp(-i / 5.0),
    "spike": lambda i: np.where(i == 1, 1e3, i**-2.0),
    "spike over a flat bulk": lambda i: np.where(i == 1, 1e3, 1.0 - 1e-4 * i),
    "rank deficient": lambda i: np.where(i <= 3, 4.0 - i, 0.0),
    "near tie": lambda i: np.where(i <= 20, 1.0, 1.0 - 1e-4) * i**-0.1,
}
LARGE = [(224, 224), (320, 200), (200, 320)]  # where Lanczos is used for small ranks
BOUNDS = {"exact": 1e-6, "fast": 1e-3}


@pytest.mark.parametrize("solver", BOUNDS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_update_is_the_truth_within_the_bound(spectrum, solver):
    for shape in SHAPES:
        d = matrix(*shape, SPECTRA[spectrum]).astype(np.float32)
        found = errors(d, {max(1, int(ratio * min(shape))) for ratio in (0.05, 0.3, 0.9)}, solver)
        assert all(far <= BOUNDS[solver] for far in found.values()), (shape, found)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_fast_way_on_larger_matrices(spectrum):
    for shape in LARGE:
        d = matrix(*shape, SPECTRA[spectrum]).astype(np.float32)
        found = errors(d, (1, 5, 20, 80, min(shape)), "fast")
        assert all(far <= BOUNDS["fast"] for far in found.values()), (shape, found)


def ways(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count how often each way to the eigenvectors is taken to its end."""
    taken = {"exact": 0, "lanczos": 0, "reduced": 0}

    def count(module, name, way):
        original = getattr(module, name)

        def counted(*arguments, **named):
            taken[way] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, counted)

    count(gram_ways, "_exact", "exact")
    count(gram_ways, "_reduced", "reduced")
    count(lanczos, "top_eigenpairs", "lanczos")
    return taken


def test_which_way_is_taken(monkeypatch):
    """The fast ways serve ordinary spectra, and give up on those that float32 cannot tell apart."""
    taken = ways(monkeypatch)
    low_rank(matrix(256, 256, SPECTRA["power law"]), 20, "fast")
    assert taken == {"exact": 0, "lanczos": 1, "reduced": 0}
    low_rank(matrix(256, 256, SPECTRA["power law"]), 100, "fast")
    assert taken == {"exact": 0, "lanczos": 1, "reduced": 1}
    low_rank(matrix(256, 256, SPECTRA["spike over a flat bulk"]), 20, "fast")
    assert taken["exact"] == 1
    low_rank(matrix(256, 256, SPECTRA["power law"]) * 1e-25, 20, "fast")
    assert taken["exact"] == 2
    factorize(torch.from_numpy(matrix(256, 256, SPECTRA["power law"]))[None], rank=20)  # float64
    assert taken["exact"] == 3


def test_wrong_vectors_are_not_confirmed():
    """The check looks at the matrix itself: vectors that are not its own, or not orthonormal, are refused."""
    d = torch.from_numpy(matrix(256, 256, SPECTRA["power law"]).astype(np.float32))
    gram = d.T @ d
    trace = float(gram.trace())
    (pairs,) = lanczos.top_eigenpairs((gram / trace)[None], 20, 5e-4)
    assert pairs is not None and gram_ways._confirmed(d, trace, pairs) is not None
    assert gram_ways._confirmed(d.roll(1, dims=1), trace, pairs) is None
    twice = torch.cat([pairs.rows[1:], pairs.rows[-1:]])
    assert gram_ways._confirmed(d, trace, type(pairs)(twice, pairs.values, pairs.residuals)) is None


def test_device_way_equals_the_truth_on_the_cpu():
    """What a GPU runs, in batches, on the CPU; matrices it cannot settle are left to the exact way."""
    stack = np.stack([matrix(300, 256, SPECTRA[name], i) for i, name in enumerate(SPECTRA)]).astype(np.float32)
    parts = gram_ways._fast_on_device(torch.from_numpy(np.concatenate([stack, np.zeros((1, 300, 256), "f4")])), 20)
    settled = dict(zip(SPECTRA, parts, strict=False))
    assert settled["power law"] is not None
    assert settled["spike over a flat bulk"] is None and parts[-1] is None
    for d, part in zip(stack, parts, strict=False):
        if part is not None:
            truth = truncate(d.astype(np.float64), 20)
            assert np.linalg.norm((part.left @ part.right).numpy() - truth) <= 1e-3 * np.linalg.norm(truth)


@pytest.mark.parametrize("solver", BOUNDS)
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e18])
def test_any_scale(scale, solver):
    d = (matrix(60, 40, SPECTRA["power law"]) * scale).astype(np.float32)
    assert errors(d, [8], solver)[8] <= 2 * BOUNDS[solver]


@pytest.mark.parametrize("solver", BOUNDS)
@pytest.mark.parametrize("spectrum", [lambda i: np.ones(len(i)), lambda i: np.where(i <= 10, 1.0, 0.5)])
def test_tied_singular_values_are_still_optimal(spectrum, solver):
    """With a tie at k the best approximation is not unique, but its error is."""
    d = matrix(40, 30, spectrum).astype(np.float32)
    for k in (1, 5, 20):
        best = np.linalg.norm(d - truncate(d.astype(np.float64), k))
        assert np.linalg.norm(d - low_rank(d, k, solver)) <= best * (1 + BOUNDS[solver])


@pytest.mark.parametrize("solver", BOUNDS)
def test_zero_and_constant_rows(solver):
    assert not low_rank(np.zeros((6, 4)), 2, solver).any()
    assert not low_rank(np.zeros((256, 200)), 2, solver).any()
    d = np.zeros((200, 300))
    d[:8] = np.random.default_rng(0).standard_normal((8, 300))
    np.testing.assert_allclose(low_rank(d, 8, solver), d, atol=BOUNDS[solver])
    assert factorize(torch.zeros(1, 6, 4), rank=2, solver=solver).rank == 0


@pytest.mark.parametrize("solver", BOUNDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_what_is_not_finite_is_refused(value, solver):
    for size in (4, 256):
        d = torch.ones(1, size, size)
        d[0, 1, 2] = value
        if value == 1e38:  # finite, and its square fits float64
            assert torch.isfinite(sum_of_low_rank(d, [1.0], rank=1, solver=solver)).all()
            continue
        with pytest.raises(DecompositionError, match="not finite"):
            sum_of_low_rank(d, [1.0], rank=1, solver=solver)


def test_sum_over_models_with_weights():
    stack = np.stack([matrix(50, 30, SPECTRA["power law"], seed) for seed in range(4)]).astype(np.float32)
    weights = [1.0, 0.0, -2.0, 0.5]
    truth = sum(w * truncate(d.astype(np.float64), 6) for w, d in zip(weights, stack, strict=True))
    got = sum_of_low_rank(torch.from_numpy(stack), weights, rank=6, solver="exact").numpy()
    assert np.linalg.norm(got - truth) <= 1e-6 * np.linalg.norm(truth)


@pytest.mark.parametrize("energy", [0.01, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_energy_gives_the_least_sufficient_rank(energy, spectrum):
    d = matrix(40, 30, SPECTRA[spectrum])
    values = np.sort(np.linalg.svd(d, compute_uv=False) ** 2)
    k = rank_for_energy(values, energy)
    if energy < 1:
        assert k == energy_rank(d, energy)
    for numbers, slack in ((d, 1e-9), (d.astype(np.float32), 1e-5)):  # the exact way and the fast one
        factors = factorize(torch.from_numpy(numbers)[None], energy=energy)
        assert np.linalg.norm(factors.singular.numpy()) ** 2 >= energy * np.linalg.norm(d) ** 2 * (1 - slack)


def test_threads_agree_with_each_other():
    """The LAPACK calls run without Python's lock, from several threads at once."""
    stack = torch.randn(8, 1, 280, 200)
    solvers = ["fast", "exact"] * 4
    expected = [sum_of_low_rank(d, [1.0], rank=9, solver=solver) for d, solver in zip(stack, solvers, strict=True)]
    found: list = [None] * len(stack)

    def work(i: int) -> None:
        found[i] = sum_of_low_rank(stack[i], [1.0], rank=9, solver=solvers[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(stack))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_factors_serve_every_smaller_rank(shape):
    stack = np.stack([matrix(*shape, SPECTRA["power law"], seed) for seed in range(3)] + [np.zeros(shape)])
    factors = factorize(torch.from_numpy(stack), rank=30)
    for k in (1, 7, 30):
        ranks = factors.ranks(rank=k)
        truth = sum(w * truncate(d, k) for w, d in zip([1.0, 2.0, -1.0], stack, strict=False))
        np.testing.assert_allclose(weighted_sum(factors, [1.0, 2.0, -1.0, 5.0], ranks), truth, atol=1e-6)
    np.testing.assert_allclose(factors.squares, (stack**2).sum(axis=(1, 2)))
    unit = factors.left[0].mT @ factors.left[0]
    np.testing.assert_allclose(unit, np.eye(30), atol=1e-6)
    assert (factors.singular[0].diff() <= 0).all() and not factors.singular[3].any()
    assert factors.ranks(rank=31) is None
    wanted = [energy_rank(d, 0.5) for d in stack[:3]]
    assert factors.ranks(energy=0.5)[:3] == wanted
    assert factors.ranks(energy=0.9999) is None
    assert factorize(torch.from_numpy(stack), rank=40).ranks(rank=500) == [40] * 4


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
@pytest.mark.parametrize("solver", BOUNDS)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_cuda_equals_the_truth(shape, solver):
    d = matrix(*shape, SPECTRA["power law"]).astype(np.float32)
    k = max(1, min(shape) // 10)
    got = sum_of_low_rank(torch.from_numpy(d)[None].cuda(), [1.0], rank=k, solver=solver).double().cpu().numpy()
    truth = truncate(d.astype(np.float64), k)
    assert np.linalg.norm(got - truth) <= 10 * BOUNDS[solver] * np.linalg.norm(truth)
