"""A compressed folder answered from: every task by its own adapter, as its fine-tuned model or PEFT itself answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from checkpoints import make_clip, make_family, perturb, save
from commands import call, succeed
from peft import PeftModel
from plain_loops import class_vectors, forwards_of, outcomes, text_logits
from safetensors.torch import load_file, save_file
from small_tasks import images, numbers, save_processor, save_tokenizer, texts, write_split, write_tasks
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, CLIPModel, CLIPVisionModel

import cart_hf
from cart_hf.cache import cache_folder
from cart_hf.recipe import Evaluation
from cart_hf.tasks import IMAGE, TEXT

pytestmark = pytest.mark.usefixtures("own_caches")

COUNT, BATCH = 11, 4
EVERYTHING: dict[str, Any] = {"rank_ratio": 1.0, "restore": "all"}
CLASSES, TEMPLATES = ["cat", "dog", "newt"], ["a {}", "{} ab"]
TOKENS = {
    "input_ids": torch.tensor([[4, 5, 6, 7, 9], [8, 9, 11, 1, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


def compress(base: str, models: list[str], output: Path, **settings: Any) -> Path:
    cart_hf.compress(base=base, models=models, output=output, device="cpu", workers=1, **settings)
    return output


def auto(family: str) -> Any:
    return AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor] = TOKENS) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**batch).logits
    return found


def by_peft(folder: Path, task: str) -> torch.Tensor:
    """Return what PEFT makes of a task's model and its adapter."""
    whole = AutoModelForSequenceClassification.from_pretrained(folder, subfolder=f"tasks/{task}")
    return logits(PeftModel.from_pretrained(whole, str(folder / "adapters" / task)))


@torch.no_grad()
def answers(model: Any, *tasks: str, batch: dict[str, torch.Tensor] = TOKENS) -> dict[str, torch.Tensor]:
    return {name: output.logits for name, output in model(tasks=tasks or None, **batch).items()}


@dataclass(frozen=True)
class World:
    """A base, fine-tuned models, and what was made of them: ``exact`` loses nothing, ``rough`` has few directions."""

    folder: Path
    base: str
    models: list[str]

    @property
    def exact(self) -> Path:
        return self.folder / "exact"

    @property
    def rough(self) -> Path:
        return self.folder / "rough"

    def evaluation(self, *names: str, **changes: Any) -> Evaluation:
        given = {"tasks_file": str(self.folder / "mine.yaml"), "data": str(self.folder / "data"), "batch_size": BATCH}
        return Evaluation(**({"tasks": names, "dtype": "float32"} | given | changes))

    def arguments(self) -> list[Any]:
        return ["--tasks-file", self.folder / "mine.yaml", "--data", self.folder / "data", "--batch-size", BATCH]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("compressed")
    base, models = make_family(folder, "roberta")
    save_tokenizer("roberta", base, *models)
    tasks = {}
    for number, place in enumerate(models):
        model = AutoModelForSequenceClassification.from_pretrained(place)
        perturb(model, seed=20 + number, size=0.3)
        save(model, Path(place))
        names = [f"roberta{number}-{i}" for i in range(number + 2)]
        rows = {"first": texts(COUNT, seed=number), "label": numbers(COUNT, number + 2, seed=number)}
        write_split(folder / "data" / f"task{number}", "test", rows, label=names)
        tasks[f"task{number}"] = {"kind": TEXT, "text": "first"}
    write_tasks(folder / "mine.yaml", **tasks)
    found = World(folder, base, models)
    compress(base, models, found.exact, **EVERYTHING)
    compress(base, models, found.rough, energy=0.5)
    return found


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Path:
    """A compressed folder to change."""
    return Path(shutil.copytree(world.rough, tmp_path / "copy"))


