"""TSV-M, Iso-C, Iso-CTS and KnOTS: each against a float64 SVD, and their properties, degenerate input included."""

from __future__ import annotations

import numpy as np
import oracle
import oracle_svd
import pytest
import torch
from checkpoints import make_family

import cart_hf
from cart_hf.linalg.directions import directions, orthonormal, rounding
from cart_hf.linalg.gram import DecompositionError
from cart_hf.linalg.low_rank import factorize
from cart_hf.methods import get_method
from cart_hf.methods.tsv_m import tsv_m_of_factors

SHAPES = [(24, 24), (40, 17), (17, 40), (1, 6), (6, 1), (1, 1)]
METHODS = ["tsv_m", "iso_c", "iso_cts", "knots"]


def random_set(shape, tasks=3, seed=0, rank=None) -> tuple[np.ndarray, np.ndarray]:
    """A base and its fine-tuned models; with ``rank``, LoRA of that rank."""
    rng = np.random.default_rng(seed)
    m, n = shape
    k = min(shape) if rank is None else rank
    updates = rng.standard_normal((tasks, m, k)) * np.arange(1, k + 1) ** -0.5 @ rng.standard_normal((tasks, k, n))
    base = rng.standard_normal(shape)
    return base, base + 0.1 * updates


def merge(name, base, models, dtype=torch.float64, **options) -> np.ndarray:
    """Merge by the method's function, and see that it leaves the base as it was."""
    tasks, (m, n) = len(models), base.shape
    settings = {
        "tsv_m": {"rank": max(1, min(m, n) // tasks), "solver": "exact"},
        "iso_c": {},
        "iso_cts": {"common_fraction": 0.8, "solver": "exact"},
        "knots": {"density": [0.2] * tasks, "weight": [1.0] * tasks},
    }[name]
    before = torch.from_numpy(base).to(dtype)
    given = before.clone()
    function = get_method(name).function
    merged = function(
        models=torch.from_numpy(models).to(dtype, copy=True), base=given, **{"scale": 1.0, **settings, **options}
    )
    assert torch.equal(given, before)
    assert merged.dtype == dtype
    assert merged.shape == base.shape
    assert torch.isfinite(merged).all()
    return merged.double().numpy()


def expected(name, base, models, scale=1.0) -> np.ndarray:
    tasks = len(models)
    return {
        "tsv_m": lambda: oracle_svd.tsv_m(base, models, scale, max(1, min(base.shape) // tasks)),
        "iso_c": lambda: oracle_svd.iso_c(base, models, scale),
        "iso_cts": lambda: oracle_svd.iso_cts(base, models, scale, 0.8),
        "knots": lambda: oracle_svd.knots(base, models, scale, [0.2] * tasks, [1.0] * tasks),
    }[name]()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_svd(name, shape):
    base, models = random_set(shape)
    np.testing.assert_allclose(merge(name, base, models, scale=1.7), expected(name, base, models, 1.7), atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tasks", [1, 2, 9])
def test_against_the_svd_for_any_number_of_models(name, tasks):
    base, models = random_set((8, 30), tasks)  # more models than there are directions; more directions than rows
    np.testing.assert_allclose(merge(name, base, models), expected(name, base, models), atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lora_is_merged_in_its_own_directions(name, dtype):
    """Stored in float32, a model of base plus low rank has directions of mere rounding: none of them is made longer."""
    base, models = random_set((60, 48), 4, rank=2)
    stored = models.astype(np.float32).astype(np.float64), base.astype(np.float32).astype(np.float64)
    merged = merge(name, stored[1], stored[0], dtype)
    np.testing.assert_allclose(merged, expected(name, base, models), atol=3e-5)
    assert len(directions(torch.from_numpy(merged - stored[1]), 1e-4).singular) == 8


@pytest.mark.parametrize("name", METHODS)
def test_low_rank_updates_far_longer_than_the_base(name):
    """Then it is the arithmetic in float32 on them that leaves directions of mere rounding."""
    base, models = random_set((60, 48), 4, rank=2)
    merged = merge(name, 1e-3 * base, 1e-3 * base + models - base, torch.float32)
    truth = expected(name, 1e-3 * base, 1e-3 * base + models - base)
    np.testing.assert_allclose(merged, truth, atol=3e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_models_is_of_no_account(name):
    base, models = random_set((30, 20), 5)
    np.testing.assert_allclose(merge(name, base, models), merge(name, base, models[[3, 0, 4, 2, 1]]), atol=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_float32_and_layout(name):
    base, models = random_set((30, 20), 4)
    double = merge(name, base, models)
    np.testing.assert_allclose(merge(name, base, models, torch.float32), double, atol=5e-6)
    turned = np.asfortranarray(base), np.ascontiguousarray(models.swapaxes(1, 2)).swapaxes(1, 2)
    np.testing.assert_allclose(merge(name, *turned), double, atol=1e-10)  # as the weights of GPT-2's Conv1D come


@pytest.mark.parametrize("name", METHODS)
def test_scales_are_on_a_line(name):
    base, models = random_set((30, 20), 4)
    assert get_method(name).line
    at = {scale: merge(name, base, models, scale=scale) for scale in (0.0, 1.0, 2.5)}
    np.testing.assert_allclose(at[0.0], base, atol=1e-12)
    np.testing.assert_allclose(at[2.5], base + 2.5 * (at[1.0] - base), atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (1, 1)])
def test_degenerate_input(name, shape):
    base, models = random_set(shape, 4)
    same = np.stack([base] * 4)
    np.testing.assert_array_equal(merge(name, base, same), base)  # nothing was learnt
    np.testing.assert_array_equal(merge(name, 0 * base, 0 * same, torch.float32), 0 * base)
    opposite = np.stack([models[0], 2 * base - models[0]])
    merge(name, base, opposite)
    merge(name, base, np.concatenate([models[:1], same[:3]]))
    merge(name, 0 * base, 1e-18 * models, torch.float32)
    merge(name, 0 * base, 1e18 * models, torch.float32)
    twins = np.stack([models[0]] * 3)
    np.testing.assert_allclose(merge(name, base, twins), expected(name, base, twins), atol=1e-8)


def test_tsv_m_of_one_model_is_the_model():
    for shape in SHAPES:
        base, models = random_set(shape, 1)
        np.testing.assert_allclose(merge("tsv_m", base, models), models[0], atol=1e-10)


def test_tsv_m_of_twins_is_their_truncation():
    base, models = random_set((20, 14), 1)
    u, s, vt = oracle_svd.svd(models[0] - base)
    merged = merge("tsv_m", base, np.concatenate([models] * 3), rank=4)
    np.testing.assert_allclose(merged, base + (u[:, :4] * s[:4]) @ vt[:4], atol=1e-9)
    np.testing.assert_allclose(merge("tsv_m", base, np.concatenate([models] * 3), rank=14), models[0], atol=1e-9)


def test_tsv_m_of_orthogonal_task_vectors_is_their_sum():
    base, _ = random_set((24, 16))
    rng = np.random.default_rng(1)
    u, v = np.linalg.qr(rng.standard_normal((24, 16)))[0], np.linalg.qr(rng.standard_normal((16, 16)))[0]
    singular = rng.uniform(1, 2, 16)
    updates = [(u[:, i : i + 4] * singular[i : i + 4]) @ v[:, i : i + 4].T for i in range(0, 16, 4)]
    merged = merge("tsv_m", base, base + np.stack(updates))
    np.testing.assert_allclose(merged, base + sum(updates), atol=1e-9)


def test_tsv_m_crowded_and_by_energy():
    """More directions than there is room for."""
    base, models = random_set((20, 14), 4)
    np.testing.assert_allclose(merge("tsv_m", base, models, rank=9), oracle_svd.tsv_m(base, models, 1.0, 9), atol=1e-9)
    np.testing.assert_allclose(
        merge("tsv_m", base, models, rank=14), merge("tsv_m", base, models, rank=None, energy=1.0)
    )


def test_tsv_m_from_kept_factors():
    base, models = random_set((20, 14), 4)
    task_vectors = torch.from_numpy(models - base)
    factors = factorize(task_vectors.clone(), rank=9, solver="exact")
    for ranks in (None, [3, 3, 3, 3], [1, 9, 2, 5]):
        merged = tsv_m_of_factors(centre=torch.from_numpy(base.copy()), factors=factors, ranks=ranks, scale=1.3).numpy()
        parts = [oracle_svd.svd(tau) for tau in models - base]
        k = ranks or [9] * 4
        u = np.concatenate([p[0][:, :j] for p, j in zip(parts, k, strict=True)], axis=1)
        s = np.concatenate([p[1][:j] for p, j in zip(parts, k, strict=True)])
        vt = np.concatenate([p[2][:j] for p, j in zip(parts, k, strict=True)])
        truth = base + 1.3 * oracle_svd.polar(u) @ np.diag(s) @ oracle_svd.polar(vt)
        np.testing.assert_allclose(merged, truth, atol=1e-9)


def test_iso_c_makes_all_singular_values_equal():
    for shape in SHAPES:
        base, models = random_set(shape, 4)
        singular = np.linalg.svd(merge("iso_c", base, models) - base, compute_uv=False)
        length = np.linalg.svd((models - base).sum(axis=0), compute_uv=False).mean()
        np.testing.assert_allclose(singular, length, rtol=1e-8)


def test_iso_cts_common_and_own():
    base, models = random_set((24, 20), 4)
    for fraction in (0.0, 0.33, 0.6, 0.95):
        merged = merge("iso_cts", base, models, common_fraction=fraction)
        np.testing.assert_allclose(merged, oracle_svd.iso_cts(base, models, 1.0, fraction), atol=1e-9)
    whole = merge("iso_c", base, models)
    np.testing.assert_allclose(merge("iso_cts", base, models, common_fraction=1.0), whole, atol=1e-9)
    assert np.abs(merge("iso_cts", base, models) - whole).max() > 1e-2
    alone = merge("iso_cts", base, models[:1], common_fraction=0.5)
    np.testing.assert_allclose(alone, merge("iso_c", base, models[:1]), atol=1e-9)


def test_iso_cts_never_asks_for_more_directions_than_there_are():
    """round((3 - 0) / 2) = 2 of each of two models would be four of three."""
    base, models = random_set((3, 3), 2)
    merged = merge("iso_cts", base, models, common_fraction=0.0)
    np.testing.assert_allclose(merged, oracle_svd.iso_cts(base, models, 1.0, 0.0), atol=1e-9)


def test_knots_keeps_what_agrees():
    base, models = random_set((18, 25), 3)
    options = {"density": [0.3, 0.5, 1.0], "weight": [1.0, 0.5, 2.0]}
    for mean in (True, False):
        merged = merge("knots", base, models, normalize=mean, scale=0.6, **options)
        truth = oracle_svd.knots(base, models, 0.6, options["density"], options["weight"], mean)
        np.testing.assert_allclose(merged, truth, atol=1e-9)
    base, models = random_set((40, 17), 2)  # the smaller Gram matrix is that of the columns
    truth = oracle_svd.knots(base, models, 1.0, [0.2] * 2, [1.0] * 2)
    np.testing.assert_allclose(merge("knots", base, models), truth, atol=1e-9)
    alone = merge("knots", base, models[:1], density=[1.0])
    np.testing.assert_allclose(alone, models[0], atol=1e-10)


def test_orthonormal_is_the_polar_factor():
    rng = np.random.default_rng(0)
    for shape in [(9, 5), (5, 9), (6, 6), (4, 0), (0, 4)]:
        x = rng.standard_normal(shape)
        np.testing.assert_allclose(orthonormal(torch.from_numpy(x)).numpy(), oracle_svd.polar(x), atol=1e-11)
    twice = np.repeat(rng.standard_normal((9, 3)), 2, axis=1)
    np.testing.assert_allclose(orthonormal(torch.from_numpy(twice)).numpy(), oracle_svd.polar(twice), atol=1e-9)


def test_rounding_bounds_what_storing_in_float32_adds():
    rng = np.random.default_rng(0)
    for shape in [(300, 100), (100, 300), (200, 200)]:
        exact = rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1)))
        stored = [(exact + rng.standard_normal(shape) * 1e-3).astype(np.float32) for _ in range(4)]
        again = [(s.astype(np.float64) * (1 + 2.0**-30)).astype(np.float32) for s in stored]
        noise = sum(s.astype(np.float64) * (1 + 2.0**-30) - a for s, a in zip(stored, again, strict=True))
        assert np.linalg.norm(noise, 2) < rounding(torch.from_numpy(exact), 4)
        lost = exact - exact.astype(np.float32)
        assert 0.1 < np.linalg.norm(lost, 2) / rounding(torch.from_numpy(exact)) < 1


def test_what_is_not_finite_is_refused():
    broken = torch.full((4, 4), float("inf"))
    with pytest.raises(DecompositionError, match="not finite"):
        directions(broken)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """GPT-2's, whose Conv1D weights are stored the other way round: folders, and states as transformers loads them."""
    base, models = make_family(tmp_path_factory.mktemp("gpt2"), "gpt2")
    base_state = oracle.state_of(base)
    states = [oracle.state_of(model) for model in models]
    return base, models, base_state, states


@pytest.mark.parametrize("name", METHODS)
def test_checkpoints(checkpoints, name, tmp_path):
    base, models, base_state, states = checkpoints
    solver = {} if name in ("iso_c", "knots") else {"solver": "exact"}
    cart_hf.merge(base=base, models=models, output=tmp_path / "out", method=name, scale=1.2, **solver)
    merged = oracle.state_of(str(tmp_path / "out"))
    for tensor, value in merged.items():
        stack = np.stack([state[tensor] for state in states])
        if oracle.is_low_rank("gpt2", tensor):
            truth = expected(name, base_state[tensor].T, stack.swapaxes(1, 2), 1.2).T
        else:
            truth = oracle.average(stack)
        np.testing.assert_allclose(value, truth, atol=2e-6, err_msg=tensor)


def test_tsv_m_with_a_folder_of_factors(checkpoints, tmp_path):
    base, models, _, _ = checkpoints
    for folder in ("computed", "kept"):
        cart_hf.merge(
            base=base,
            models=models,
            output=tmp_path / folder,
            method="tsv_m",
            solver="exact",
            factors=tmp_path / "factors",
        )
    cart_hf.merge(base=base, models=models, output=tmp_path / "plain", method="tsv_m", solver="exact")
    plain = oracle.state_of(str(tmp_path / "plain"))
    for folder in ("computed", "kept"):
        for tensor, value in oracle.state_of(str(tmp_path / folder)).items():
            np.testing.assert_allclose(value, plain[tensor], atol=1e-6, err_msg=tensor)
