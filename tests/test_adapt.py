"""Adaptation against closed forms and finite differences in float64, on models that plain transformers runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from checkpoints import make_family, perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats
from small_tasks import save_tokenizer, texts, write_split, write_tasks
from transformers import AutoTokenizer, RobertaForSequenceClassification

import cart_hf
from cart_hf.adaptation.inputs import Inputs
from cart_hf.adaptation.learn import ends
from cart_hf.adaptation.objective import distance, entropy
from cart_hf.compression.merged import merge_as_adapter
from cart_hf.methods import all_methods
from cart_hf.methods.linear import combine
from cart_hf.plan.coefficients import Coefficients
from cart_hf.tasks import TEXT, TaskData, find_tasks

pytestmark = pytest.mark.usefixtures("own_caches")

COUNT = 6  # inputs of each task: one batch holds them all
TASKS = ("task0", "task1", "task2")
METHODS = {
    "cart": {"rank": 3, "scale": 1.5, "solver": "exact"},
    "task_arithmetic": {"scale": 0.3},
    "ties": {"density": 0.4, "scale": 0.8},
}


@pytest.fixture(scope="module", autouse=True)
def no_figures() -> Iterator[None]:
    """Be a machine without matplotlib: drawing takes longer than learning. `test_adapt_runs.py` looks at figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield


@dataclass(frozen=True, eq=False)
class World:
    """A base, three fine-tuned models, and unlabelled texts for each task."""

    base: str
    models: list[str]
    data: Path
    tasks_file: Path
    words: Mapping[str, list[str]]

    @property
    def examples(self) -> dict:
        return {"tasks": TASKS, "tasks_file": str(self.tasks_file), "data": str(self.data)}

    def adapt(self, output: Path, method: str, steps: int, **learning) -> cart_hf.Adapted:
        """Adapt by plain gradient descent on all inputs at once, unless told otherwise."""
        plain = {"steps": steps, "optimizer": "sgd", "lr": 1.0, "batch_size": COUNT}
        return cart_hf.adapt(
            output=output, base=self.base, models=self.models, method=method, learning={**plain, **learning},
            examples=self.examples, **METHODS[method],
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base, models = make_family(folder, "roberta")
    for seed, place in enumerate(models):
        make_decided(place, seed)
    save_tokenizer("roberta", base, *models)
    words = {task: texts(COUNT, seed=number, longest=3) for number, task in enumerate(TASKS)}
    for task, found in words.items():
        write_split(folder / "data" / task, "test", {"text": found})
    declared = {task: {"kind": TEXT, "text": "text", "max_length": None} for task in TASKS}
    return World(base, models, folder / "data", write_tasks(folder / "tasks.yaml", **declared), words)


def make_decided(folder: str, seed: int) -> None:
    """Let a model differ more from its base, and its head be surer, so that losses have slopes worth comparing."""
    model = RobertaForSequenceClassification.from_pretrained(folder)
    perturb(model.roberta, seed=seed + 20, size=0.15)
    with torch.no_grad():
        for layer, factor in ((model.classifier.dense, 10), (model.classifier.out_proj, 20)):
            layer.weight.mul_(factor)
    model.save_pretrained(folder)


@cache
def states(world: World) -> tuple[oracle.State, list[oracle.State]]:
    """The tensors that base and models have in common, in float64."""
    own = [oracle.state_of(model) for model in world.models]
    stored = {name.removeprefix("roberta.") for name in load_file(f"{world.models[0]}/model.safetensors")}
    whole = [{n: t.astype(np.float64) for n, t in state.items() if n in stored} for state in own]
    base = oracle.state_of(world.base)
    return {n: base[n].astype(np.float64) for n in whole[0]}, whole


@cache
def parts_of(world: World, method: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The centre and the terms of every tensor, from the papers' equations."""
    base, models = states(world)
    if method == "ties":
        terms = oracle.ties_terms(base, models, METHODS["ties"]["density"])
        return {name: (base[name], terms[name]) for name in base}
    if method == "task_arithmetic":
        return {name: (base[name], np.stack([m[name] - base[name] for m in models])) for name in base}
    found = {}
    for name in base:
        stack = np.stack([model[name] for model in models])
        centred = stack - stack.mean(axis=0)
        if oracle.is_low_rank("roberta", name):
            centred = np.stack([oracle.truncate(matrix, METHODS["cart"]["rank"]) for matrix in centred])
        found[name] = (stack.mean(axis=0), centred)
    return found


@cache
def answering(world: World) -> list[tuple[RobertaForSequenceClassification, dict, torch.Tensor]]:
    """Each task's model in float64, its texts as tokens, and the probabilities that it gives them by itself."""
    found = []
    for task, folder in zip(TASKS, world.models, strict=True):
        tokens = dict(AutoTokenizer.from_pretrained(folder)(world.words[task], padding=True, return_tensors="pt"))
        model = RobertaForSequenceClassification.from_pretrained(folder).double().eval()
        with torch.no_grad():
            found.append((model, tokens, model(**tokens).logits.softmax(-1)))
    return found


def loss_of(world: World, weights: Mapping[str, np.ndarray], objective: str = "entropy") -> float:
    """The sum over tasks of the mean loss, in float64, of models that have these weights and their own heads."""
    total = 0.0
    for model, tokens, own in answering(world):
        with torch.no_grad():
            model.roberta.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()}, strict=False)
            predicted = model(**tokens).logits.log_softmax(-1)
        target = predicted.exp() if objective == "entropy" else own
        total += float(-(target * predicted).sum(-1).mean())
    return total


