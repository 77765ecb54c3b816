"""Algebraic properties of the methods, on random tensors."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import cart_matrix

from cart_hf.methods.average import average
from cart_hf.methods.cart import cart
from cart_hf.methods.consensus import consensus
from cart_hf.methods.task_arithmetic import task_arithmetic
from cart_hf.methods.ties import ties

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 6), sizes, sizes, st.floats(0, 5), st.data())
def test_cart_is_the_definition(seed, count, m, n, scale, data):
    models = draw(seed, count, m, n)
    rank = data.draw(st.integers(1, min(m, n)))
    weight = data.draw(st.lists(st.floats(0.1, 3), min_size=count, max_size=count))
    expected = cart_matrix(models.numpy(), lambda d: rank, scale, weight)
    got = cart(models=models.clone(), scale=scale, weight=weight, rank=rank)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seeds, sizes, sizes, st.floats(0, 5))
def test_two_models_give_the_average_for_every_rank_and_scale(seed, m, n, scale):
    models = draw(seed, 2, m, n)
    for rank in range(1, min(m, n) + 1):
        got = cart(models=models.clone(), scale=scale, weight=[1.0, 1.0], rank=rank)
        torch.testing.assert_close(got, models.mean(0), rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(3, 6), sizes, sizes)
def test_permuting_models_or_transposing_changes_nothing(seed, count, m, n):
    models = draw(seed, count, m, n)
    rank, weight = max(1, min(m, n) // 2), [1.0] * count
    one = cart(models=models.clone(), scale=1.5, weight=weight, rank=rank)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        cart(models=models[order].clone(), scale=1.5, weight=weight, rank=rank), one, atol=1e-9, rtol=0
    )
    turned = cart(models=models.transpose(1, 2).clone(), scale=1.5, weight=weight, rank=rank)
    torch.testing.assert_close(turned.T, one, atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 5), st.floats(0.1, 2))
def test_a_common_shift_moves_the_merge_with_it(seed, count, scale):
    """Adding one matrix to every model (and to the base) adds it to the result: no method depends on the origin."""
    models, base, shift = draw(seed, count, 6, 4), draw(seed + 1, 6, 4), draw(seed + 2, 6, 4)
    weight = [1.0] * count
    calls = {
        "cart": lambda w, b: cart(models=w, scale=scale, weight=weight, rank=2),
        "average": lambda w, b: average(models=w, weight=weight),
        "task_arithmetic": lambda w, b: task_arithmetic(models=w, base=b, scale=scale, weight=weight),
        "ties": lambda w, b: ties(models=w, base=b, thresholds=[0.5] * count, scale=scale, weight=weight),
        "consensus": lambda w, b: consensus(models=w, base=b, scale=scale, mask_threshold=[0.4] * count, min_tasks=2),
    }
    for name, call in calls.items():
        plain, moved = call(models.clone(), base), call(models + shift, base + shift)
        # entries on a threshold may fall to the other side after rounding: allow a few
        differs = (moved - shift - plain).abs() > 1e-9
        assert differs.double().mean() <= (0 if name in ("cart", "average", "task_arithmetic") else 0.1), name


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 5))
def test_one_over_t_task_arithmetic_is_the_average(seed, count):
    models, base = draw(seed, count, 5, 3), draw(seed + 1, 5, 3)
    got = task_arithmetic(models=models.clone(), base=base, scale=1 / count, weight=[1.0] * count)
    torch.testing.assert_close(got, models.mean(0), atol=1e-12, rtol=0)
