"""RegMean and Fisher merging, and the statistics they need, against NumPy, torch.autograd and plain transformers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracle_calibration as oracle
import pytest
import torch
from checkpoints import copy_backbone, make_clip, make_family, perturb, roberta_config, save
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_tasks import images, save_processor, save_tokenizer, texts, write_split, write_tasks
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModel,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

import cart_hf
from cart_hf.api import plan_merge
from cart_hf.calibration import Statistics, calibrate
from cart_hf.errors import UserError
from cart_hf.methods.fisher import fisher
from cart_hf.methods.regmean import regmean
from cart_hf.plan import Plan
from cart_hf.processes import Processes
from cart_hf.recipe import Recipe
from cart_hf.tasks import IMAGE, REGRESSION, TEXT

pytestmark = pytest.mark.usefixtures("own_caches")

ALONE, CPU = Processes(0, 1, torch.device("cpu")), torch.device("cpu")
TASKS, COUNT = ("task0", "task1", "task2"), 5
EVEN = [1.0] * 3
ROUNDING = 1e-12  # of squared gradients in float32: that of a key's bias is zero


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(seed: int, n: int, rows: int, tasks: int = 3) -> torch.Tensor:
    x = drawn(seed, tasks, rows, n) * 10 ** drawn(seed + 1, tasks, 1, n)  # features of very different sizes
    return x.mT @ x / rows


# --- RegMean's arithmetic


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_regmean_is_the_least_squares_solution(data: st.DataObject) -> None:
    tasks, m, n = (data.draw(st.integers(1, most), label) for label, most in (("tasks", 4), ("m", 6), ("n", 6)))
    seed, a = data.draw(st.integers(0, 2**32), "seed"), data.draw(st.sampled_from([0.0, 0.1, 0.9, 0.99]), "a")
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=tasks, max_size=tasks), "weights")
    models, grams = drawn(seed, tasks, m, n), spd(seed + 1, n, n + 3, tasks)
    found = regmean(models=models.clone(), grams=list(grams), weight=weights, non_diagonal=a)
    expected = oracle.regmean(models.numpy(), grams.numpy(), a, weights)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)
    order = torch.randperm(tasks, generator=torch.Generator().manual_seed(seed))
    turned = regmean(models=models[order], grams=list(grams[order]), weight=[weights[i] for i in order], non_diagonal=a)
    torch.testing.assert_close(turned, found)


def test_regmean_of_float32_and_of_matrices_that_are_stored_transposed() -> None:
    models, grams = drawn(1, 3, 5, 4), spd(2, 4, 9)
    expected = oracle.regmean(models.numpy(), grams.numpy(), 0.9, EVEN)
    stored = models.mT.float().contiguous().mT
    found = regmean(models=stored, grams=list(grams.float()), weight=EVEN, non_diagonal=0.9)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_equal_grams_give_the_average_and_a_dominating_one_its_model() -> None:
    models, grams = drawn(3, 3, 4, 6), spd(4, 6, 9)
    average = models.mean(dim=0)
    alike = regmean(models=models.clone(), grams=[grams[0]] * 3, weight=EVEN, non_diagonal=1.0)
    torch.testing.assert_close(alike, average)
    grams[1] = torch.eye(6, dtype=torch.float64) * 1e12
    torch.testing.assert_close(
        regmean(models=models.clone(), grams=list(grams), weight=EVEN, non_diagonal=0.9), models[1], atol=1e-6, rtol=0
    )
    alone = regmean(models=models[:1].clone(), grams=[grams[2]], weight=[2.0], non_diagonal=0.5)
    torch.testing.assert_close(alone, models[0])


@pytest.mark.parametrize("a", [0.0, 0.9, 1.0])
def test_what_no_input_reaches_stays_at_the_average(a: float) -> None:
    models, average = drawn(5, 3, 4, 6), drawn(5, 3, 4, 6).mean(dim=0)
    nothing = [torch.zeros(6, 6)] * 3
    torch.testing.assert_close(regmean(models=models.clone(), grams=nothing, weight=EVEN, non_diagonal=a), average)
    torch.testing.assert_close(regmean(models=models.clone(), grams=(), weight=EVEN, non_diagonal=a), average)
    x = torch.cat([drawn(6, 3, 2, 4), torch.zeros(3, 2, 2)], dim=2)  # few vectors, and two features that are never on
    grams = (x.mT @ x).float()
    found = regmean(models=models.clone(), grams=list(grams), weight=EVEN, non_diagonal=a)
    torch.testing.assert_close(found[:, 4:], average[:, 4:])
    assert found.isfinite().all()
    assert (found[:, :4] - average[:, :4]).norm() < 10 * (models - average).norm()


def test_what_is_seen_in_one_direction_only_is_fitted_there() -> None:
    models, x = drawn(7, 2, 4, 5), drawn(8, 1, 5)
    gram = x.mT @ x  # of rank one, in both models: the average is right for it
    found = regmean(models=models.clone(), grams=[gram, gram], weight=[1.0, 3.0], non_diagonal=1.0)
    torch.testing.assert_close(found @ x[0], (models[0] @ x[0] + 3 * models[1] @ x[0]) / 4, atol=1e-5, rtol=0)


# --- Fisher merging's arithmetic


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), tasks=st.integers(1, 4), weights=st.lists(st.floats(0.1, 10), min_size=4))
def test_fisher_is_the_weighted_average(seed: int, tasks: int, weights: list[float]) -> None:
    models, information, weights = drawn(seed, tasks, 9), drawn(seed + 1, tasks, 9).exp(), weights[:tasks]
    found = fisher(models=models.clone(), fisher=information.clone(), weight=weights, floor=1e-3)
    np.testing.assert_allclose(found, oracle.fisher(models.numpy(), information.numpy(), 1e-3, weights))
    turned = fisher(models=models.flip(0), fisher=information.flip(0), weight=weights[::-1], floor=1e-3)
    torch.testing.assert_close(turned, found)


def test_fisher_of_nothing_is_the_average_and_of_much_its_model() -> None:
    models, zeros = drawn(1, 3, 8).float(), torch.zeros(3, 8)
    found = fisher(models=models.clone(), fisher=zeros.clone(), weight=[1.0, 1.0, 2.0], floor=1e-6)
    torch.testing.assert_close(found, (models[0] + models[1] + 2 * models[2]) / 4)
    zeros[1] = 1e6
    torch.testing.assert_close(fisher(models=models.clone(), fisher=zeros, weight=EVEN, floor=1e-6), models[1])


# --- the statistics


@dataclass(frozen=True)
class World:
    """Fine-tuned models, and a recipe that names the examples of their tasks."""

    base: str
    models: Sequence[str]
    settings: Mapping[str, Any]

    def recipe(self, method: str, **changes: Any) -> Recipe:
        return Recipe.from_mapping({**self.settings, "merge_method": method, **changes})

    def statistics(self, method: str, **changes: Any) -> tuple[Plan, Statistics]:
        plan = plan_merge(self.recipe(method, **changes))
        return plan, calibrate(plan, ALONE)


def make_world(folder: Path, base: str, models: Sequence[str], tasks: Mapping[str, Mapping[str, Any]]) -> World:
    evaluation = {
        "tasks": list(tasks),
        "tasks_file": str(write_tasks(folder / "tasks.yaml", **tasks)),
        "data": str(folder / "data"),
        "batch_size": 2,
    }
    named = [{"model": model, "name": name} for model, name in zip(models, tasks, strict=True)]
    return World(base, models, {"base_model": base, "models": named, "evaluation": evaluation})


def words_of(task: str) -> list[str]:
    return texts(COUNT, seed=TASKS.index(task))


def text_world(folder: Path, family: str) -> World:
    base, models = make_family(folder, family)
    if family == "roberta":  # the last one is a regression
        model = RobertaForSequenceClassification(roberta_config(num_labels=1))
        copy_backbone(model, RobertaForMaskedLM.from_pretrained(base))
        perturb(model, seed=3)
        save(model, Path(models[2]))
    save_tokenizer(family, base)
    for task in TASKS:
        write_split(folder / "data" / task, "train", {"text": words_of(task)})
    kinds = dict.fromkeys(TASKS, TEXT) | ({"task2": REGRESSION} if family == "roberta" else {})
    return make_world(folder, base, models, {task: {"kind": kind, "text": "text"} for task, kind in kinds.items()})


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> World:
    return text_world(tmp_path_factory.mktemp("roberta"), "roberta")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> World:
    return text_world(tmp_path_factory.mktemp("gpt2"), "gpt2")


def calls(world: World, place: int) -> tuple[torch.nn.Module, list[Callable[[], torch.Tensor]]]:
    """Return a model as transformers loads it, and what runs it on one text at a time, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(world.models[place]).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    return model, [
        lambda t=text: model(**tokenizer(t, return_tensors="pt")).logits[0] for text in words_of(TASKS[place])
    ]


