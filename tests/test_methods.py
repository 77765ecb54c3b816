"""Every method on real checkpoint folders of every family, against the float64 oracle; and its properties."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from checkpoints import make_clip, make_family
from safetensors.torch import load_file

import cart_hf

FAMILIES = ["roberta", "bert", "distilbert", "vit", "gpt2", "clip"]


class Set:
    """A base and three fine-tuned models of one family, with their states as transformers loads them."""

    def __init__(self, folder: Path, family: str) -> None:
        self.family = family
        make = make_clip if family == "clip" else lambda f: make_family(f, family)
        self.base, self.models = make(folder)
        prefix = "vision_model." if family == "clip" else ""
        shared = oracle.state_of(self.models[0], prefix).keys()
        base_state = oracle.state_of(self.base)
        self.states = [
            {n: a for n, a in oracle.state_of(m, prefix).items() if self._real(n) and n in shared} for m in self.models
        ]
        self.base_state = {n: base_state[n] for n in self.states[0]}
        self.folder = folder
        self.count = 0

    def _real(self, name: str) -> bool:
        """RoBERTa's classifiers have no pooler: what AutoModel shows there is freshly drawn."""
        return not name.startswith("pooler.") or self.family == "bert"

    def merge(self, models=None, **options) -> dict[str, np.ndarray]:
        """Merge into a fresh folder and return the merged state as transformers loads it."""
        self.count += 1
        self.out = self.folder / f"out{self.count}"
        self.result = cart_hf.merge(base=self.base, models=models or self.models, output=self.out, **options)
        merged = oracle.state_of(str(self.out))
        return {n: merged[n] for n in self.states[0]}

    def bytes(self) -> bytes:
        return b"".join(path.read_bytes() for path in sorted(self.out.glob("*.safetensors")))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Set:
    return Set(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Set:
    return Set(tmp_path_factory.mktemp("roberta"), "roberta")


def assert_close(merged, expected, tolerance=2e-6):
    assert merged.keys() == expected.keys()
    for name, array in merged.items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=tolerance, err_msg=name)


def test_cart(family):
    merged = family.merge(rank_ratio=0.3, scale=1.7, solver="exact")
    assert_close(merged, oracle.cart(family.states, family.family, 1.7, ratio=0.3))
    names = {t.name for t in family.result.plan.tensors if t.role == "low_rank"}
    assert names == {n for n in family.states[0] if oracle.is_low_rank(family.family, n)}
    # and it is not merely the average
    plain = oracle.cart(family.states, family.family, 0.0, ratio=0.3)
    assert max(np.abs(merged[n] - plain[n]).max() for n in names) > 1e-2


def test_cart_by_energy(family):
    merged = family.merge(energy=0.7, scale=1.3, solver="exact")
    assert_close(merged, oracle.cart(family.states, family.family, 1.3, energy=0.7))


def test_average(family):
    assert_close(
        family.merge(method="average"),
        {n: oracle.average(np.stack([s[n] for s in family.states])) for n in family.states[0]},
    )


def test_task_arithmetic(family):
    assert_close(
        family.merge(method="task_arithmetic", scale=0.4), oracle.task_arithmetic(family.base_state, family.states, 0.4)
    )


@pytest.mark.parametrize("per_tensor", [False, True])
def test_ties(family, per_tensor):
    merged = family.merge(method="ties", density=0.25, scale=1.2, per_tensor=per_tensor)
    assert_close(merged, oracle.ties(family.base_state, family.states, 0.25, 1.2, per_tensor=per_tensor))


@pytest.mark.parametrize("density", [0.1, 0.25, 0.4, 0.55])
def test_ties_in_float64(roberta, density):
    """The entry at the threshold is kept, whether float32, in which magnitudes are counted, rounds it up or down."""
    merged = roberta.merge(method="ties", density=density, dtype="float64", out_dtype="float64")
    assert_close(merged, oracle.ties(roberta.base_state, roberta.states, density, 1.0))


def test_ties_disjoint_sum_and_weights(roberta):
    merged = roberta.merge(method="ties", density=0.5, scale=0.3, normalize=False, weights=[1.0, 0.5, 2.0])
    expected = oracle.ties(roberta.base_state, roberta.states, 0.5, 0.3, mean=False, weights=[1.0, 0.5, 2.0])
    assert_close(merged, expected)


def test_consensus(family):
    merged = family.merge(method="consensus", scale=0.5, mask_threshold=0.4, min_tasks=2)
    assert_close(merged, oracle.consensus(family.base_state, family.states, 0.5, 0.4, 2))