def weights_at(parts: Mapping[str, tuple[np.ndarray, np.ndarray]], values) -> dict[str, np.ndarray]:
    """Every tensor with the coefficients that ``values`` returns for its name."""
    return {
        name: np.ascontiguousarray(centre + np.tensordot(values(name), terms, axes=1))
        for name, (centre, terms) in parts.items()
    }


def slope(world: World, method: str, tensors, task: int, objective: str = "entropy") -> float:
    """The central difference of the loss by the coefficient that a task has in all of these tensors."""
    parts, own, step = parts_of(world, method), METHODS[method]["scale"], 1e-4

    def at(offset: float) -> float:
        def values(name: str) -> np.ndarray:
            found = np.full(len(TASKS), own)
            found[task] += offset * (name in tensors)
            return found

        return loss_of(world, weights_at(parts, values), objective)

    return (at(step) - at(-step)) / (2 * step)


def learnt(folder: Path) -> dict[str, torch.Tensor]:
    return Coefficients.load(folder / "adaptation" / "coefficients.safetensors").values


QUERY, NORM = "encoder.layer.1.attention.self.query.weight", "encoder.layer.0.output.LayerNorm.weight"
WORDS, BIAS = "embeddings.word_embeddings.weight", "encoder.layer.1.intermediate.dense.bias"


@pytest.mark.parametrize(
    ("method", "objective"),
    [("cart", "entropy"), ("cart", "self-labels"), ("task_arithmetic", "entropy"), ("ties", "self-labels")],
)
def test_a_step_of_gradient_descent_goes_down_the_finite_differences(world, tmp_path, method, objective):
    world.adapt(tmp_path / "out", method, 1, objective=objective)
    found, own = learnt(tmp_path / "out"), METHODS[method]["scale"]
    for task, name in enumerate((QUERY, NORM, WORDS, BIAS)):
        expected = slope(world, method, [name], task % 3, objective)
        assert own - float(found[name][task % 3]) == pytest.approx(expected, rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_tensors_that_share_a_coefficient_share_the_sum_of_their_slopes(world, tmp_path, granularity):
    world.adapt(tmp_path / "out", "cart", 1, granularity=granularity)
    found = learnt(tmp_path / "out")
    mine = [name for name in found if granularity == "task" or name.startswith("encoder.layer.1.")]
    assert len({tuple(found[name].tolist()) for name in mine}) == 1
    outside = {tuple(found[name].tolist()) for name in found}
    assert len(outside) == (1 if granularity == "task" else 3)  # two blocks and the embeddings
    expected = slope(world, "cart", mine, 2)
    assert METHODS["cart"]["scale"] - float(found[QUERY][2]) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_fixed_coefficients_give_the_closed_form(world, tmp_path, method):
    """Without and with what a user could write by hand: a file of coefficients and a recipe that names it."""
    parts = parts_of(world, method)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(3, generator=generator) * 2 for name in parts}
    order = ("task2", "task0", "task1")
    Coefficients(method, order, values, {}).save(tmp_path / "mine.safetensors")
    recipe = {
        "merge_method": method, "base_model": world.base, "models": world.models, "parameters": METHODS[method],
        "coefficients": "mine.safetensors",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    cart_hf.merge(cart_hf.Recipe.load(tmp_path / "recipe.yaml"), output=tmp_path / "out")
    expected = weights_at(parts, lambda name: values[name].double().numpy()[[order.index(task) for task in TASKS]])
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        name = key.removeprefix("roberta.")
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-4, atol=2e-6, err_msg=name)