# --- text and image classifiers


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_every_task_answers_as_its_fine_tuned_model(tmp_path: Path, family: str) -> None:
    base, models = make_family(tmp_path, family, tasks=2)
    folder = compress(base, models, tmp_path / "out", **EVERYTHING)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)} if family == "vit" else TOKENS
    found = answers(cart_hf.MultiTaskModel.from_pretrained(folder), batch=batch)
    for task, original in zip(("task0", "task1"), models, strict=True):
        expected = logits(auto(family).from_pretrained(original), batch)
        centre = logits(auto(family).from_pretrained(folder, subfolder=f"tasks/{task}"), batch)
        torch.testing.assert_close(found[task], expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(centre, expected, atol=1e-3), "the adapter would not be missed"


def test_one_pass_for_each_task_in_any_order(world: World) -> None:
    model = cart_hf.MultiTaskModel.from_pretrained(world.exact)
    assert model.tasks == ["task0", "task1", "task2"]
    expected = {f"task{i}": logits(AutoModelForSequenceClassification.from_pretrained(m)) for i, m in enumerate(world.models)}  # fmt: skip
    with forwards_of(transformers.RobertaModel) as seen:
        for order in (["task2", "task0"], ["task0"], ["task1", "task2", "task0"], ["task2"]):
            seen.clear()
            found = answers(model, *order)
            assert list(found) == order
            assert len(seen) == len(order)
            for task in order:
                torch.testing.assert_close(found[task], expected[task], atol=1e-5, rtol=1e-5)


def test_few_directions_answer_as_peft_does(world: World) -> None:
    """Ranks differ from layer to layer and from task to task."""
    configs = [json.loads((world.rough / "adapters" / f"task{i}" / "adapter_config.json").read_text()) for i in (0, 1)]
    assert configs[0]["rank_pattern"] != configs[1]["rank_pattern"]
    found = answers(cart_hf.MultiTaskModel.from_pretrained(world.rough))
    for task, original in zip(found, world.models, strict=True):
        torch.testing.assert_close(found[task], by_peft(world.rough, task), atol=1e-5, rtol=1e-5)
        exact = logits(AutoModelForSequenceClassification.from_pretrained(original))
        assert not torch.allclose(found[task], exact, atol=1e-3)


def test_heads_saved_layer_by_layer(world: World, tmp_path: Path) -> None:
    folder = compress(world.base, world.models, tmp_path / "out", rank=3, restore="none")
    found = answers(cart_hf.MultiTaskModel.from_pretrained(folder))
    for task in found:
        torch.testing.assert_close(found[task], by_peft(folder, task), atol=1e-5, rtol=1e-5)


def test_the_head_is_the_adapters(copy: Path) -> None:
    """As with PEFT: an adapter that was trained on brings its head along."""
    change(copy / "adapters" / "task1", lambda name, tensor: (name, tensor + 1 if "classifier" in name else tensor))
    found = answers(cart_hf.MultiTaskModel.from_pretrained(copy))
    torch.testing.assert_close(found["task1"], by_peft(copy, "task1"), atol=1e-5, rtol=1e-5)


def test_only_the_tasks_that_are_asked_for_are_loaded(world: World, copy: Path) -> None:
    shutil.rmtree(copy / "adapters" / "task0")
    model = cart_hf.MultiTaskModel.from_pretrained(copy, tasks=["task2"])
    assert (model.tasks, model.adapters.tasks) == (["task2"], ["task2"])
    whole = cart_hf.MultiTaskModel.from_pretrained(world.rough)
    torch.testing.assert_close(answers(model)["task2"], answers(whole, "task2")["task2"])
    assert len(model.state_dict()) < len(whole.state_dict()) / 2
    with pytest.raises(cart_hf.UserError, match="has no adapters/task0, only those of task1, task2"):
        cart_hf.MultiTaskModel.from_pretrained(copy)


def test_names_with_dots_and_many_adapters(world: World, tmp_path: Path) -> None:
    """PEFT's own names for adapters hold no dots, and none of eleven is part of another."""
    folder = tmp_path / "many"
    shutil.copytree(world.rough, folder, ignore=shutil.ignore_patterns("task?"))
    for number in range(11):
        for kind in ("tasks", "adapters"):
            shutil.copytree(world.rough / kind / f"task{number % 3}", folder / kind / f"v1.{number}")
    few = answers(cart_hf.MultiTaskModel.from_pretrained(world.rough))
    many = answers(cart_hf.MultiTaskModel.from_pretrained(folder))
    for number in range(11):
        torch.testing.assert_close(many[f"v1.{number}"], few[f"task{number % 3}"])


@pytest.mark.parametrize("way", ["loaded", "moved"])
def test_bfloat16(world: World, way: str) -> None:
    if way == "loaded":
        model = cart_hf.MultiTaskModel.from_pretrained(world.exact, dtype=torch.bfloat16)
    else:
        model = cart_hf.MultiTaskModel.from_pretrained(world.exact).to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    found = answers(model)
    for task, original in zip(found, world.models, strict=True):
        rounded = AutoModelForSequenceClassification.from_pretrained(original, dtype=torch.bfloat16)
        torch.testing.assert_close(found[task], logits(rounded), atol=0.1, rtol=0.05)


def test_factors_stored_in_half_are_added_in_the_models_type(copy: Path) -> None:
    for task, kind in (("task0", torch.float16), ("task1", torch.bfloat16)):
        change(copy / "adapters" / task, lambda name, tensor, kind=kind: (name, tensor.to(kind)))
    model = cart_hf.MultiTaskModel.from_pretrained(copy)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    found = answers(model)
    for task in found:
        torch.testing.assert_close(found[task], by_peft(copy, task), atol=1e-5, rtol=1e-5)


def test_a_device_map(world: World) -> None:
    plain, mapped = (
        cart_hf.MultiTaskModel.from_pretrained(world.rough, **options) for options in ({}, {"device_map": "cpu"})
    )
    for one, other in zip(answers(plain).values(), answers(mapped).values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_adapters_follow_the_model_to_a_gpu(world: World) -> None:
    expected = answers(cart_hf.MultiTaskModel.from_pretrained(world.rough))
    batch = {name: tensor.cuda() for name, tensor in TOKENS.items()}
    moved = cart_hf.MultiTaskModel.from_pretrained(world.rough).cuda()
    mapped = cart_hf.MultiTaskModel.from_pretrained(world.rough, device_map="cuda")
    for model in (moved, mapped):
        for task, found in answers(model, batch=batch).items():
            torch.testing.assert_close(found.cpu(), expected[task], atol=1e-4, rtol=1e-4)


# --- adapters that do not fit


Change = Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]


def change(adapter: Path, rename: Change) -> None:
    """Rewrite an adapter's tensors one by one; None leaves one out."""
    path = adapter / "adapter_model.safetensors"
    kept = [rename(name, tensor) for name, tensor in load_file(path).items()]
    save_file(dict(pair for pair in kept if pair is not None), path, metadata={"format": "pt"})


def renamed(old: str, new: str) -> Change:
    return lambda name, tensor: (name.replace(old, new), tensor)


def without(part: str) -> Change:
    return lambda name, tensor: None if part in name else (name, tensor)


QUERY = "encoder.layer.0.attention.self.query"
BAD_TENSORS: dict[str, tuple[Change, str]] = {
    "a layer that is not there": (renamed("layer.1.", "layer.9."), "the model has no place for its .*layer.9"),
    "another model's names": (renamed("roberta.", "bert."), "the model has no place for its bert.embeddings.*more"),
    "no such part of a layer": (renamed("lora_A", "lora_C"), "the model has no place for its .*lora_C"),
    "no such layer of the head": (renamed("out_proj", "last"), "no place for its classifier.last"),
    "a factor is missing": (
        without(f"{QUERY}.lora_A"),
        f"its adapter_config.json names layers whose tensors it lacks: roberta.{QUERY}.lora_A.weight",
    ),
    "a norm is missing": (without("embeddings.LayerNorm.bias"), "lacks: roberta.embeddings.LayerNorm.bias"),
    "another size": (
        lambda name, tensor: (name, tensor[:, :-1].contiguous() if "query.lora_A" in name else tensor),
        rf"tensor 'roberta.{QUERY}.lora_A.weight' has shape \[\d+, 15\], the model's is \[\d+, 16\]",
    ),
    "a head of another size": (
        lambda name, tensor: (name, tensor[:-1].contiguous() if "out_proj" in name else tensor),
        r"tensor 'classifier.out_proj.\w+' has shape",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_tensor_that_does_not_fit_is_refused(copy: Path, case: str) -> None:
    """PEFT would pass over most of them, and the task would be answered without its adapter."""
    rename, message = BAD_TENSORS[case]
    change(copy / "adapters" / "task1", rename)
    with pytest.raises(cart_hf.UserError, match=rf"adapters/task1: .*{message}"):
        cart_hf.MultiTaskModel.from_pretrained(copy, tasks=["task1"])


BAD_FILES: dict[str, tuple[str, bytes | None, str]] = {
    "no settings": ("adapter_config.json", None, "task1 has no adapter_config.json"),
    "no weights": ("adapter_model.safetensors", None, "task1 has no adapter_model.safetensors"),
    "cut weights": ("adapter_model.safetensors", b"\x10\0\0", "cannot read .*task1/adapter_model.safetensors"),
    "no JSON": ("adapter_config.json", b"{", "task1/adapter_config.json: PEFT cannot read it"),
    "no mapping": ("adapter_config.json", b"[]", "task1/adapter_config.json: PEFT cannot read it"),
    "no kind": ("adapter_config.json", b'{"r": 3}', "task1/adapter_config.json: PEFT cannot read it"),
    "no layer": (
        "adapter_config.json",
        b'{"peft_type": "LORA", "target_modules": ["up"]}',
        "adapters/task1: PEFT cannot add it to the model",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_broken_adapter_is_refused(copy: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    path = copy / "adapters" / "task1" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(cart_hf.UserError, match=message):
        cart_hf.MultiTaskModel.from_pretrained(copy, tasks=["task1"])


# --- measured


def test_a_compressed_folder_scores_as_the_individual_models(world: World, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    succeed("evaluate", world.exact, *world.arguments(), "--normalize", "--output", file)
    found = cart_hf.Results.load(file)
    assert found.individual == {task: result.score for task, result in found.tasks.items()}
    assert found.normalized == 1.0
    together = outcomes(world.exact, world.evaluation())
    centre = outcomes(world.exact / "tasks" / "task2", world.evaluation("task2"))["task2"].predictions
    for task, original in zip(("task0", "task1", "task2"), world.models, strict=True):
        alone = outcomes(original, world.evaluation(task))[task].predictions
        assert together[task].predictions.tolist() == alone.tolist()
        assert together[task].result.score == found.tasks[task].score
        assert len(set(alone)) > 1, "a test that any constant passes"
    assert together["task2"].predictions.tolist() != centre.tolist()


def test_an_adapter_by_itself(world: World) -> None:
    """It is measured on the base that it names, or on the one that is given with it."""
    adapter = world.exact / "adapters" / "task1"
    expected = outcomes(world.models[1], world.evaluation("task1"))["task1"].predictions.tolist()
    for model in (adapter, f"{world.exact / 'tasks' / 'task1'}+{adapter}"):
        assert outcomes(model, world.evaluation("task1"))["task1"].predictions.tolist() == expected


def test_adapters_without_a_model(copy: Path) -> None:
    shutil.rmtree(copy / "tasks")
    (copy / "config.json").unlink()
    with pytest.raises(cart_hf.UserError, match=r"has no config.json, only adapters, which PEFT adds to their base"):
        cart_hf.MultiTaskModel.from_pretrained(copy)
    assert "has no config.json" in call("evaluate", copy, "--suite", "glue").errors[0]


def test_tasks_that_read_the_same_texts(world: World, tmp_path: Path) -> None:
    """One pass of the examples, and each head sees what its own adapter made of them."""
    rows = {"first": texts(COUNT, seed=5), "label": [0, 1] * 5 + [1]}
    write_split(tmp_path / "shared", "test", rows)
    shared = {"kind": TEXT, "text": "first", "dataset": "shared", "label_mapping": "index"}
    tasks_file = write_tasks(tmp_path / "shared.yaml", task0=shared, task1=shared, again=shared | {"head": "task0"})
    with forwards_of(transformers.RobertaModel) as seen:
        found = outcomes(world.exact, world.evaluation(tasks_file=str(tasks_file), data=None))
        assert len(seen) == 2 * 3  # adapters, batches
    for task, original in (("task0", 0), ("task1", 1), ("again", 0)):
        expected = text_logits(world.models[original], [rows["first"]], 18).argmax(axis=1)
        assert found[task].predictions.tolist() == expected.tolist()


def scaled(copy: Path) -> None:
    path = copy / "adapters" / "task1" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["alpha_pattern"] = {module: 2 * rank for module, rank in config["alpha_pattern"].items()}
    path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))


def enlarged(copy: Path) -> None:
    change(copy / "adapters" / "task1", lambda name, tensor: (name, tensor * 2))


def test_results_know_which_adapters_they_are_of(world: World, copy: Path) -> None:
    def identities() -> set[str]:
        loaded = cart_hf.MultiTaskModel.from_pretrained(copy)
        found = [cart_hf.evaluate(model, world.evaluation("task1", limit=2)) for model in (copy, loaded)]
        return {results.tasks["task1"].settings["model"] for results in found}

    known = identities()
    for edit in (scaled, enlarged):
        edit(copy)
        new = identities()
        assert len(new) == 2
        assert not new & known
        known |= new


# --- CLIP


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """A CLIP and fine-tunes of its vision tower, or of all of it."""
    return {kind: compressed_clip(tmp_path_factory.mktemp(kind), whole=kind == "whole") for kind in ("vision", "whole")}


@pytest.fixture(params=["vision", "whole"])
def clip(request: pytest.FixtureRequest, clips: dict[str, World]) -> World:
    return clips[request.param]


def compressed_clip(folder: Path, *, whole: bool) -> World:
    base, models = make_clip(folder, tasks=2)
    pretrained = CLIPModel.from_pretrained(base)
    perturb(pretrained, seed=9, size=0.2)
    save(pretrained, Path(base))
    save_tokenizer("clip", base)
    save_processor("clip", base)
    for number, place in enumerate(models):
        tuned = CLIPModel.from_pretrained(base)
        perturb(tuned if whole else tuned.vision_model, seed=(4, 7)[number], size=0.2)
        tuned.logit_scale.data.fill_(2.0)  # a bare parameter, which PEFT cannot change
        save(tuned if whole else tuned.vision_model, Path(place))
        if whole:
            save_tokenizer("clip", place)
            save_processor("clip", place)
        rows = {"image": images(COUNT, number), "label": numbers(COUNT, 3, seed=number)}
        write_split(folder / "data" / f"task{number}", "test", rows, image=datasets.Image())
    shutil.copytree(folder / "data" / "task0", folder / "data" / "other")
    task = {"kind": IMAGE, "classes": CLASSES, "templates": TEMPLATES}
    write_tasks(folder / "mine.yaml", task0=task, task1=task, other=task)
    found = World(folder, base, models)
    compress(base, models, found.exact, **EVERYTHING)
    return found


def is_whole(clip: World) -> bool:
    return (Path(clip.models[0]) / "tokenizer.json").is_file()


def original(clip: World, number: int) -> CLIPModel:
    """Return a task's own CLIP."""
    if is_whole(clip):
        return CLIPModel.from_pretrained(clip.models[number]).eval()
    model = CLIPModel.from_pretrained(clip.base).eval()
    model.vision_model.load_state_dict(CLIPVisionModel.from_pretrained(clip.models[number]).state_dict())
    return model


@torch.no_grad()
def expected_logits(clip: World, number: int, pixels: torch.Tensor) -> torch.Tensor:
    model = original(clip, number)
    features = torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    head = class_vectors(model, CLASSES, TEMPLATES, clip.base)
    found: torch.Tensor = features @ head.T * model.logit_scale.exp()
    return found


def test_zero_shot_heads_answer_as_each_tasks_own_clip(clip: World) -> None:
    model = cart_hf.MultiTaskModel.from_pretrained(clip.exact)
    model.add_zero_shot("task1", CLASSES, TEMPLATES)
    model.add_zero_shot("task0", CLASSES, TEMPLATES)
    model.add_zero_shot("other", CLASSES, TEMPLATES, adapter="task1")
    pixels = torch.randn(3, 3, 16, 16)
    with forwards_of(transformers.models.clip.modeling_clip.CLIPVisionEmbeddings) as seen:
        found = answers(model, "task0", "task1", "other", batch={"pixel_values": pixels})
        assert len(seen) == 2, "one pass for each adapter"
    for task, number in (("task0", 0), ("task1", 1), ("other", 1)):
        torch.testing.assert_close(found[task], expected_logits(clip, number, pixels), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found["task0"], found["task1"], atol=1e-3)
    with pytest.raises(cart_hf.UserError, match="no adapter 'taks0' - did you mean 'task0'"):
        model.add_zero_shot("taks0", CLASSES)
    alone = cart_hf.MultiTaskModel.from_pretrained(clip.exact, tasks=["task1"])
    assert alone.adapters.tasks == ["task1"]
    with pytest.raises(cart_hf.UserError, match="has no task 'task2' - did you mean"):
        cart_hf.MultiTaskModel.from_pretrained(clip.exact, tasks=["task2"])


def test_a_compressed_clip_scores_as_the_individual_models(clip: World) -> None:
    found = cart_hf.evaluate(clip.exact, clip.evaluation("task0", "task1"), normalize=True)
    assert found.individual == {task: result.score for task, result in found.tasks.items()}
    together = outcomes(clip.exact, clip.evaluation("task0", "task1"))
    loaded = cart_hf.evaluate(cart_hf.MultiTaskModel.from_pretrained(clip.exact), clip.evaluation("task0", "task1"))
    for number, task in enumerate(("task0", "task1")):
        alone = outcomes(clip.models[number], clip.evaluation(task), base=clip.base)[task].predictions
        assert together[task].predictions.tolist() == alone.tolist()
        assert loaded.tasks[task].metrics == found.tasks[task].metrics
        assert len(set(alone)) > 1, "a test that any constant passes"


def test_class_embeddings_are_kept_for_each_text_tower(clip: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # fmt: skip
    """Two tasks share an entry where no adapter changes the text tower, with each other and with the base."""
    monkeypatch.setenv("CART_HF_CACHE", str(tmp_path))
    outcomes(clip.exact, clip.evaluation("task0", "task1"))
    outcomes(clip.exact, clip.evaluation("task1"))  # the only adapter that is loaded
    outcomes(clip.base, clip.evaluation("task1"))
    kept = list(cache_folder("zero_shot").glob("*.safetensors"))
    assert len(kept) == (3 if is_whole(clip) else 1)


def test_a_task_without_an_adapter(clips: dict[str, World]) -> None:
    clip = clips["vision"]
    asked = ["evaluate", clip.exact, *clip.arguments(), "--tasks", "task0", "other"]
    answer = call(*asked)
    assert answer.code == 2
    assert answer.errors == [
        f"task 'other': {clip.exact} has no adapter 'other' (known: task0, task1); "
        "an adapter of another name is given with --heads other=ADAPTER"
    ]
    named = outcomes(clip.exact, clip.evaluation("other", "task0", heads={"other": "task0"}))
    assert named["other"].predictions.tolist() == named["task0"].predictions.tolist()
    succeed(*asked, "--heads", "other=task0", "--normalize")
    by_default = cart_hf.evaluate(clip.exact, clip.evaluation())
    assert list(by_default.tasks) == ["task0", "task1"]