def test_dare_keeps_rescales_and_is_seeded(roberta):
    options = {"method": "dare", "weights": [1.0, 0.0, 0.0], "density": 0.3, "scale": 1.0}
    merged = roberta.merge(**options, seed=1)
    first = roberta.bytes()
    kept = total = 0
    for name, array in merged.items():
        change = array - roberta.base_state[name]
        rescaled = (roberta.states[0][name] - roberta.base_state[name]) / 0.3
        touched = np.abs(change) > 1e-7
        np.testing.assert_allclose(change[touched], rescaled[touched], atol=2e-6)
        kept, total = kept + touched.sum(), total + touched.size
    assert abs(kept / total - 0.3) < 0.03
    roberta.merge(**options, seed=1)
    assert roberta.bytes() == first
    roberta.merge(**options, seed=2)
    assert roberta.bytes() != first


def test_dare_at_full_density_is_task_arithmetic(roberta):
    merged = roberta.merge(method="dare", density=1.0, scale=0.3)
    assert_close(merged, oracle.task_arithmetic(roberta.base_state, roberta.states, 0.3))


def test_two_models_are_averaged_for_any_rank_and_scale(roberta):
    merged = roberta.merge(roberta.models[:2], rank_ratio=0.3, scale=3.0)
    assert_close(merged, {n: oracle.average(np.stack([s[n] for s in roberta.states[:2]])) for n in merged})
    assert "equals the weight average" in roberta.result.plan.warnings[0]


def test_full_rank_is_the_average_exactly(family):
    family.merge(rank_ratio=1.0, scale=2.5)
    full = family.bytes()
    family.merge(method="average")
    assert family.bytes() == full


def test_scale_zero_is_the_average_exactly(roberta):
    roberta.merge(rank_ratio=0.2, scale=0.0)
    zero = roberta.bytes()
    roberta.merge(method="average")
    assert roberta.bytes() == zero


@pytest.mark.parametrize("method", ["cart", "average", "task_arithmetic", "ties", "consensus", "dare"])
def test_the_order_of_the_models_changes_no_byte(roberta, method):
    roberta.merge(method=method)
    forward = roberta.bytes()
    roberta.merge(roberta.models[::-1], method=method)
    assert roberta.bytes() == forward


def test_the_number_of_workers_changes_no_byte(family):
    family.merge(scale=1.5, workers=1)
    alone = family.bytes()
    family.merge(scale=1.5, workers=4)
    assert family.bytes() == alone


def test_identical_models_merge_to_themselves(roberta):
    same = [f"{name}={roberta.models[0]}" for name in "abc"]
    assert_close(roberta.merge(same, scale=2.0), roberta.states[0], 1e-6)


def test_a_model_named_twice_weighs_double(roberta):
    a, b, c = roberta.models
    twice = roberta.merge([f"a={a}", f"again={a}", b, c], rank_ratio=0.3, scale=3.0)
    # four entries against three: the sum over entries is 4/3 of the mean-normalised weighted sum
    weighted = roberta.merge([f"a={a}", b, c], weights=[2.0, 1.0, 1.0], rank_ratio=0.3, scale=4.0)
    assert_close(twice, weighted)


def test_weighted_cart(roberta):
    merged = roberta.merge(rank_ratio=0.3, scale=1.5, weights=[3.0, 1.0, 0.5], solver="exact")
    assert_close(merged, oracle.cart(roberta.states, "roberta", 1.5, ratio=0.3, weights=[3.0, 1.0, 0.5]))


def test_weights_are_relative(roberta):
    roberta.merge(weights=[3.0, 1.0, 0.5])
    first = roberta.bytes()
    roberta.merge(weights=[6.0, 2.0, 1.0])
    assert roberta.bytes() == first


@pytest.mark.parametrize(
    ("name", "qkv"),
    [
        ("roberta", "encoder.layer.{}.attention.self.{}.weight query key value"),
        ("clip", "vision_model.encoder.layers.{}.self_attn.{}.weight q_proj k_proj v_proj"),
    ],
)
def test_fused_qkv_is_the_decomposition_of_the_stack(tmp_path, name, qkv):
    models = Set(tmp_path, name)
    merged = models.merge(rank_ratio=0.3, scale=1.5, fuse_qkv=True)
    pattern, *leaves = qkv.split(" ")
    for layer in range(2):
        names = [pattern.format(layer, leaf) for leaf in leaves]
        stack = np.stack([np.concatenate([s[n] for n in names]) for s in models.states])
        expected = oracle.cart_matrix(stack, lambda d: max(1, int(0.3 * 16)), 1.5)
        np.testing.assert_allclose(np.concatenate([merged[n] for n in names]), expected, atol=2e-6)


