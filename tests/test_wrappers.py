"""What is done to a merge method's result: SVC, LiNeS and LARV, against float64 oracles and by their properties."""

from __future__ import annotations

import numpy as np
import oracle_wudi_ace as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cart_hf.methods.wrappers import all_wrappers, larv, lines
from cart_hf.methods.wrappers.svc import svc
from cart_hf.sources import Block

SHAPES = [(12, 12), (20, 8), (8, 20), (5, 1), (1, 5), (1, 1)]


def drawn(shape, tasks=3, seed=0, dtype=torch.float64):
    """A base, models and an average-like merge of them."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, dtype=torch.float64, generator=generator)
    models = base + 0.1 * torch.randn((tasks, *shape), dtype=torch.float64, generator=generator)
    merged = base + 0.4 * (models - base).sum(dim=0)
    return merged.to(dtype), base.to(dtype), models.to(dtype)


def test_all_are_registered():
    assert {"lines", "svc", "larv"} <= all_wrappers().keys()


def places(index):
    """The blocks of one tower."""
    count = 1 + max(place for place in index.values() if place is not None)
    return {name: None if place is None else Block("layers", place, count) for name, place in index.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_svc_is_the_published_rule(shape, dtype):
    merged, base, models = drawn(shape, dtype=dtype)
    for alpha in (0.1, 0.5, 1.0):
        expected = oracle.svc(merged.double().numpy(), base.double().numpy(), models.double().numpy(), alpha)
        found = svc(merged=merged, base=base, models=models.clone(), alpha=alpha)
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=tolerance)


def test_svc_gives_a_single_task_its_own_length():
    _, base, models = drawn((9, 7), tasks=1)
    task = models[0]
    for scale in (0.3, 1.0, 2.5):
        found = svc(merged=base + scale * (task - base), base=base, models=models.clone(), alpha=0.1)
        torch.testing.assert_close(found, task, rtol=0, atol=1e-10)
    # less than the floor says is not believed: 0.05 counts as 0.1
    found = svc(merged=base + 0.05 * (task - base), base=base, models=models.clone(), alpha=0.1)
    torch.testing.assert_close(found, base + 0.5 * (task - base), rtol=0, atol=1e-10)


def test_svc_lets_no_shared_direction_pile_up():
    base, shared = torch.zeros(6, 8, dtype=torch.float64), torch.outer(torch.ones(6), torch.arange(8.0)).double()
    models = shared.expand(4, 6, 8).clone()
    found = svc(merged=4 * shared, base=base, models=models, alpha=0.1)
    torch.testing.assert_close(found, shared, rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    tasks=st.integers(1, 4),
    rank=st.integers(1, 8),
    idle=st.integers(0, 2),
    moved=st.booleans(),
    size=st.sampled_from([1e-10, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_input_gives_finite_numbers(shape, tasks, rank, idle, moved, size, dtype):
    generator = torch.Generator().manual_seed(rank)
    base = size * torch.randn(shape, generator=generator).to(dtype)
    left, right = (torch.randn(tasks, *s, generator=generator).to(dtype) for s in ((shape[0], rank), (rank, shape[1])))
    models = torch.cat([base + size * left @ right, base.expand(idle, *shape)])
    merged = base + (models - base).sum(dim=0) if moved else base.clone()
    found = svc(merged=merged, base=base, models=models.clone(), alpha=0.1)
    assert torch.isfinite(found).all()
    if not moved:
        assert torch.equal(found, base)
    measured = {"a": larv.measure(base=base, models=models), "b": larv.measure(base=base, models=models[:1])}
    for gate in ("three", "two", "continuous"):
        factors = larv.factors(
            measured=measured, block=places({"a": 0, "b": 1}), models=2, gate=gate, low=0.5, high=1.5, depth=0.5
        )
        assert all(0.5 <= factor <= 1.5 for factor in factors.values())
    pair = {"a": lines.measure(merged=merged, base=base, models=models)}
    (factor,) = lines.factors(measured=pair, block=places({"a": 0}), models=len(models), alpha=None, beta=1.0).values()
    assert np.isfinite(factor)


def test_lines_measures_slices_that_add_up():
    merged, base, models = drawn((6, 8))
    whole = lines.measure(merged=merged, base=base, models=models)
    taus = (models - base).sum(dim=0)
    expected = [float(part.abs().sum()) for part in (taus, merged - base)]
    np.testing.assert_allclose(whole.numpy(), expected)
    flat = merged.flatten(), base.flatten(), models.flatten(start_dim=1)
    parts = [
        lines.measure(merged=flat[0][s], base=flat[1][s], models=flat[2][:, s]) for s in (slice(11), slice(11, None))
    ]
    torch.testing.assert_close(sum(parts), whole)


BLOCKS = {"stem": None, "0.a": 0, "0.b": 0, "1.a": 1, "2.a": 2, "head": None}


def test_lines_is_a_line_over_the_blocks():
    measured = {"stem": torch.tensor([6.0, 2.0]), "1.a": torch.tensor([2.0, 2.0])}
    found = lines.factors(measured=measured, block=places(BLOCKS), models=4, alpha=None, beta=1.0)
    assert found == pytest.approx({"stem": 0.5, "0.a": 0.5, "0.b": 0.5, "1.a": 1.0, "2.a": 1.5, "head": 0.5})
    given_alpha = lines.factors(measured={}, block=places(BLOCKS), models=4, alpha=0.1, beta=0.9)
    assert given_alpha == pytest.approx({"stem": 0.1, "0.a": 0.1, "0.b": 0.1, "1.a": 0.55, "2.a": 1.0, "head": 0.1})
    assert set(lines.factors(measured={}, block=places(BLOCKS), models=4, alpha=1.0, beta=0.0).values()) == {1.0}


def test_lines_makes_the_first_block_of_task_arithmetic_the_average():
    _, base, models = drawn((6, 8), tasks=5)
    taus = models - base
    for scale in (0.3, 1.0):
        merged = base + scale * taus.sum(dim=0)
        measured = {"0.a": lines.measure(merged=merged, base=base, models=models)}
        factor = lines.factors(measured=measured, block=places({"0.a": 0, "1.a": 1}), models=5, alpha=None, beta=2.0)[
            "0.a"
        ]
        torch.testing.assert_close(base + factor * (merged - base), models.mean(dim=0))


def test_lines_needs_no_measurement_when_it_is_told_alpha():
    assert lines.WRAPPER.needs({"alpha": None, "beta": 1.0})
    assert not lines.WRAPPER.needs({"alpha": 0.5, "beta": 1.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_larv_measures_contrast_and_conflict(shape, dtype):
    _, base, models = drawn(shape, dtype=dtype)
    expected = oracle.larv_numbers(base.double().numpy(), models.double().numpy())
    found = larv.measure(base=base, models=models)
    np.testing.assert_allclose(
        found.numpy(), [*expected, 1.0], rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-7
    )


def test_larv_sorts_blocks_by_their_scores():
    rng = np.random.default_rng(3)
    contrast, conflict = rng.uniform(0.5, 2.0, 6), rng.uniform(0.1, 1.0, 6)
    block = places({"stem": None, **{f"{i}.{leaf}": i for i in range(6) for leaf in "abc"}})
    # two matrices of each block, whose mean is what the block has; the third (a bias) is not measured
    measured = {
        f"{i}.{leaf}": torch.tensor([contrast[i] * part, conflict[i] * part, 1.0], dtype=torch.float64)
        for i in range(6)
        for leaf, part in (("a", 0.5), ("b", 1.5))
    }
    scores = oracle.larv_scores(contrast, conflict, 0.5)
    rank = scores.argsort().argsort()
    expected = {
        "three": np.array([0.4, 0.4, 1.0, 1.0, 1.2, 1.2])[rank],
        "two": np.array([0.4, 0.4, 0.4, 1.2, 1.2, 1.2])[rank],
        "continuous": 1 + np.tanh(3 * (scores - 1)) * np.where(scores > 1, 0.2, 0.6),
    }
    for gate, levels in expected.items():
        found = larv.factors(measured=measured, block=block, models=3, gate=gate, low=0.4, high=1.2, depth=0.5)
        assert found.pop("stem") == 1.0
        np.testing.assert_allclose([found[f"{i}.{leaf}"] for i in range(6) for leaf in "abc"], levels.repeat(3))


@pytest.mark.parametrize("gate", ["three", "two", "continuous"])
def test_larv_of_equal_layers_is_constant(gate):
    _, base, models = drawn((9, 6))
    measured = {str(i): larv.measure(base=base, models=models * 1.0) for i in range(7)}
    block = places({str(i): i for i in range(7)})
    found = larv.factors(measured=measured, block=block, models=3, gate=gate, low=0.5, high=1.5, depth=0.0)
    assert len(set(found.values())) == 1
    if gate != "continuous":
        assert set(found.values()) == {1.0}


def test_larv_ignores_what_did_not_change():
    _, base, models = drawn((6, 6))
    idle = larv.measure(base=base, models=base.expand(3, 6, 6))
    assert (idle == 0).all()
    block = places({"0.a": 0, "0.b": 0, "1.a": 1, "2.a": 2})
    told = {"models": 3, "gate": "continuous", "low": 0.5, "high": 1.5, "depth": 0.5}
    measured = {"0.a": larv.measure(base=base, models=models), "1.a": larv.measure(base=base, models=models[:1])}
    with_idle = larv.factors(measured={**measured, "0.b": idle, "2.a": idle}, block=block, **told)
    assert with_idle == larv.factors(measured=measured, block=block, **told)
    assert with_idle["2.a"] == 1.0
    assert set(larv.factors(measured={"0.a": idle}, block=block, **told).values()) == {1.0}


def test_each_tower_has_its_own_depth():
    block = {"v.0": Block("vision", 0, 2), "v.1": Block("vision", 1, 2), "t.1": Block("text", 1, 3)}
    assert lines.factors(measured={}, block=block, models=4, alpha=0.5, beta=1.0) == {
        "v.0": 0.5,
        "v.1": 1.5,
        "t.1": 1.0,
    }