def matrices(plan: Plan) -> list[Any]:
    return [group for group in plan.groups() if group.is_whole]


@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_regmean_on_a_checkpoint(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    world = request.getfixturevalue(family)
    plan, statistics = world.statistics("regmean")
    expected = []
    for place in range(3):
        model, every = calls(world, place)
        names = [dict(group.tensors[0].inputs)[place].removesuffix(".weight") for group in matrices(plan)]
        expected.append(oracle.grams(model, names, every))
    assert len(matrices(plan)) == (12 if family == "roberta" else 8)
    result = cart_hf.merge(world.recipe("regmean", parameters={"alpha": 0.7}), output=tmp_path / "merged")
    merged = AutoModel.from_pretrained(result.output).state_dict()
    states = [AutoModel.from_pretrained(folder).state_dict() for folder in world.models]
    for group in matrices(plan):
        tensor = group.tensors[0]
        own = [expected[place][name.removesuffix(".weight")] for place, name in tensor.inputs]
        for gram, reference in zip(statistics.grams(plan, group, CPU), own, strict=True):
            assert gram.dtype == torch.float32
            np.testing.assert_allclose(gram, reference, rtol=1e-4, atol=1e-5)
        stored = [state[tensor.name].double().numpy() for state in states]
        turned = [matrix.T for matrix in stored] if family == "gpt2" else stored
        wanted = oracle.regmean(turned, own, 0.7, EVEN)
        np.testing.assert_allclose(merged[tensor.name], wanted.T if family == "gpt2" else wanted, atol=2e-5)
    for name in (tensor.name for tensor in plan.tensors if tensor.role == "average"):
        np.testing.assert_allclose(merged[name], np.mean([state[name].numpy() for state in states], axis=0), atol=1e-6)


def test_query_key_and_value_are_kept_once(roberta: World) -> None:
    _, statistics = roberta.statistics("regmean")
    layer = "roberta.encoder.layer.1.attention.self"
    stored = statistics.kept[0].stored
    assert stored[f"{layer}.query.weight"] == stored[f"{layer}.key.weight"] == stored[f"{layer}.value.weight"]
    assert len({stored[name] for name in stored if ".layer." in name}) == 2 * 4


def test_fisher_on_a_checkpoint(roberta: World, tmp_path: Path) -> None:
    plan, statistics = roberta.statistics("fisher", parameters={"normalize": False})
    expected = [oracle.fisher_diagonal(*calls(roberta, place)) for place in range(3)]
    information: list[dict[str, np.ndarray]] = [{}, {}, {}]
    for tensor in plan.tensors:
        found = statistics.fisher(plan, tensor, 0, tensor.elements, CPU).view(-1, *tensor.shape)
        for (place, name), own in zip(tensor.inputs, found.numpy(), strict=True):
            reference = expected[place].get(name, np.zeros(tensor.shape))  # a buffer has no gradient
            np.testing.assert_allclose(own, reference, rtol=1e-2, atol=ROUNDING, err_msg=name)
            information[place][tensor.name] = reference
    middle = statistics.fisher(plan, plan.tensors[0], 3, 11, CPU)
    torch.testing.assert_close(middle, statistics.fisher(plan, plan.tensors[0], 0, 16, CPU)[:, 3:11])
    result = cart_hf.merge(roberta.recipe("fisher"), output=tmp_path / "merged")
    merged = AutoModel.from_pretrained(result.output).state_dict()
    states = [AutoModel.from_pretrained(folder).state_dict() for folder in roberta.models]
    shared = oracle.brought_to_one_norm(information)
    for name in (tensor.name for tensor in plan.tensors):
        found, models = merged[name], [state[name].double().numpy() for state in states]
        wanted = oracle.fisher(models, [one.get(name, np.zeros(found.shape)) for one in shared], 1e-12, EVEN)
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=name)