def test_include_and_exclude(roberta):
    merged = roberta.merge(rank=2, include=["word_embeddings"], exclude=["*.query.weight"])
    name = "embeddings.word_embeddings.weight"
    stack = np.stack([s[name] for s in roberta.states])
    np.testing.assert_allclose(merged[name], oracle.cart_matrix(stack, lambda d: 2, 1.0), atol=2e-6)
    name = "encoder.layer.1.attention.self.query.weight"
    np.testing.assert_allclose(merged[name], oracle.average(np.stack([s[name] for s in roberta.states])), atol=2e-6)


def test_gradients_and_filters_reach_each_layer(roberta):
    merged = roberta.merge(rank=2, scale=[{"filter": "intermediate", "value": 0.5}, {"value": [1.0, 2.0]}])
    for layer, scale in ((0, 1.0), (1, 2.0)):
        for part, expected_scale in (("output.dense", scale), ("intermediate.dense", 0.5)):
            name = f"encoder.layer.{layer}.{part}.weight"
            stack = np.stack([s[name] for s in roberta.states])
            np.testing.assert_allclose(merged[name], oracle.cart_matrix(stack, lambda d: 2, expected_scale), atol=2e-6)


def test_float64_arithmetic_is_closer_to_the_truth(roberta):
    merged = roberta.merge(rank_ratio=0.3, scale=1.7, dtype="float64", out_dtype="float64")
    stored = load_file(roberta.out / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float64}
    expected = oracle.cart(roberta.states, "roberta", 1.7, ratio=0.3)
    for name in merged:
        np.testing.assert_allclose(stored[f"roberta.{name}"].numpy(), expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_merged_in_float32_and_rounded_once(tmp_path, dtype):
    base, models = make_family(tmp_path, "roberta", dtype=dtype)
    cart_hf.merge(base=base, models=models, output=tmp_path / "out", rank_ratio=0.3, scale=1.7, solver="exact")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = oracle.cart([oracle.state_of(m) for m in models], "roberta", 1.7, ratio=0.3)
    for key, tensor in merged.items():
        assert tensor.dtype == dtype, key
        truth = torch.from_numpy(expected[key.removeprefix("roberta.")])
        once = truth.to(torch.float32).to(dtype)
        # a value that lies on a rounding boundary may fall to either side
        assert (tensor != once).float().mean() < 0.01, key
        torch.testing.assert_close(tensor.float(), once.float(), rtol=1e-2, atol=1e-3)


def test_output_type_is_chosen_by_the_recipe(roberta):
    for options in ({"out_dtype": "bfloat16"}, {"dtype": "bfloat16"}):
        roberta.merge(**options)
        assert {t.dtype for t in load_file(roberta.out / "model.safetensors").values()} == {torch.bfloat16}
        head = load_file(roberta.out / "tasks" / "task0" / "head.safetensors")
        assert {t.dtype for t in head.values()} == {torch.bfloat16}


def test_a_users_own_method_needs_one_function(roberta, monkeypatch):
    from cart_hf.methods import Parameter, method, registry

    @method(
        "maximum",
        parameters=(Parameter("push", 0.0, "added everywhere"),),
        summary="the largest",
        equation="merged = max_t W_t + push",
        citation="a test",
        needs_base=False,
    )
    def maximum(*, models: torch.Tensor, push: float) -> torch.Tensor:
        return models.amax(dim=0).add_(push)

    try:
        merged = roberta.merge(method="maximum", push=0.5)
        assert_close(merged, {n: np.max([s[n] for s in roberta.states], axis=0) + 0.5 for n in merged})
    finally:
        registry._METHODS.pop("maximum")


@pytest.mark.gpu
def test_cuda_agrees_with_the_oracle(family):
    merged = family.merge(rank_ratio=0.3, scale=1.7, device="cuda")
    assert_close(merged, oracle.cart(family.states, family.family, 1.7, ratio=0.3))


def test_nothing_is_left_beside_the_outputs(roberta):
    roberta.merge()
    assert not [p for p in roberta.folder.iterdir() if p.name.startswith(".")]
    shutil.rmtree(roberta.out)
