"""Breadcrumbs, DELLA, Model Stock and SLERP: against the oracle, against mergekit, and at their edges.

tests/golden/mergekit_elementwise.json was written by mergekit 0.1.4 (transformers 4.57.6, `mergekit-yaml FILE OUT
--no-copy-tokenizer`) from the recipes below, as tests/test_mergekit.py has it. To write it anew:
python tests/test_elementwise_methods.py PATH/TO/mergekit-yaml
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import oracle_elementwise as oracle
import pytest
import torch
import yaml
from checkpoints import make_family
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_mergekit import DENSITIES, WEIGHTS, sample, write_checkpoints
from test_streaming import ALONE, Rank, silent

import cart_hf
from cart_hf.api import plan_merge
from cart_hf.errors import UserError
from cart_hf.merging import products, reading, slices, survey
from cart_hf.methods import get_method
from cart_hf.methods.breadcrumbs import breadcrumbs, kept_ranks
from cart_hf.methods.della import della, keep_probabilities
from cart_hf.methods.model_stock import model_stock
from cart_hf.methods.slerp import slerp
from cart_hf.recipe import recipe_from_flags

GOLDEN = Path(__file__).parent / "golden" / "mergekit_elementwise.json"
METHODS = ("breadcrumbs", "della", "model_stock", "slerp")


def tensors(count: int, *shape: int, seed: int = 0, spread: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a base and models near it, with something in common."""
    generator = torch.Generator().manual_seed(seed)
    base, common = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    own = torch.randn((count, *shape), generator=generator)
    return base, base + spread * (own + common)


def inner(models: torch.Tensor, base: torch.Tensor | float = 0.0) -> torch.Tensor:
    rows = (models.double() - base).flatten(start_dim=1)
    return rows @ rows.T


def ranges(base, models, density, gamma) -> list[tuple[float, float]]:
    """Return the thresholds by sorting."""
    found = []
    for tau, d, g in zip(models - base, density, gamma, strict=True):
        magnitudes = tau.abs().flatten().sort().values
        first, last = kept_ranks(len(magnitudes), d, g)
        found.append((float(magnitudes[first - 1]), float(magnitudes[last - 1])))
    return found


@given(n=st.integers(1, 400), density=st.floats(0.001, 1), gamma=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_breadcrumbs_keep_as_many_as_asked_and_at_least_one(n, density, gamma):
    first, last = kept_ranks(n, density, gamma)
    assert 1 <= first <= last <= n
    assert last - first + 1 == max(1, int(density * n))
    assert n - last == min(int(gamma * n), n - (last - first + 1))


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_breadcrumbs(normalize, elect):
    base, models = tensors(3, 7, 11)
    density, gamma, weight = [0.5, 0.2, 1.0], [0.1, 0.0, 0.3], [1.0, 0.5, 2.0]
    expected = oracle.breadcrumbs(base.numpy(), models.numpy(), 0.7, density, gamma, weight, normalize, elect)
    thresholds = ranges(base, models, density, gamma)
    told = {"scale": 0.7, "weight": weight, "normalize": normalize, "elect_signs": elect}
    merged = breadcrumbs(models=models, base=base, thresholds=thresholds, **told)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize(("normalize", "rescale"), [(True, True), (False, False)])
@pytest.mark.parametrize("shape", [(5, 9), (1, 1), (4, 1), (1, 30)])
def test_della(shape, normalize, rescale, elect):
    base, models = tensors(3, *shape)
    density, epsilon, weight = [0.5, 0.2, 1.0], [0.15, 0.4, 0.1], [1.0, 0.5, 2.0]
    drawn = torch.stack([torch.empty(shape).uniform_(generator=g) for g in seeded(3)]).numpy()
    told = {"density": density, "epsilon": epsilon, "weight": weight, "scale": 1.3}
    how = {"normalize": normalize, "rescale": rescale}
    expected = oracle.della(base.numpy(), models.numpy(), drawn, **told, **how, elect=elect)
    merged = della(models=models, base=base, generators=seeded(3), **told, **how, elect_signs=elect)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=2e-6)


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_della_keeps_the_expectation():
    base, models = tensors(1, 40, 50)
    total, draws = torch.zeros(40, 50), 400
    (generator,) = seeded(1)
    told = {"scale": 1.0, "density": [0.4], "epsilon": [0.2], "weight": [1.0], "elect_signs": False}
    for _ in range(draws):
        total += della(models=models.clone(), base=base, generators=[generator], **told) - base
    tau = models[0] - base
    spread = (tau.square() * (1 / keep_probabilities(tau, 0.4, 0.2) - 1) / draws).sqrt()
    error = (total / draws - tau) / spread
    assert error.abs().mean() == pytest.approx(0.8, abs=0.05)  # of a normal distribution: sqrt(2 / pi)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # each has its way to sort
