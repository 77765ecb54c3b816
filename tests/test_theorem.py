"""Theorem 1 against explicit sums in float64, on matrices that are made up and on inputs that plain transformers reads."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from checkpoints import SMALL, make_clip, make_family, roberta_config, save
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from small_tasks import images, save_processor, save_tokenizer, texts, write_split, write_tasks
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForSequenceClassification,
    AutoImageProcessor,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModel,
    GPT2ForSequenceClassification,
    RobertaForSequenceClassification,
)

from cart_hf.analysis.layer_inputs import is_transposed, layer_inputs, spread
from cart_hf.analysis.model import Bound
from cart_hf.analysis.theorem import check_theorem
from cart_hf.api import plan_merge
from cart_hf.errors import UserError
from cart_hf.factors.store import Centred
from cart_hf.linalg.low_rank import factorize
from cart_hf.parallel import silent
from cart_hf.plan import Plan
from cart_hf.processes import Processes
from cart_hf.recipe import Evaluation, Recipe
from cart_hf.tasks import IMAGE, TEXT

pytestmark = pytest.mark.usefixtures("own_caches")

ALONE = Processes(0, 1, torch.device("cpu"))
TASKS, COUNT, ALL = ("task0", "task1", "task2"), 5, 1000


# --- the two sides of the inequality


def checked(matrices: torch.Tensor, rank: int, inputs: Sequence[torch.Tensor], **options: bool) -> Bound:
    factors = factorize(matrices, rank=rank, solver="exact")
    centred = Centred(matrices.mean(dim=0), factors)
    return check_theorem(centred, name="w", centre="base", rank=rank, inputs=inputs, **options)


def direct(matrices: torch.Tensor, rank: int, inputs: Sequence[torch.Tensor]) -> dict[str, float]:
    """Every sum written out."""
    parts = []
    for u, s, vt in (np.linalg.svd(d, full_matrices=False) for d in matrices.double().numpy()):
        k = min(rank, int((s > 1e-6 * s[0]).sum()))
        parts.append((u[:, :k] * s[:k] @ vt[:k], s[:k], vt[:k]))
    loss = bound = unprojected = inside = whole = 0.0
    for t, (_, s_t, vt_t) in enumerate(parts):
        for x in inputs[t].double().numpy():
            c = vt_t @ x
            others = [part for s, part in enumerate(parts) if s != t]
            loss += np.linalg.norm(sum(d @ (vt_t.T @ c) for d, _, _ in others)) ** 2
            unprojected += np.linalg.norm(sum(d @ x for d, _, _ in others)) ** 2
            reach = sum(np.linalg.norm(np.diag(s) @ vt @ vt_t.T @ np.diag(s_t)) for _, s, vt in others)
            bound += (reach * np.linalg.norm(c / s_t)) ** 2
            inside, whole = inside + c @ c, whole + x @ x
    return {"loss": loss, "bound": bound, "unprojected": unprojected, "inside": inside / whole}


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("tasks", "m", "n", "rank"), [(3, 6, 6, 2), (4, 5, 9, 5), (2, 9, 4, 1), (3, 9, 4, 4), (5, 7, 8, 3)]
)
def test_both_sides_are_the_sums_written_out(tasks: int, m: int, n: int, rank: int) -> None:
    matrices = drawn(1, tasks, m, n)
    inputs = [drawn(10 + t, 2 + t, n) for t in range(tasks)]
    found, expected = checked(matrices, rank, inputs), direct(matrices, rank, inputs)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-9)
    assert (found.name, found.centre, found.rank) == ("w", "base", rank)
    assert found.inputs == sum(map(len, inputs))
    stored_inputs_first = checked(matrices.mT.contiguous(), rank, inputs, transposed=True)
    assert {name: getattr(stored_inputs_first, name) for name in expected} == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_loss_is_within_the_bound_whatever_the_matrices(data: st.DataObject) -> None:
    tasks, m, n = (data.draw(st.integers(1, most), label) for most, label in ((5, "tasks"), (9, "m"), (9, "n")))
    own = [data.draw(st.integers(0, min(m, n)), f"own rank of {t}") for t in range(tasks)]
    scales = [10.0 ** data.draw(st.integers(-8, 8), f"scale of {t}") for t in range(tasks)]
    rank, seed = data.draw(st.integers(1, min(m, n)), "rank"), data.draw(st.integers(0, 2**32), "seed")
    matrices = torch.stack([drawn(seed + t, m, r) @ drawn(seed + t + 9, r, n) * s for t, (r, s) in enumerate(zip(own, scales, strict=True))])  # fmt: skip
    if data.draw(st.booleans(), "float32"):
        matrices = matrices.float()
    found = checked(matrices, rank, [drawn(seed + 20 + t, t, n) for t in range(tasks)])
    assert 0 <= found.loss <= found.bound * (1 + 1e-9)


def test_orthogonal_row_spaces_do_not_interfere() -> None:
    q = torch.linalg.qr(drawn(2, 9, 9)).Q
    matrices = torch.stack([drawn(t, 5, 3) @ q[3 * t : 3 * t + 3] for t in range(3)])
    found = checked(matrices, 3, [drawn(5 + t, 4, 9) for t in range(3)])
    assert found.loss == pytest.approx(0, abs=1e-20)
    assert found.bound == pytest.approx(0, abs=1e-20)
    assert found.unprojected > 1
    own = [drawn(8 + t, 4, 3) @ q[3 * t : 3 * t + 3] for t in range(3)]
    assert checked(matrices, 3, own).inside == pytest.approx(1)


def test_equality_where_all_share_one_direction() -> None:
    u, v = torch.tensor([0.6, 0.8]).double(), torch.tensor([[1.0, 0, 0]]).double()
    matrices = torch.stack([sigma * torch.outer(u, v[0]) for sigma in (1.0, 2.0, 3.0)])
    found = checked(matrices, 1, [v, v, v])
    assert found.loss == pytest.approx(5**2 + 4**2 + 3**2)
    assert found.bound == pytest.approx(found.loss)


def test_at_full_rank_the_projection_changes_nothing() -> None:
    models, inputs = drawn(3, 4, 8, 6), [drawn(4 + t, 5, 6) for t in range(4)]
    centred = models - models.mean(dim=0)
    found = checked(centred, 6, inputs)
    assert found.inside == pytest.approx(1)
    assert found.loss == pytest.approx(found.unprojected)
    # centred matrices sum to zero: what the others do is minus what the task's own did
    own = sum(float((x @ d.mT).square().sum()) for d, x in zip(centred, inputs, strict=True))
    assert found.unprojected == pytest.approx(own)


def test_rounding_is_no_direction() -> None:
    left, right = torch.linalg.qr(drawn(5, 8, 4)).Q, torch.linalg.qr(drawn(6, 7, 4)).Q
    matrices = drawn(7, 3, 8, 7)
    matrices[1] = left * torch.tensor([2, 1, 1e-8, 1e-9]) @ right.mT
    clean = matrices.clone()
    clean[1] = left[:, :2] * torch.tensor([2, 1]) @ right[:, :2].mT
    inputs = [drawn(8 + t, 3, 7) for t in range(3)]
    found, expected = checked(matrices, 4, inputs), direct(clean, 4, inputs)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-6)


def test_nothing_in_is_nothing_out() -> None:
    matrices, inputs = drawn(1, 3, 4, 5), [drawn(t, 2, 5) for t in range(3)]
    matrices[2] = 0
    found, expected = checked(matrices, 2, inputs), direct(matrices[:2], 2, inputs[:2])
    assert (found.loss, found.bound) == pytest.approx((expected["loss"], expected["bound"]))
    zero = checked(torch.zeros(3, 4, 5), 2, inputs)
    assert (zero.loss, zero.bound, zero.unprojected, zero.inside) == (0, 0, 0, 0)
    unread = checked(matrices, 2, [torch.empty(0, 5)] * 3)
    assert (unread.inputs, unread.loss, unread.bound) == (0, 0, 0)
    assert np.isnan(unread.inside)


# --- what reaches the layers


@dataclass(frozen=True)
class World:
    """Fine-tuned models and the examples of their tasks."""

    models: Sequence[str]
    recipe: Recipe
    evaluation: Evaluation
    plan: Plan

    def inputs(self, rows: int = ALL, **changes: Any) -> Mapping[str, list[torch.Tensor]]:
        evaluation = self.evaluation.model_copy(update=changes)
        return layer_inputs(self.recipe, self.plan, evaluation, rows=rows, processes=ALONE)


def make_world(folder: Path, base: str, models: Sequence[str], task: Mapping[str, Any], **settings: Any) -> World:
    named = [{"model": model, "name": name} for model, name in zip(models, TASKS, strict=False)]
    recipe = Recipe.from_mapping({"merge_method": "cart", "base_model": base, "models": named, **settings})
    tasks_file = str(write_tasks(folder / "tasks.yaml", **{entry["name"]: dict(task) for entry in named}))
    names = tuple(entry["name"] for entry in named)
    evaluation = Evaluation(tasks=names, tasks_file=tasks_file, data=str(folder / "data"), split="test", batch_size=2)
    return World(models, recipe, evaluation, plan_merge(recipe, silent))


def words_of(task: str) -> list[str]:
    return texts(COUNT, seed=TASKS.index(task))


def text_world(folder: Path, base: str, models: Sequence[str], **settings: Any) -> World:
    for task in TASKS:
        write_split(folder / "data" / task, "test", {"text": words_of(task)})
    return make_world(folder, base, models, {"kind": TEXT, "text": "text", "max_length": None}, **settings)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("roberta")
    base, models = make_family(folder, "roberta")
    save_tokenizer("roberta", base)
    return text_world(folder, base, models)


@torch.no_grad()
def overheard(module: torch.nn.Module, names: Sequence[str], calls: Sequence[Callable[[], Any]]) -> list[torch.Tensor]:
    """Return every vector that reaches each module, in the order of the calls."""
    heard: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: heard[name].append(x[0].flatten(0, -2))
        )
    for call in calls:
        call()
    return [torch.cat(heard[name]) for name in names]


def read_alone(model: torch.nn.Module, names: Sequence[str], tokenizer: str, task: str) -> list[torch.Tensor]:
    """Let a model read one text after the other, so that there is no padding."""
    reader = AutoTokenizer.from_pretrained(tokenizer)
    return overheard(
        model.eval(), names, [lambda t=text: model(**reader(t, return_tensors="pt")) for text in words_of(task)]
    )


def places(found: torch.Tensor, expected: torch.Tensor) -> list[int]:
    """Return which of the expected vectors each one is."""
    distances, nearest = torch.cdist(found.double(), expected.double()).min(dim=1)
    assert distances.max() < 1e-5
    return nearest.tolist()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that they are the same vectors, in any order."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    places(found, expected)
    places(expected, found)


def modules(plan: Plan, prefix: str = "") -> list[str]:
    return [
        prefix + g.tensors[0].name.removesuffix(".weight") for g in plan.groups() if g.tensors[0].role == "low_rank"
    ]


def test_a_roberta_reads_its_own_tasks_texts_without_padding(roberta: World) -> None:
    found = roberta.inputs()
    names = modules(roberta.plan, "roberta.")
    assert len(found) == len(names) == 12
    for t, (folder, task) in enumerate(zip(roberta.models, TASKS, strict=True)):
        model = RobertaForSequenceClassification.from_pretrained(folder)
        for own, expected in zip(
            found.values(), read_alone(model, names, roberta.recipe.base_model.path, task), strict=True
        ):
            assert_same(own[t], expected)


def test_a_few_rows_are_the_same_tokens_in_all_layers_and_runs(roberta: World) -> None:
    found = roberta.inputs(rows=9)
    model = RobertaForSequenceClassification.from_pretrained(roberta.models[1])
    names = modules(roberta.plan, "roberta.")
    expected = read_alone(model, names, roberta.recipe.base_model.path, "task1")
    chosen = [places(own[1], all_) for own, all_ in zip(found.values(), expected, strict=True)]
    assert [len(one) for one in chosen] == [9] * 12
    assert len(set(chosen[-1])) == 9
    for name, one in zip(names, chosen, strict=True):
        if "layer.0.attention.self" not in name:  # to which the <s> of all texts are the same vector
            assert one == chosen[-1], name
    again = roberta.inputs(rows=9)
    assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], again[name], strict=True))
    assert [len(own) for own in roberta.inputs(rows=1)[next(iter(found))]] == [1, 1, 1]


def test_examples_are_limited_and_a_model_with_several_tasks_reads_the_first(roberta: World) -> None:
    name = "encoder.layer.1.output.dense.weight"
    whole = roberta.inputs()[name]
    limited = roberta.inputs(limit=2)[name]
    assert all(len(few) < len(all_) for few, all_ in zip(limited, whole, strict=True))
    tasks, heads = ("task2", "task0", "task1"), {"task2": "task0", "task0": "task2"}
    swapped = roberta.inputs(tasks=(*tasks, "sst2"), heads={**heads, "sst2": "task1"})[name]
    assert [len(own) for own in swapped] == [len(whole[t]) for t in (2, 1, 0)]


def test_a_model_without_a_task_and_a_task_without_a_model(roberta: World) -> None:
    with pytest.raises(
        UserError, match=r"task1: none of the tasks is this model's own.*heads: \{TASK: task1\}"
    ) as refused:
        roberta.inputs(tasks=("task0",))
    assert len(refused.value.problems) == 2
    with pytest.raises(UserError, match="task 'sst2': none of the models is called 'sst2'"):
        roberta.inputs(tasks=(*TASKS, "sst2"))


def test_a_fused_group_reads_once(roberta: World) -> None:
    recipe = roberta.recipe.model_copy(update={"parameters": {"fuse_qkv": True}})
    fused = World(roberta.models, recipe, roberta.evaluation, plan_merge(recipe, silent)).inputs()
    single = roberta.inputs()
    assert len(fused) == 8
    for own, expected in zip(
        fused["encoder.layer.1.attention.self.qkv"], single["encoder.layer.1.attention.self.key.weight"], strict=True
    ):
        assert torch.equal(own, expected)


def test_a_shared_layer_counts_with_its_first_call(tmp_path: Path) -> None:
    config = AlbertConfig(**SMALL, embedding_size=16, inner_group_num=1)
    base = save(AlbertForMaskedLM(config), tmp_path / "base")
    models = [save(AlbertForSequenceClassification(config), tmp_path / task) for task in TASKS]
    save_tokenizer("bert", base)
    world = text_world(tmp_path, base, models)
    single = AlbertForSequenceClassification.from_pretrained(models[1], num_hidden_layers=1)
    names = modules(world.plan, "albert.")
    for own, expected in zip(world.inputs().values(), read_alone(single, names, base, "task1"), strict=True):
        assert_same(own[1], expected)


def test_gpt2_stores_its_matrices_inputs_first(tmp_path: Path) -> None:
    base, models = make_family(tmp_path, "gpt2", tasks=2)
    save_tokenizer("gpt2", base)
    world = text_world(tmp_path, base, models)
    found = world.inputs()
    model = GPT2ForSequenceClassification.from_pretrained(models[1])
    for own, expected in zip(
        found.values(), read_alone(model, modules(world.plan, "transformer."), base, "task1"), strict=True
    ):
        assert_same(own[1], expected)
    groups = [group for group in world.plan.groups() if group.tensors[0].role == "low_rank"]
    assert all(is_transposed(world.plan, group) for group in groups)
    assert {group.shape for group in groups} == {(16, 48), (16, 16), (16, 64), (64, 16)}
    assert [found[group.name][0].shape[1] for group in groups] == [group.shape[0] for group in groups]


def test_an_adapter_reads_with_its_base(tmp_path: Path) -> None:
    base, _ = make_family(tmp_path, "roberta", tasks=0)
    save_tokenizer("roberta", base)
    references = []
    for task in TASKS[:2]:
        model = AutoModelForSequenceClassification.from_pretrained(base, config=roberta_config(num_labels=2))
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "dense"], task_type="SEQ_CLS"))
        for parameter in peft.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        peft.save_pretrained(tmp_path / task)
        references.append(f"{base}+{tmp_path / task}")
    world = text_world(tmp_path, base, references)
    names = modules(world.plan, "roberta.")
    whole = AutoModelForSequenceClassification.from_pretrained(base, config=roberta_config(num_labels=2))
    merged = PeftModel.from_pretrained(whole, tmp_path / "task1").merge_and_unload()
    for own, expected in zip(world.inputs().values(), read_alone(merged, names, base, "task1"), strict=True):
        assert_same(own[1], expected)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("clip")
    base, towers = make_clip(folder)
    save_tokenizer("clip", base)
    save_processor("clip", base)
    for number, task in enumerate(TASKS):
        broken = [3] if number == 2 else []
        write_split(folder / "data" / task, "test", {"image": images(COUNT, number, broken)}, image=datasets.Image())
    return make_world(folder, base, towers, {"kind": IMAGE, "classes": ["cat", "dog"], "templates": ["a {}"]})


def test_a_vision_tower_reads_its_tasks_images_but_the_broken_ones(clip: World) -> None:
    found = clip.inputs()
    processor = AutoImageProcessor.from_pretrained(clip.recipe.base_model.path)
    names = [name.removeprefix("vision_model.") for name in modules(clip.plan)]
    assert len(names) == 12
    for t, folder in enumerate(clip.models):
        model = CLIPVisionModel.from_pretrained(folder).eval()
        names = [name if hasattr(model, "encoder") else f"vision_model.{name}" for name in names]
        readable = [i for i in range(COUNT) if (t, i) != (2, 3)]
        pictures = [Image.open(io.BytesIO(images(COUNT, t)[i]["bytes"])).convert("RGB") for i in readable]
        calls = [lambda p=p, m=model: m(**processor(images=p, return_tensors="pt")) for p in pictures]
        for own, expected in zip(found.values(), overheard(model, names, calls), strict=True):
            assert_same(own[t], expected)
            assert len(own[t]) == 5 * len(readable)


def test_a_whole_clips_text_tower_reads_nothing(clip: World, tmp_path: Path) -> None:
    base = clip.recipe.base_model.path
    wholes = []
    for number, tower in enumerate(clip.models):
        model = CLIPModel.from_pretrained(base)
        model.vision_model.load_state_dict(CLIPVisionModel.from_pretrained(tower).state_dict())
        with torch.no_grad():
            for parameter in model.text_model.parameters():
                parameter.add_(number)
        wholes.append(save(model, tmp_path / str(number)))
    named = [{"model": model, "name": name} for model, name in zip(wholes, TASKS, strict=True)]
    recipe = Recipe.from_mapping({"merge_method": "cart", "base_model": base, "models": named})
    found = World(wholes, recipe, clip.evaluation, plan_merge(recipe, silent)).inputs()
    seen = clip.inputs()
    for name, own in found.items():
        for x, expected in zip(own, seen.get(name, [torch.empty(0, own[0].shape[1])] * 3), strict=True):
            torch.testing.assert_close(x, expected)
    assert len(found) == 24
    assert found["text_model.encoder.layers.0.mlp.fc2.weight"][0].shape == (0, 24)


def test_texts_are_not_for_a_vision_tower(clip: World, roberta: World) -> None:
    with pytest.raises(UserError, match="its examples are texts, the model reads images"):
        clip.inputs(tasks_file=roberta.evaluation.tasks_file, data=roberta.evaluation.data)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(0, 300), count=st.integers(0, 50))
def test_places_are_spread(size: int, count: int) -> None:
    found = spread(torch.arange(size), count)
    assert len(set(found.tolist())) == min(size, count)
    if 0 < count < size:  # the k-th lies in the k-th stretch
        edges = [k * size // count for k in range(count + 1)]
        assert all(edges[k] <= place < edges[k + 1] for k, place in enumerate(found.tolist()))


def test_stretches_as_long_as_an_image_do_not_give_the_same_patch() -> None:
    at_once = spread(torch.arange(32 * 50), 32) % 50
    in_batches = torch.cat([spread(torch.arange(4 * 50), 2, first) for first in range(0, 32, 2)]) % 50
    assert min(len(set(patches.tolist())) for patches in (at_once, in_batches)) > 20
