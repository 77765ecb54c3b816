"""WUDI and ACE against float64 oracles and by their properties."""

from __future__ import annotations

import numpy as np
import oracle_wudi_ace as oracle
import pytest
import torch
from checkpoints import make_family
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import is_low_rank, state_of

import cart_hf
from cart_hf.methods.ace import ace
from cart_hf.methods.wudi import wudi

SHAPES = [(12, 12), (20, 8), (8, 20), (5, 1), (1, 5), (1, 1)]
DTYPES = {torch.float32: 2e-4, torch.float64: 1e-8}


def drawn(shape, tasks=3, seed=0, size=0.1, unequal=1.0):
    """A base and fine-tuned matrices; each task's update ``unequal`` times as large as the last one's."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    lengths = size * unequal ** np.arange(tasks)
    return base, base + lengths[:, None, None] * rng.standard_normal((tasks, *shape))


def merged(method, base, models, dtype=torch.float64, **told):
    result = method(
        models=torch.tensor(models, dtype=dtype), base=torch.tensor(base, dtype=dtype), **{"scale": 1.0, **told}
    )
    assert result.dtype == dtype
    return result.double().numpy()


def assert_near(found, expected, base, tolerance):
    assert np.linalg.norm(found - expected) <= tolerance * max(np.linalg.norm(expected - base), 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_wudi_is_the_regularised_minimum(shape, dtype):
    base, models = drawn(shape)
    for ridge, scale in ((0.1, 1.0), (1e-3, 0.5), (3.0, 1.5)):
        expected = oracle.wudi_closed(models, base, scale, ridge)
        assert_near(merged(wudi, base, models, dtype, ridge=ridge, scale=scale), expected, base, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_wudi_takes_the_authors_steps(shape, dtype):
    base, models = drawn(shape)
    told = {"learning_rate": 2e-3, "iterations": 25}
    expected = oracle.wudi_adam(models, base, 0.9, **told)
    found = merged(wudi, base, models, dtype, solver="iterative", scale=0.9, **told)
    assert_near(found, expected, base, 20 * DTYPES[dtype])


def test_wudi_without_ridge_has_no_gradient_left():
    base, models = drawn((20, 8))  # well conditioned: three tasks of 20 rows for 8 columns
    taus = models - base
    update = merged(wudi, base, models, ridge=1e-6) - base
    curvature = sum(tau.T @ tau / np.linalg.norm(tau) ** 2 for tau in taus)
    target = sum(tau @ tau.T @ tau / np.linalg.norm(tau) ** 2 for tau in taus)
    assert np.linalg.norm(update @ curvature - target) < 1e-5 * np.linalg.norm(target)


def test_wudi_steps_go_down_and_the_closed_form_goes_further():
    base, models = drawn((10, 14), tasks=4)
    taus = models - base
    start = oracle.wudi_objective(taus.sum(axis=0), taus)
    few, many = (
        oracle.wudi_objective(
            merged(wudi, base, models, solver="iterative", iterations=i, learning_rate=1e-3) - base, taus
        )
        for i in (20, 200)
    )
    held, least = (oracle.wudi_objective(merged(wudi, base, models, ridge=r) - base, taus) for r in (1.0, 1e-6))
    assert start > few > many > least
    assert start > held > least


@pytest.mark.parametrize("solver", ["closed", "iterative"])
def test_wudi_of_one_model_is_that_model(solver):
    base, models = drawn((9, 7), tasks=1)
    np.testing.assert_allclose(merged(wudi, base, models, solver=solver), models[0], atol=1e-10)


def test_wudi_follows_the_task_vectors_scale():
    base, models = drawn((8, 12))
    smaller = merged(wudi, base, base + 1e-4 * (models - base))
    np.testing.assert_allclose((smaller - base) * 1e4, merged(wudi, base, models) - base, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unequal", [1.1, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_ace_is_the_published_equations(shape, unequal, dtype):
    base, models = drawn(shape, tasks=4, unequal=unequal)
    for told in ({}, {"epsilon": 0.03, "top_fraction": 0.7, "scale": 0.6}, {"threshold": 0.0}):
        expected = oracle.ace(models, base, **told)
        found = merged(ace, base, models, dtype, **told)
        assert np.isfinite(found).all()
        assert_near(found, expected, base, 5 * DTYPES[dtype])


def test_ace_refines_only_what_is_heterogeneous():
    base, models = drawn((12, 12), tasks=3, unequal=1.5)
    logs = np.log(((models - base) ** 2).sum(axis=(1, 2)))
    bound = logs.var(ddof=1) / logs.mean() ** 2
    plain = merged(ace, base, models, threshold=9.0)
    assert (merged(ace, base, models, threshold=1.01 * bound, top_fraction=0.9) == plain).all()
    assert np.abs(merged(ace, base, models, threshold=0.99 * bound) - plain).max() > 1e-3


def test_ace_leaves_tasks_out_that_changed_nothing():
    base, models = drawn((8, 10), tasks=3, unequal=40.0)
    idle = np.concatenate([models, base[None], base[None] + np.linspace(0, 1, 10)])  # the last: each row alike
    np.testing.assert_allclose(merged(ace, base, idle), merged(ace, base, models), atol=1e-9)
    assert (merged(ace, base, base[None].repeat(2, 0)) == base).all()


CASES = {"closed": (wudi, {}), "iterative": (wudi, {"solver": "iterative", "iterations": 5}), "ace": (ace, {})}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    tasks=st.integers(1, 5),
    idle=st.integers(0, 2),
    rank=st.integers(1, 9),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    dtype=st.sampled_from(list(DTYPES)),
)
@example(shape=(2, 6), tasks=1, idle=0, rank=3, seed=43, size=1e6, dtype=torch.float32)
@example(shape=(2, 4), tasks=2, idle=0, rank=1, seed=1, size=1e6, dtype=torch.float32)
def test_any_input_gives_a_finite_result_whatever_the_order(case, shape, tasks, idle, rank, seed, size, dtype):
    method, told = CASES[case]
    rng = np.random.default_rng(seed)
    base = size * rng.standard_normal(shape)
    low = rng.standard_normal((tasks, shape[0], rank)) @ rng.standard_normal((tasks, rank, shape[1]))
    models = np.concatenate([base + size * low, np.repeat(base[None], idle, axis=0)])
    forward, backward = (merged(method, base, some, dtype, **told) for some in (models, models[::-1].copy()))
    assert np.isfinite(forward).all()
    largest = max(np.abs(models).max(), np.abs(forward).max())  # Adam's steps do not shrink with tiny models
    assert np.abs(forward - backward).max() <= (1e-2 if dtype == torch.float32 else 1e-5) * largest


@pytest.mark.parametrize("case", CASES)
def test_transposed_storage_and_scale_zero(case):
    method, told = CASES[case]
    base, models = (torch.tensor(part) for part in drawn((6, 9)))
    stored = models.mT.contiguous().mT, base.mT.contiguous().mT
    found = method(models=stored[0].clone(), base=stored[1], scale=0.7, **told)
    torch.testing.assert_close(found, method(models=models.clone(), base=base, scale=0.7, **told))
    assert torch.equal(stored[1], base)  # never overwritten
    assert torch.equal(method(models=models.clone(), base=base, scale=0.0, **told), base)


def test_a_merged_checkpoint_holds_what_the_oracle_says(tmp_path):
    base, models = make_family(tmp_path, "gpt2")  # Conv1D: its matrices are stored transposed
    cart_hf.merge(base=base, models=models, output=tmp_path / "out", method="wudi", scale=0.8, ridge=0.2)
    states, start, found = [state_of(m) for m in models], state_of(base), state_of(str(tmp_path / "out"))
    for name, array in found.items():
        stack = np.stack([state[name] for state in states]).astype(np.float64)
        if is_low_rank("gpt2", name):
            expected = oracle.wudi_closed(stack.swapaxes(1, 2), start[name].T.astype(np.float64), 0.8, 0.2).T
        else:
            expected = stack.mean(axis=0)
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-4, err_msg=name)