def test_dellas_probabilities_where_magnitudes_tie(dtype):
    rows = torch.tensor([[0.0, 3.0, -0.0, -3.0, 1.0], [-1e-40, 1e-41, -1e30, 2.0, 0.0]], dtype=dtype)
    expected = torch.tensor([[0.3, 0.6, 0.4, 0.7, 0.5], [0.5, 0.4, 0.7, 0.6, 0.3]], dtype=dtype)
    torch.testing.assert_close(keep_probabilities(rows, 0.5, 0.2), expected)
    assert keep_probabilities(torch.ones(1, 3), 0.9, 0.15).tolist() == [pytest.approx([0.8, 0.9, 1.0])]


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_model_stock(count, filter_wise):
    base, models = tensors(count, 6, 10)
    expected = oracle.model_stock(base.numpy(), models.numpy(), filter_wise)
    told = {"products": inner(models, base), "filter_wise": filter_wise}
    merged = model_stock(models=models.clone(), base=base, **told)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-6)
    assert count == 1 or not torch.allclose(merged, models.mean(0), atol=1e-3)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_goes_to_the_base_where_the_models_disagree(filter_wise):
    base, models = tensors(1, 4, 5)
    models = torch.cat([models, 2 * base - models])
    told = {"products": inner(models, base), "filter_wise": filter_wise}
    assert torch.equal(model_stock(models=models, base=base, **told), base)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(t):
    base, _ = tensors(1, 6, 5)
    for _, models in (tensors(2, 6, 5, spread=1.0), tensors(2, 50, spread=0.01)):  # an arc, and a line
        expected = oracle.slerp(*models.numpy(), t)
        merged = slerp(models=models.clone(), products=inner(models), t=t)
        np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-6)
    opposite = torch.stack([base, -2 * base])
    assert torch.allclose(slerp(models=opposite.clone(), products=inner(opposite), t=0.5), -base / 2)
    nothing = torch.stack([base, 0 * base])
    assert torch.allclose(slerp(models=nothing.clone(), products=inner(nothing), t=0.5), base / 2)


CASES = {
    "no change": lambda base, models: base.expand_as(models),
    "one alike": lambda base, models: torch.cat([base[None], models[1:]]),
    "all alike": lambda base, models: models[:1].expand_as(models),
    "tied": lambda base, models: base + 0.5 * (models - base).sign(),
    "zeros": lambda base, models: 0 * models,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_degenerate_models_give_finite_merges(count, case, shape, dtype):
    base, models = (t.to(dtype) for t in tensors(count, *shape))
    models = CASES[case](base, models).clone()
    told = {"scale": 1.0, "weight": [1.0] * count, "normalize": True}
    thin = {"density": [0.4] * count, "epsilon": [0.5] * count, "generators": seeded(count)}
    thresholds = ranges(base, models, [0.4] * count, [0.2] * count)
    merges = {
        "breadcrumbs": breadcrumbs(models=models.clone(), base=base, thresholds=thresholds, **told),
        "della": della(models=models.clone(), base=base, **thin, **told),
        "stock": model_stock(models=models.clone(), base=base, products=inner(models, base)),
        "rows": model_stock(models=models.clone(), base=base, products=inner(models, base), filter_wise=True),
        "slerp": slerp(models=models[:2].clone(), products=inner(models[:2]), t=0.3),
    }
    for name, merged in merges.items():
        assert merged.dtype == dtype
        assert torch.isfinite(merged).all(), name
        if case == "no change":
            torch.testing.assert_close(merged, base)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("roberta"), "roberta")


def plan_of(base: str, models: list[str], method: str, **parameters: object):
    return plan_merge(recipe_from_flags({"base": base, "models": models, "method": method}, parameters))


def by_threads(plan, count: int) -> list:
    """Survey as several processes would."""
    barrier, shares = threading.Barrier(count, timeout=60), [None] * count
    ranks = [Rank(rank, count, torch.device("cpu"), barrier=barrier, shares=shares) for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: survey.survey(plan, 1, silent, rank), ranks))