def test_a_label_is_drawn_where_it_is_asked_for(roberta: World) -> None:
    limited = {"calibration": {"limit": 1, "labels": "sampled"}, "parameters": {"normalize": False}}
    plan, statistics = roberta.statistics("fisher", **limited)
    model, (answer, *_) = calls(roberta, 1)
    tensor = next(t for t in plan.tensors if t.name.endswith("layer.1.output.dense.weight"))
    value = model.get_parameter(dict(tensor.inputs)[1])
    squares = [torch.autograd.grad(one, value)[0].square() for one in (answer().log_softmax(0)[c] for c in range(3))]
    found = statistics.fisher(plan, tensor, 0, tensor.elements, CPU)[1].view(tensor.shape)
    distances = [float((found - square).norm() / square.norm()) for square in squares]
    assert sorted(distances)[0] < 1e-4 < sorted(distances)[1]
    _, other = roberta.statistics("fisher", seed=7, **limited)
    assert other.digest != statistics.digest


CLASSES = ["cat", "dog", "bird"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("clip")
    base, models = make_clip(folder, tasks=2)
    save_tokenizer("clip", base)
    save_processor("clip", base)
    names = TASKS[:2]
    for place, task in enumerate(names):
        write_split(folder / "data" / task, "train", {"image": images(COUNT, place, broken=(1,)), "label": [0] * COUNT})
    task = {"kind": IMAGE, "classes": CLASSES, "templates": ["a {}"]}
    return make_world(folder, base, models, dict.fromkeys(names, task))


def test_a_vision_tower_answers_with_its_clips_text_tower(clip: World) -> None:
    plan, statistics = clip.statistics("fisher", parameters={"normalize": False})
    whole = CLIPModel.from_pretrained(clip.base).double().eval()
    tower = CLIPVisionModel.from_pretrained(clip.models[1]).double().eval()
    whole.vision_model.load_state_dict(tower.state_dict())
    tokens = AutoTokenizer.from_pretrained(clip.base)(
        [f"a {name}" for name in CLASSES], padding=True, return_tensors="pt"
    )
    processor = AutoImageProcessor.from_pretrained(clip.base)
    stored = [one["bytes"] for i, one in enumerate(images(COUNT, 1)) if i != 1]
    pixels = [processor(Image.open(io.BytesIO(file)), return_tensors="pt")["pixel_values"].double() for file in stored]
    answers = [lambda p=one: whole(pixel_values=p, **tokens).logits_per_image[0] for one in pixels]
    for value in whole.text_model.parameters():
        value.requires_grad_(False)
    whole.text_projection.requires_grad_(False)
    expected = oracle.fisher_diagonal(whole.vision_model, answers)
    assert any(tensor.base_input and tensor.role == "elementwise" for tensor in plan.tensors)
    for tensor in plan.tensors:
        for place, name in tensor.inputs:
            if place == 1:
                own = statistics.fisher(plan, tensor, 0, tensor.elements, CPU)[1].view(tensor.shape)
                np.testing.assert_allclose(own, expected[name], rtol=1e-2, atol=ROUNDING, err_msg=name)


def test_a_text_tower_that_reads_nothing_is_averaged(clip: World, tmp_path: Path) -> None:
    wholes = []
    for number in range(2):
        model = CLIPModel.from_pretrained(clip.base)
        perturb(model, seed=number)
        wholes.append({"model": save(model, tmp_path / str(number)), "name": TASKS[number]})
    plan, statistics = clip.statistics("regmean", models=wholes)
    groups = {group.name: group for group in matrices(plan)}
    assert len(statistics.grams(plan, groups["text_model.encoder.layers.0.mlp.fc1.weight"], CPU)) == 0
    assert len(statistics.grams(plan, groups["vision_model.encoder.layers.0.mlp.fc1.weight"], CPU)) == 2
    merged = AutoModel.from_pretrained(cart_hf.merge(plan.recipe, output=tmp_path / "out").output).state_dict()
    states = [AutoModel.from_pretrained(entry["model"]).state_dict() for entry in wholes]
    for name, value in merged.items():
        if name.startswith("text_model") and value.is_floating_point():
            torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2)


