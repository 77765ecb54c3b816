"""What is measured of matrices against NumPy's SVD in float64, on matrices whose numbers are known, and by properties."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from checkpoints import make_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from cart_hf.analysis.curves import around, rank_at
from cart_hf.analysis.model import Around
from cart_hf.analysis.places import in_model_order, places_of
from cart_hf.analysis.tensors import Products, centred_products, cosine_of
from cart_hf.api import plan_merge
from cart_hf.linalg.low_rank import factorize
from cart_hf.recipe import recipe_from_flags

SHAPES = [(12, 8), (8, 12), (8, 8)]
ALL = tuple(k / 8 for k in range(9))  # every rank of a matrix with eight directions
seeds = st.integers(0, 10_000)


def matrices(shape: tuple[int, int], seed: int = 0, count: int = 3, fall: float = 0.7) -> np.ndarray:
    """Matrices with spectra that fall, as those of task vectors do."""
    rng = np.random.default_rng(seed)
    stack = rng.normal(size=(count, *shape))
    return np.stack([rng.uniform(0.1, 3) * m @ np.diag(fall ** np.arange(shape[1])) for m in stack])


def measured(stack: np.ndarray, rank: int = 3, known: int = 8, ratios: Sequence[float] = ALL, **options) -> Around:
    tensor = torch.from_numpy(stack.copy())
    factors = factorize(tensor, rank=known, solver="exact")
    flat = stack.reshape(len(stack), -1)
    options = {"normalizer": "all", "cosine": cosine_of(flat @ flat.T), **options}
    return around(factors, range(len(stack)), ratios=ratios, rank=rank, **options)


def directly(stack: np.ndarray, rank: int, normalizer: str, ranks: Sequence[int] = range(9)) -> dict[str, np.ndarray]:
    """Every definition written out, rank by rank and pair by pair."""
    parts = [np.linalg.svd(d, full_matrices=False) for d in stack.astype(np.float64)]
    tasks = range(len(stack))

    def scaled(t: int, k: int) -> np.ndarray:
        s, vt = parts[t][1], parts[t][2]
        by = {"all": np.sqrt((s**2).sum()), "top": np.sqrt((s[:k] ** 2).sum()), "none": 1.0}[normalizer]
        return np.diag(s[:k] / by) @ vt[:k]

    def pairs(k: int) -> np.ndarray:
        norms = [[np.linalg.norm(scaled(i, k) @ scaled(j, k).T) if i != j else 0.0 for j in tasks] for i in tasks]
        return np.array(norms)

    def lost(t: int, k: int) -> float:
        u, s, vt = parts[t]
        return np.linalg.norm(stack[t] - (u[:, :k] * s[:k]) @ vt[:k]) ** 2

    shares = np.array([s / s.sum() for _, s, _ in parts])
    squares = np.array([np.linalg.norm(d) ** 2 for d in stack])
    return {
        "spectra": np.array([s for _, s, _ in parts]),
        "squares": squares,
        "reconstruction": np.array([sum(lost(t, k) for t in tasks) for k in ranks]),
        "interference": np.array([0.0, *(pairs(k).sum() for k in ranks[1:])]),
        "pairs": pairs(rank),
        "cosine": np.array([[(a * b).sum() for b in stack] for a in stack]) / np.sqrt(np.outer(squares, squares)),
        "overlap": np.array(
            [[np.linalg.norm(a[:rank] @ b[:rank].T) ** 2 / rank for *_, b in parts] for *_, a in parts]
        ),
        "effective_rank": np.exp(-(shares * np.log(shares)).sum(axis=1)),
        "stable_rank": squares / np.array([s[0] ** 2 for _, s, _ in parts]),
        "energy": np.array([(s[:rank] ** 2).sum() for _, s, _ in parts]) / squares,
    }


@pytest.mark.parametrize("normalizer", ["all", "top", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_is_that_of_the_definitions_written_out(shape, normalizer):
    stack = matrices(shape)
    found = measured(stack, normalizer=normalizer)
    for name, expected in directly(stack, 3, normalizer).items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_stored_inputs_first_are_the_same_matrices(shape):
    stack = matrices(shape)
    turned = measured(stack.transpose(0, 2, 1), transposed=True)
    for name, expected in vars(measured(stack)).items():
        np.testing.assert_allclose(getattr(turned, name), expected, rtol=1e-7, atol=1e-9, err_msg=name)


def test_float32_and_the_fast_solver_are_as_near_as_the_solver_says():
    stack = matrices((200, 192), fall=0.97)
    factors = factorize(torch.from_numpy(stack).float(), rank=48)
    found = around(factors, range(3), ratios=(0.0, 0.125, 0.25), rank=16, normalizer="all", cosine=np.eye(3))
    expected = directly(stack, 16, "all", (0, 24, 48))
    for name in ("interference", "reconstruction", "overlap", "pairs"):
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=1e-3, err_msg=name)


def test_of_a_few_directions_the_rest_is_known_by_its_square_alone():
    stack = matrices((12, 8))
    found = measured(stack, known=4, ratios=ALL[:5])
    whole = measured(stack)
    for name in ("reconstruction", "interference"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name)[:5], rtol=1e-7)
    for name in ("pairs", "overlap", "energy", "stable_rank"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=1e-7, err_msg=name)
    assert found.spectra.shape == (3, 4) and np.isnan(found.effective_rank).all()


@pytest.mark.parametrize("normalizer", ["all", "top", "none"])
def test_disjoint_row_spaces_do_not_interfere(normalizer):
    rng = np.random.default_rng(0)
    stack = np.zeros((3, 12, 9))
    for task in range(3):
        stack[task, :, 3 * task : 3 * task + 3] = rng.normal(size=(12, 3))
    found = measured(stack, rank=3, known=9, ratios=(0.0, 1 / 3, 1.0), normalizer=normalizer)
    np.testing.assert_allclose(
        found.interference, 0.0, atol=1e-6 * (found.squares.max() if normalizer == "none" else 1)
    )
    np.testing.assert_allclose(found.overlap, np.eye(3), atol=1e-9)


def test_identical_matrices_interfere_by_a_known_amount():
    """One direction: 1 for each ordered pair, at every rank. Two alike: half the square each, so sqrt(1/4 + 1/4)."""
    one = np.outer(np.arange(1.0, 13), np.eye(8)[2])
    found = measured(np.stack([one, one, one]), rank=4)
    np.testing.assert_allclose(found.interference, [0.0, *[6.0] * 8], rtol=1e-6)
    np.testing.assert_allclose(found.overlap, np.ones((3, 3)), rtol=1e-6)  # of the one direction that there is
    np.testing.assert_allclose(found.effective_rank, 1.0, rtol=1e-5)
    two = np.zeros((8, 8))
    two[0, 0] = two[1, 1] = 5.0
    found = measured(np.stack([two, two]), rank=2)
    np.testing.assert_allclose(found.interference[2:], 2 * np.sqrt(0.5), rtol=1e-6)
    np.testing.assert_allclose(found.effective_rank, 2.0, rtol=1e-5)
    for normalizer, value in (("top", np.sqrt(0.5)), ("none", 25 * np.sqrt(2))):
        assert measured(np.stack([two, two]), rank=2, normalizer=normalizer).pairs[0, 1] == pytest.approx(value)


@pytest.mark.parametrize("normalizer", ["all", "top", "none"])
def test_a_model_that_left_a_matrix_alone_has_no_numbers_there_and_raises_no_warning(normalizer):
    stack = matrices((12, 8))
    stack[1] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measured(stack, normalizer=normalizer)
    alone = measured(stack[[0, 2]], normalizer=normalizer)
    np.testing.assert_allclose(found.interference, alone.interference, rtol=1e-9)
    np.testing.assert_allclose(found.reconstruction, alone.reconstruction, rtol=1e-9, atol=1e-12)
    for values in (found.effective_rank, found.stable_rank, found.energy, found.overlap[0], found.cosine[0]):
        assert np.isnan(values).tolist() == [False, True, False]
    assert (found.pairs[1] == 0).all()


@settings(max_examples=25, deadline=None)
@given(seed=seeds, count=st.integers(2, 5), shape=st.sampled_from(SHAPES))
def test_errors_fall_to_zero_and_interference_never_falls(seed, count, shape):
    stack = matrices(shape, seed, count)
    found = measured(stack)
    assert (np.diff(found.reconstruction) <= 0).all()
    assert found.reconstruction[-1] == 0.0
    assert found.reconstruction[0] == pytest.approx(found.squares.sum(), rel=1e-9)
    assert found.interference[0] == 0.0 and (np.diff(found.interference) >= 0).all()
    assert found.interference[-1] <= count * (count - 1) * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, data=st.data(), shape=st.sampled_from(SHAPES))
def test_neither_the_order_of_models_nor_the_axes_of_the_spaces_matter(seed, data, shape):
    stack = matrices(shape, seed, 4)
    order = data.draw(st.permutations(range(4)))
    rng = np.random.default_rng(seed)
    outputs, inputs = (np.linalg.qr(rng.normal(size=(size, size)))[0] for size in shape)
    one, other = measured(stack), measured(outputs @ stack[order] @ inputs)
    for name in ("reconstruction", "interference"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name), rtol=1e-6, atol=1e-8, err_msg=name)
    for name in ("squares", "effective_rank", "stable_rank", "energy", "spectra"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name)[order], rtol=1e-5, atol=1e-7, err_msg=name)
    for name in ("pairs", "overlap", "cosine"):
        ordered = getattr(one, name)[np.ix_(order, order)]
        np.testing.assert_allclose(getattr(other, name), ordered, rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_rank_ratio_means_the_rank_that_a_merge_keeps():
    assert [rank_at(ratio, 768) for ratio in (0.0, 0.001, 0.08, 0.32, 1.0)] == [0, 1, 61, 245, 768]


@settings(max_examples=25, deadline=None)
@given(seed=seeds, count=st.integers(2, 5))
def test_centred_products_are_those_of_the_centred_vectors(seed, count):
    rng = np.random.default_rng(seed)
    vectors, weight = rng.normal(size=(count, 50)), rng.uniform(0.5, 2, size=count)
    apart = vectors - np.average(vectors, axis=0, weights=weight)
    origin = rng.normal(size=50)
    products = Products((vectors - origin) @ (vectors - origin).T, (vectors**2).sum(axis=1), None)
    np.testing.assert_allclose(centred_products(products, list(weight)), apart @ apart.T, rtol=1e-7, atol=1e-9)


def test_models_that_are_all_the_same_differ_from_their_average_by_nothing():
    gram = np.full((3, 3), 7.3)
    found = centred_products(Products(gram, np.ones(3), None), [1.0, 0.3, 0.7])
    assert (found == 0).all() and np.isnan(cosine_of(found)).all()


def test_places_tell_two_towers_apart_and_follow_the_model(tmp_path):
    base, models = make_clip(tmp_path)
    plan = plan_merge(recipe_from_flags({"base": base, "models": [base, *models[:1]], "method": "average"}, {}))
    names = in_model_order(plan, [tensor.name for tensor in plan.tensors])
    places = places_of(names)
    assert places["text_model.encoder.layers.1.mlp.fc1.weight"] == ("text_model.encoder.layers", 1, "mlp.fc1")
    labels = list(dict.fromkeys(place.label for place in places.values()))
    for tower, norm in (("text_model", "final_layer_norm"), ("vision_model", "post_layernorm")):
        own = [label for label in labels if label.startswith(tower)]
        assert own[0] == f"{tower}.embeddings" and own[-1] == f"{tower}.{norm}"
    assert names.index("vision_model.embeddings.patch_embedding.weight") < names.index(
        "vision_model.post_layernorm.weight"
    )


def test_what_the_class_has_no_tensor_for_follows_what_has_most_of_its_name(tmp_path):
    base, models = make_clip(tmp_path)
    plan = plan_merge(recipe_from_flags({"base": base, "models": models, "method": "average"}, {}))
    known = "vision_model.encoder.layers.0.mlp.fc2.weight", "vision_model.encoder.layers.1.mlp.fc1.weight"
    fused = "vision_model.encoder.layers.0.mlp.experts.3.weight"
    assert in_model_order(plan, [known[1], fused, known[0]]) == [known[0], fused, known[1]]