def stored(plan, tensor) -> tuple[torch.Tensor, torch.Tensor]:
    models = torch.stack([plan.models[i].read(name).float() for i, name in tensor.inputs])
    return plan.base.read(tensor.base_input).float(), models


@pytest.mark.parametrize("sampled", [1, 10**6])
def test_the_ranges_of_breadcrumbs_are_exact(roberta, monkeypatch, sampled):
    plan = plan_of(*roberta, "breadcrumbs", density=0.3, gamma=0.05)
    monkeypatch.setattr(survey, "_SAMPLED", sampled)
    monkeypatch.setattr(survey, "BLOCK", 300)
    monkeypatch.setattr(survey, "CHUNK", 1000)
    found = survey.survey(plan, 2, silent, ALONE)
    assert by_threads(plan, 3) == [found] * 3
    for tensor in plan.tensors:
        wanted = ranges(*stored(plan, tensor), [0.3] * 3, [0.05] * 3)
        first, last = kept_ranks(tensor.elements, 0.3, 0.05)
        all_below, all_above = first == 1, last == tensor.elements
        ends = [(0.0 if all_below else low, np.inf if all_above else high) for low, high in wanted]
        assert found[tensor.name]["thresholds"] == ends
    assert not (all_below or all_above)


@pytest.mark.parametrize("density", [0.15, 0.5])
def test_breadcrumbs_in_float64(roberta, tmp_path, density):
    """The entries at both thresholds are kept, whichever way float32, in which magnitudes are counted, rounds them."""
    base, models = roberta
    told = {"method": "breadcrumbs", "density": density, "gamma": 0.1, "scale": 0.5}
    cart_hf.merge(base=base, models=models, output=tmp_path / "out", **told, dtype="float64", out_dtype="float64")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    origin, *states = (load_file(Path(folder) / "model.safetensors") for folder in (base, *models))
    for key in merged.keys() & origin.keys():
        stack = np.stack([state[key].double().numpy() for state in states])
        alike = ([density] * 3, [0.1] * 3, [1.0] * 3)
        expected = oracle.breadcrumbs(origin[key].double().numpy(), stack, 0.5, *alike)
        np.testing.assert_allclose(merged[key], expected, rtol=0, atol=1e-12, err_msg=key)
    assert len(merged.keys() & origin.keys()) > 30


def test_nothing_is_surveyed_where_breadcrumbs_keep_everything(roberta, monkeypatch):
    plan = plan_of(*roberta, "breadcrumbs", density=1.0, gamma=0.3)
    monkeypatch.setattr(survey, "read_block", None)
    ends = {pair for found in survey.survey(plan, 1, silent, ALONE).values() for pair in found["thresholds"]}
    assert ends == {(0.0, float("inf"))}


@pytest.mark.parametrize("method", ["model_stock", "slerp"])
def test_products_are_those_of_whole_tensors(roberta, monkeypatch, method):
    base, models = roberta
    plan = plan_of(base, models[:2] if method == "slerp" else models, method)
    whole = survey.survey(plan, 1, silent, ALONE)
    monkeypatch.setattr(products, "BLOCK", 150)
    monkeypatch.setattr(products, "CHUNK", 400)
    alone, *shared = survey.survey(plan, 2, silent, ALONE), *by_threads(plan, 3)
    for tensor in plan.tensors:
        origin, stack = stored(plan, tensor)
        expected = inner(stack, origin if method == "model_stock" else 0.0)
        for found in (whole, alone):
            torch.testing.assert_close(found[tensor.name]["products"], expected, rtol=1e-12, atol=1e-12)
        same = [torch.equal(found[tensor.name]["products"], alone[tensor.name]["products"]) for found in shared]
        assert all(same)