# --- the cache, the recipe


def test_statistics_are_computed_once(roberta: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CART_HF_CACHE", str(tmp_path / "cache"))
    folder, read = tmp_path / "cache" / "calibration", [0]

    def progress(step: str, advance: int, total: int) -> None:
        read[0] += advance * (step == "calibrating")

    def merged(name: str, **parameters: float) -> bytes:
        read[0] = 0
        recipe = roberta.recipe("regmean", parameters=parameters)
        output = cart_hf.merge(recipe, output=tmp_path / name, progress=progress).output
        return (output / "model.safetensors").read_bytes()

    plan_merge(roberta.recipe("regmean"))
    assert not folder.exists()
    first = merged("first")
    assert read == [3 * COUNT]
    files = sorted(folder.iterdir())
    assert [file.name.split("-")[:2] for file in files] == [["gram", task] for task in TASKS]
    assert merged("second", non_diagonal=0.1) != first
    assert read == [0]
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    assert merged("third") == first
    assert read == [COUNT]
    assert len(files[1].read_bytes()) == len(whole)
    assert sorted(folder.iterdir()) == files


def test_what_decides_the_statistics_names_them(roberta: World) -> None:
    asked = [
        {},
        {"calibration": {"limit": 3}},
        {"dtype": "float64"},
        {"parameters": {"alpha": 0.2}},
        {"evaluation": {**roberta.settings["evaluation"], "limit": 2, "split": "test", "batch_size": 64}},
    ]
    plain, limited, *alike = [roberta.statistics("regmean", **changes)[1].digest for changes in asked]
    assert limited != plain
    assert alike == [plain] * 3


def test_settings_are_part_of_the_recipe(roberta: World, tmp_path: Path) -> None:
    recipe = roberta.recipe("fisher", calibration={"split": "test", "limit": 9, "labels": "exact"})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(UserError, match=r"limits.*did you mean 'limit'"):
        roberta.recipe("fisher", calibration={"limits": 9})


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_examples_must_be_named(method: str, roberta: World) -> None:
    recipe = roberta.recipe(method, evaluation=None)
    with pytest.raises(UserError, match=rf"{method} looks at .* evaluation: \{{tasks: \[\.\.\.\], data: FOLDER\}}"):
        plan_merge(recipe)


def test_fisher_needs_a_head_that_answers(roberta: World, tmp_path: Path) -> None:
    bare = []
    for task in TASKS[:2]:
        model = AutoModel.from_pretrained(roberta.base)
        bare.append({"model": save(model, tmp_path / task), "name": task})
    evaluation = {**roberta.settings["evaluation"], "tasks": TASKS[:2]}
    with pytest.raises(UserError, match=r"task0: .* is a RobertaModel: fisher needs models that answer"):
        roberta.statistics("fisher", models=bare, evaluation=evaluation)
    plan, statistics = roberta.statistics("regmean", models=bare, evaluation=evaluation)
    assert len(statistics.grams(plan, matrices(plan)[0], CPU)) == 2


def test_a_broken_checkpoint_and_a_cache_without_room(
    roberta: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(roberta.models[0])
    with torch.no_grad():
        model.roberta.encoder.layer[0].output.dense.bias[0] = float("inf")
    broken = [{"model": save(model, tmp_path / "broken"), "name": "task0"}, *roberta.settings["models"][1:]]
    with pytest.raises(UserError, match=r"calibration: task0 computes what is not finite at '.*': is the checkpoint"):
        roberta.statistics("regmean", models=broken)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CART_HF_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"calibration: cannot write .*CART_HF_CACHE"):
        roberta.statistics("regmean")