def test_fixed_directions_give_the_closed_form(world, tmp_path):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(3, 6, generator=generator) > 0.5
    values = torch.tensor([0.5, 2.0, 1.0])
    Coefficients("cart", TASKS, {QUERY: values}, {QUERY: mask}).save(tmp_path / "mine.safetensors")
    recipe = cart_hf.Recipe.from_mapping(
        {
            "merge_method": "cart", "base_model": world.base, "models": world.models, "parameters": METHODS["cart"],
            "coefficients": str(tmp_path / "mine.safetensors"),
        }
    )  # fmt: skip
    cart_hf.merge(recipe, output=tmp_path / "out")
    stack = np.stack([model[QUERY] for model in states(world)[1]])
    expected = stack.mean(axis=0)
    for matrix, value, kept in zip(stack - expected, values.tolist(), mask.numpy(), strict=True):
        left, singular, right = np.linalg.svd(matrix, full_matrices=False)
        expected = expected + value * (left[:, :6] * singular[:6] * kept) @ right[:6]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(merged[f"roberta.{QUERY}"].numpy(), expected, rtol=1e-4, atol=2e-6)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["tensors"][QUERY]["rank"] == 6


@pytest.mark.parametrize("method", [*METHODS, "dare", "consensus"])
def test_no_steps_give_the_bytes_of_the_static_merge(world, tmp_path, method):
    chosen = {"base": world.base, "models": world.models, "method": method, **METHODS.get(method, {})}
    cart_hf.merge(output=tmp_path / "static", **chosen)
    cart_hf.adapt(output=tmp_path / "adapted", learning={"steps": 0}, examples=world.examples, **chosen)
    assert_same_model(tmp_path / "static", tmp_path / "adapted")


def test_no_steps_with_a_choice_of_directions_give_the_bytes_of_the_static_merge(world, tmp_path):
    chosen = {"base": world.base, "models": world.models, **METHODS["cart"]}
    cart_hf.merge(output=tmp_path / "static", **chosen)
    learning = {"steps": 0, "mask_ratio": 1.0, "objective": "self-labels", "head_lr": 0.1}
    cart_hf.adapt(output=tmp_path / "adapted", learning=learning, examples=world.examples, **chosen)
    assert_same_model(tmp_path / "static", tmp_path / "adapted")


@pytest.mark.parametrize("method", ["cart", "ties"])
def test_terms_on_the_device_and_on_disk_learn_the_same(world, tmp_path, method):
    for place in ("disk", "device"):
        cart_hf.adapt(
            output=tmp_path / place, base=world.base, models=world.models, method=method, terms=place,
            learning={"steps": 3, "lr": 0.05, "batch_size": 2}, examples=world.examples, **METHODS[method],
        )  # fmt: skip
    assert_same_model(tmp_path / "disk", tmp_path / "device")