@pytest.mark.parametrize("method", METHODS)
def test_neither_blocks_nor_the_order_of_models_change_a_byte(roberta, tmp_path, monkeypatch, method):
    base, models = roberta
    models = models[:2] if method == "slerp" else models
    written = []
    for number, (block, order) in enumerate(((2**17, 1), (100, 1 if method == "slerp" else -1))):
        for module in (reading, slices):
            monkeypatch.setattr(module, "BLOCK", block)
        cart_hf.merge(base=base, models=models[::order], method=method, output=tmp_path / str(number))
        written.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_slerp_from_the_other_end(roberta, tmp_path):
    base, (first, second, third) = roberta
    for name, models, t in (
        ("there", [first, second], 0.3),
        ("back", [second, first], 0.7),
        ("start", [second, first], 0),
    ):
        cart_hf.merge(base=base, models=models, method="slerp", t=t, output=tmp_path / name)
    states = {name: load_file(tmp_path / name / "model.safetensors") for name in ("there", "back", "start")}
    start = load_file(Path(second) / "model.safetensors")
    for key, tensor in states["there"].items():
        torch.testing.assert_close(states["back"][key], tensor, rtol=0, atol=1e-6)
        assert torch.equal(states["start"][key], start[key])
    with pytest.raises(UserError, match="slerp merges 2 models"):
        cart_hf.merge(base=base, models=[first, second, third], method="slerp", output=tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_cuda_agrees_with_the_cpu(roberta, tmp_path, method):
    base, models = roberta
    states = []
    for device in ("cpu", "cuda"):
        models = models[:2] if method == "slerp" else models
        cart_hf.merge(base=base, models=models, method=method, device=device, output=tmp_path / device)
        states.append(load_file(tmp_path / device / "model.safetensors"))
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, atol=1e-6, rtol=0)


def test_what_tune_may_take_from_two_merges():
    assert [get_method(name).line for name in METHODS] == [True, True, False, False]


def recipes(base: str, models: list[str]) -> dict[str, tuple[dict, dict]]:
    """Return mergekit's recipes, and what changes in them for us."""
    sparse = [
        {"model": model, "parameters": {"weight": w, "density": d, "gamma": 0.1}}
        for model, w, d in zip(models, WEIGHTS, DENSITIES, strict=True)
    ]
    dense = [{"model": model, "parameters": {"weight": w}} for model, w in zip(models, WEIGHTS, strict=True)]
    # around one of them the others have something in common, so that no mean cosine is negative
    stock = {"merge_method": "model_stock", "base_model": models[0], "models": [{"model": m} for m in (base, *models)]}
    t = [{"filter": "attention", "value": [0.2, 0.9]}, {"value": 0.6}]
    return {
        "breadcrumbs": ({"merge_method": "breadcrumbs", "base_model": base, "models": sparse}, {}),
        "breadcrumbs with signs": (
            {"merge_method": "breadcrumbs_ties", "base_model": base, "models": sparse, "parameters": {"lambda": 0.4}},
            {"merge_method": "breadcrumbs", "parameters": {"lambda": 0.4, "elect_signs": True}},
        ),
        "della, nothing dropped": ({"merge_method": "della", "base_model": base, "models": dense}, {}),
        "della without signs, nothing dropped": (
            {"merge_method": "della_linear", "base_model": base, "models": dense},
            {"merge_method": "della", "parameters": {"normalize": False, "elect_signs": False}},
        ),
        "model stock": (stock, {}),
        "model stock, filter-wise": ({**stock, "parameters": {"filter_wise": True}}, {}),
        "slerp": (
            {
                "merge_method": "slerp",
                "base_model": models[1],
                "models": [{"model": models[0]}, {"model": models[1]}],
                "parameters": {"t": t},
            },
            {},
        ),
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("closed-form"))


@pytest.mark.parametrize("name", list(recipes("", ["", "", ""])))
def test_same_numbers_as_mergekit(checkpoints, tmp_path, name):
    theirs, changes = recipes(*checkpoints)[name]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**theirs, **changes, "dtype": "float32"}))
    cart_hf.merge(cart_hf.Recipe.load(tmp_path / "recipe.yaml"), output=tmp_path / "out")
    ours = sample(load_file(tmp_path / "out" / "model.safetensors"))
    golden = json.loads(GOLDEN.read_text())[name]
    assert ours.keys() == golden.keys()
    for key, values in golden.items():
        assert ours[key] == pytest.approx(values, abs=5e-7), key


def main(program: str, work: Path) -> None:
    """Write the golden file with a real mergekit."""
    golden = {}
    for number, (name, (recipe, _)) in enumerate(recipes(*write_checkpoints(work)).items()):
        (work / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "dtype": "float32"}))
        subprocess.run([program, work / "recipe.yaml", work / f"out{number}", "--no-copy-tokenizer"], check=True)
        files = sorted((work / f"out{number}").glob("*.safetensors"))
        golden[name] = sample({k: t for file in files for k, t in load_file(file).items()})
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1], Path(folder))