def assert_same_model(one: Path, other: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    for task in TASKS:
        head = Path("tasks") / task / "head.safetensors"
        assert (one / head).read_bytes() == (other / head).read_bytes()


def test_directions_are_kept_or_dropped_down_the_finite_differences(world, tmp_path):
    """One step far enough to move every logit by its slope's sign alone, unless the slope is next to nothing."""
    made = world.adapt(tmp_path / "out", "cart", 1, mask_ratio=1.0, lr=1e9)
    mask = made.coefficients.masks[QUERY]
    parts, own = parts_of(world, "cart"), METHODS["cart"]["scale"]
    stack = np.stack([model[QUERY] for model in states(world)[1]])
    matrix = (stack - stack.mean(axis=0))[1]
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    start = weights_at(parts, lambda name: np.full(3, own))
    checked = 0
    for direction in range(0, 16, 3):
        term = singular[direction] * np.outer(left[:, direction], right[direction])
        ends = [loss_of(world, start | {QUERY: start[QUERY] + sign * own * 1e-3 * term}) for sign in (1, -1)]
        difference = (ends[0] - ends[1]) / 2e-3
        if abs(difference) > 1e-6:
            checked += 1
            assert bool(mask[1, direction]) == (difference < 0), direction
    assert checked >= 4


def test_heads_go_down_their_own_gradients_and_stay_learnt_when_merged_again(world, tmp_path):
    """The gradient is what plain transformers and autograd find on the static merge."""
    cart_hf.merge(output=tmp_path / "static", base=world.base, models=world.models, **METHODS["cart"])
    world.adapt(tmp_path / "out", "cart", 1, objective="self-labels", head_lr=0.25)
    for task, folder in zip(TASKS, world.models, strict=True):
        tokens = AutoTokenizer.from_pretrained(folder)(world.words[task], padding=True, return_tensors="pt")
        target = RobertaForSequenceClassification.from_pretrained(folder).eval()(**tokens).logits.softmax(-1).detach()
        merged = RobertaForSequenceClassification.from_pretrained(tmp_path / "static", subfolder=f"tasks/{task}").eval()
        (-(target * merged(**tokens).logits.log_softmax(-1)).sum(-1).mean()).backward()
        found = load_file(tmp_path / "out" / "tasks" / task / "head.safetensors")
        assert set(found) == {f"classifier.{name}" for name, _ in merged.classifier.named_parameters()}
        for name, weight in merged.classifier.named_parameters():
            expected = (weight - 0.25 * weight.grad).detach()
            torch.testing.assert_close(found[f"classifier.{name}"], expected, rtol=1e-4, atol=1e-5)
            assert not torch.equal(found[f"classifier.{name}"], weight)
    cart_hf.merge(cart_hf.Recipe.load(tmp_path / "out" / "cart_hf.yaml"), output=tmp_path / "again")
    assert_same_model(tmp_path / "out", tmp_path / "again")


def test_heads_are_not_learnt_from_entropy(world, tmp_path):
    with pytest.raises(cart_hf.UserError, match="head_lr: a head makes any prediction sure"):
        world.adapt(tmp_path / "out", "cart", 1, head_lr=0.1)
    assert not (tmp_path / "out").exists()


def test_the_loss_that_is_reported_is_the_models(world, tmp_path):
    made = world.adapt(tmp_path / "out", "cart", 2, lr=0.5)
    values = dict.fromkeys(made.coefficients.values, np.full(3, METHODS["cart"]["scale"]))
    first = loss_of(world, weights_at(parts_of(world, "cart"), values.__getitem__))
    assert made.history.total[0] == pytest.approx(first, rel=1e-5)
    rows = (tmp_path / "out" / "adaptation" / "curves.csv").read_text().splitlines()
    assert rows[0] == "step,loss,task0,task1,task2"
    assert float(rows[1].split(",")[1]) == pytest.approx(first, rel=1e-5)


def test_many_steps_lower_the_entropy_of_what_is_written(world, tmp_path):
    cart_hf.merge(output=tmp_path / "static", base=world.base, models=world.models, **METHODS["cart"])
    world.adapt(tmp_path / "adapted", "cart", 30, optimizer="adam", lr=0.02)
    before, after = (
        loss_of(
            world,
            {
                key.removeprefix("roberta."): tensor.double().numpy()
                for key, tensor in load_file(tmp_path / name / "model.safetensors").items()
            },
        )
        for name in ("static", "adapted")
    )
    assert after < 0.98 * before


@given(st.integers(1, 4), st.sampled_from(sorted(all_methods())), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_linear_methods_terms_sum_to_its_result(count, name, seed):
    method = all_methods()[name]
    if method.linear is None:
        return
    torch.manual_seed(seed)
    models, base = torch.randn(count, 5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    weight = torch.rand(count).add_(0.1).tolist()
    known = {"weight": weight, "density": [0.5] * count, "mask_threshold": [0.4] * count}
    arguments = {
        p.name: known.get(p.name, [p.default] * count if p.per_model else p.default)
        for p in method.parameters
        if not p.planning and p.name != "solver"  # which is for what is decomposed
    }
    drawn = [{"generators": [torch.Generator().manual_seed(seed + t) for t in range(count)]} for _ in range(2)]
    inputs = [{"models": models.clone(), "base": base} | (drawn[i] if method.random else {}) for i in range(2)]
    for given_ in inputs:
        if method.survey:
            given_["thresholds"] = [(0.1, 1.5) if method.survey == "outliers" else 0.3] * count
        if method.name == "cart":
            del given_["base"]
    found = combine(*method.linear.terms(**inputs[0], **arguments), method.linear.coefficients(**arguments))
    if method.low_rank:  # of tensors that are not decomposed: the terms cancel
        expected = all_methods()["average"].function(models=models.clone(), weight=weight)
    else:
        expected = method.function(**inputs[1], **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_entropy_and_distance_are_what_scipy_says():
    logits, target = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    p, q = (x.softmax(-1).numpy() for x in (logits, target))
    np.testing.assert_allclose(entropy(logits).numpy(), stats.entropy(p, axis=-1))
    expected = stats.entropy(q, p, axis=-1) + stats.entropy(q, axis=-1)
    np.testing.assert_allclose(distance(logits, target).numpy(), expected)
    numbers = torch.randn(5, 1), torch.randn(5, 1)
    np.testing.assert_allclose(distance(*numbers).numpy(), ((numbers[0] - numbers[1]) ** 2)[:, 0].numpy())
    sure = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    entropy(sure).sum().backward()
    assert torch.isfinite(sure.grad).all()


def test_the_ends_of_a_curve_do_not_overlap():
    assert ends([]) is None
    assert ends([4.0]) == (4.0, 4.0)
    assert ends([4.0, 3.0, 1.0]) == (4.0, 1.0)
    assert ends([*[2.0] * 25, *[9.0] * 50, *[1.0] * 25]) == (2.0, 1.0)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_batches_read_every_row_before_any_row_again(rows, size, first, seed):
    import datasets

    task = find_tasks(["sst2"])[0]
    data = TaskData(task, "test", datasets.Dataset.from_dict({"sentence": ["x"] * rows}), None, (), "here")
    inputs = Inputs(task, data, 0)
    whole = list(inputs.batches(0, 12, size, seed))
    assert {len(batch) for batch in whole} == {min(size, rows)}
    flat = [row for batch in whole for row in batch]
    for start in range(0, len(flat) - rows + 1, rows):
        assert sorted(flat[start : start + rows]) == list(range(rows))
    assert list(inputs.batches(first, 12, size, seed)) == whole[first:]


def test_coefficients_that_are_not_of_the_merge_are_refused(world, tmp_path):
    recipe = {"merge_method": "cart", "base_model": world.base, "models": world.models, "parameters": {"rank": 3}}
    values = {QUERY: torch.ones(3)}
    wrong = {
        "learnt for ties": Coefficients("ties", TASKS, values, {}),
        "learnt for the models": Coefficients("cart", ("task0", "task1", "other"), values, {}),
        "did you mean": Coefficients("cart", TASKS, {QUERY.replace("query", "qery"): torch.ones(3)}, {}),
        "not one number for each": Coefficients("cart", TASKS, {QUERY: torch.ones(2)}, {}),
        "not finite": Coefficients("cart", TASKS, {QUERY: torch.tensor([1.0, float("nan"), 1.0])}, {}),
    }
    for message, coefficients in wrong.items():
        coefficients.save(tmp_path / "mine.safetensors")
        chosen = cart_hf.Recipe.from_mapping(recipe | {"coefficients": str(tmp_path / "mine.safetensors")})
        with pytest.raises(cart_hf.UserError, match=message):
            cart_hf.merge(chosen, output=tmp_path / "out")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    for name, message in (("other", "no file of coefficients"), ("missing", "No such file")):
        chosen = cart_hf.Recipe.from_mapping(recipe | {"coefficients": str(tmp_path / f"{name}.safetensors")})
        with pytest.raises(cart_hf.UserError, match=message):
            cart_hf.merge(chosen, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_an_adapted_merge_keeps_what_the_recipe_names(world, tmp_path):
    world.adapt(tmp_path / "adapted", "cart", 1)
    recipe = cart_hf.Recipe.load(tmp_path / "adapted" / "cart_hf.yaml")
    cart_hf.compress(recipe, output=tmp_path / "small")
    assert "coefficients" not in (tmp_path / "small" / "cart_hf.yaml").read_text()
    merge_as_adapter(recipe, output=tmp_path / "lora", rank=16)
    for task in TASKS:
        folder = tmp_path / "lora" / "adapters" / task
        assert json.loads((folder / "compress.json").read_text())["adaptation"]["objective"] == "entropy"
        again = cart_hf.Recipe.load(folder / "cart_hf.yaml")
        assert Coefficients.load(Path(again.coefficients or "")).tasks == TASKS
        assert (folder / "adaptation" / "inputs.safetensors").is_file()
