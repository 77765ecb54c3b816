"""Image models measured: CLIP's zero-shot heads and classifiers, against a direct computation."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from checkpoints import clip_config, make_clip, make_family, perturb, save
from commands import call, succeed
from PIL import Image
from plain_loops import class_vectors, forwards_of, image_features, outcomes
from safetensors.torch import load_file, save_file
from small_tasks import image_bytes, images, numbers, save_processor, save_tokenizer, write_split, write_tasks
from transformers import (
    AutoImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    ViTForImageClassification,
    ViTModel,
)

import cart_hf
from cart_hf.evaluation.results import Results
from cart_hf.recipe import Evaluation
from cart_hf.tasks import IMAGE, TEXT

pytestmark = pytest.mark.usefixtures("own_caches")

COUNT, BATCH = 13, 4
CLASSES = ["cat", "dog", "newt"]
TEMPLATES = ["a {}", "my {}", "{} ab"]


@dataclass(frozen=True)
class World:
    """A CLIP, three fine-tuned vision towers, their merge, and tasks that they were made for."""

    folder: Path
    base: str
    towers: list[str]
    merged: Path
    data: Path
    tasks_file: Path
    labels: list[int]

    def evaluation(self, *names: str, **changes: Any) -> Evaluation:
        given = {"tasks": names, "tasks_file": str(self.tasks_file), "data": str(self.data), "batch_size": BATCH}
        return Evaluation(**(given | changes))

    def arguments(self, *names: str) -> list[Any]:
        return ["--tasks", *names, "--tasks-file", self.tasks_file, "--data", self.data, "--batch-size", BATCH]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("clips")
    base, towers = make_clip(folder)
    whole = CLIPModel.from_pretrained(base)
    perturb(whole, seed=9, size=0.2)
    save(whole, Path(base))
    for number, tower in enumerate(towers):
        model = CLIPVisionModel(whole.config.vision_config)
        model.load_state_dict(whole.vision_model.state_dict())
        perturb(model, seed=number, size=0.2)
        save(model, Path(tower))
    save_tokenizer("clip", base)
    save_processor("clip", base)
    cart_hf.merge(base=base, models=towers, output=folder / "merged", device="cpu", workers=1)
    labels = numbers(COUNT, 3, seed=1)
    for name in ("task0", "task1", "task2"):
        write_split(
            folder / "data" / name, "test", {"image": images(COUNT, 1), "label": labels}, image=datasets.Image()
        )
    task = {"kind": IMAGE, "classes": CLASSES, "templates": TEMPLATES}
    other = {"kind": IMAGE, "classes": ["sun", "moon", "rain"], "templates": ["a {}"]}
    tasks_file = write_tasks(folder / "mine.yaml", task0=task, task1=task, task2=other)
    return World(folder, base, towers, folder / "merged", folder / "data", tasks_file, labels)


def decoded(count: int = COUNT) -> list[Image.Image]:
    return [Image.open(io.BytesIO(stored["bytes"])) for stored in images(count, 1)]


def similarities(model: CLIPModel, world: World, classes: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    head = class_vectors(model, classes, templates, world.base)
    return (image_features(model, decoded(), world.base) @ head.T).numpy()


# --- equal to a direct computation


def test_a_whole_clip_answers_from_class_names(world: World) -> None:
    found = outcomes(world.base, world.evaluation("task0", "task2"))
    model = CLIPModel.from_pretrained(world.base).eval()
    for name, classes, templates in (("task0", CLASSES, TEMPLATES), ("task2", ["sun", "moon", "rain"], ["a {}"])):
        expected = similarities(model, world, classes, templates).argmax(axis=1)
        assert found[name].predictions.tolist() == expected.tolist()
        assert len(set(expected)) > 1, "a test that any constant passes"
        assert found[name].result.metrics == {"accuracy": np.mean(expected == np.array(world.labels))}


def test_a_vision_tower_borrows_the_bases_text_tower(world: World) -> None:
    answers = []
    for tower in world.towers:
        model = CLIPModel.from_pretrained(world.base).eval()
        model.vision_model.load_state_dict(CLIPVisionModel.from_pretrained(tower).state_dict())
        expected = similarities(model, world, CLASSES, TEMPLATES).argmax(axis=1)
        found = outcomes(tower, world.evaluation("task0"), base=world.base)["task0"]
        assert found.predictions.tolist() == expected.tolist()
        answers.append(tuple(expected))
    assert len(set(answers)) > 1


def test_a_merged_clip_needs_no_base(world: World) -> None:
    model = CLIPModel.from_pretrained(world.merged).eval()
    expected = similarities(model, world, CLASSES, TEMPLATES).argmax(axis=1)
    assert outcomes(world.merged, world.evaluation("task0"))["task0"].predictions.tolist() == expected.tolist()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ViT classifiers and their merge."""
    folder = tmp_path_factory.mktemp("vits")
    base, models = make_family(folder, "vit", tasks=3)
    for model in models:
        whole = ViTForImageClassification.from_pretrained(model)
        with torch.no_grad():
            whole.classifier.bias -= torch.from_numpy(vit_logits(whole).mean(0))
        save(whole, Path(model))
    save_processor("vit", base, *models)
    cart_hf.merge(base=base, models=models, output=folder / "merged", device="cpu", workers=1)
    return folder


@torch.no_grad()
def vit_logits(model: ViTForImageClassification, folder: Path | None = None) -> np.ndarray:
    if folder is None:
        rows = [Image.open(io.BytesIO(image_bytes(i, (16, 16)))) for i in range(9)]
        pixels = torch.stack([torch.from_numpy(np.array(row)).permute(2, 0, 1) / 127.5 - 1 for row in rows])
        return model.eval()(pixel_values=pixels).logits.numpy()
    process = AutoImageProcessor.from_pretrained(folder)
    return torch.stack([model(**process(images=row, return_tensors="pt")).logits[0] for row in decoded()]).numpy()


def test_image_classifiers(world: World, vit: Path, tmp_path: Path) -> None:
    names = ["vit1-2", "vit1-0", "vit1-1"]  # the data's order
    rows = {"image": images(COUNT, 1), "label": world.labels}
    write_split(tmp_path / "task1", "test", rows, image=datasets.Image(), label=names)
    tasks_file = write_tasks(tmp_path / "mine.yaml", task1={"kind": IMAGE, "metrics": ["accuracy", "f1_macro"]})
    asked = Evaluation(tasks_file=str(tasks_file), data=str(tmp_path), batch_size=BATCH)
    plain = ViTForImageClassification.from_pretrained(vit / "task1").eval()
    merged = ViTForImageClassification.from_pretrained(vit / "merged", subfolder="tasks/task1").eval()
    for folder, model in (("task1", plain), ("merged", merged)):
        expected = vit_logits(model, vit / "task1")[:, [2, 0, 1]].argmax(axis=1)
        found = outcomes(vit / folder, asked)["task1"]
        assert found.predictions.tolist() == expected.tolist()
        assert found.result.metrics["accuracy"] == np.mean(expected == np.array(world.labels))


def test_every_mode_of_image_is_read_as_rgb(vit: Path, tmp_path: Path) -> None:
    modes = ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16"]
    stored = []
    for mode in modes:
        file = io.BytesIO()
        picture = Image.open(io.BytesIO(image_bytes(5)))
        picture = Image.fromarray(np.full((20, 18), 999, dtype=np.uint16)) if mode == "I;16" else picture.convert(mode)
        picture.save(file, "TIFF")
        stored.append({"bytes": file.getvalue(), "path": None})
    rows = {"image": stored, "label": [0] * len(modes)}
    write_split(tmp_path / "task0", "test", rows, image=datasets.Image(), label=["vit0-0", "vit0-1"])
    tasks_file = write_tasks(tmp_path / "mine.yaml", task0={"kind": IMAGE})
    found = outcomes(vit / "task0", Evaluation(tasks_file=str(tasks_file), data=str(tmp_path)))["task0"]
    assert (found.error, found.result.broken_images) == (None, {})


# --- the backbone, and the heads' cache


def test_the_vision_tower_sees_an_image_once_for_all_heads(world: World, tmp_path: Path) -> None:
    write_split(
        tmp_path / "shared",
        "test",
        {"image": images(COUNT, 1), "a": world.labels, "b": world.labels},
        image=datasets.Image(),
    )
    shared = {"kind": IMAGE, "dataset": "shared"}
    tasks_file = write_tasks(
        tmp_path / "mine.yaml",
        one=shared | {"label": "a", "classes": CLASSES},
        two=shared | {"label": "b", "classes": ["sun", "moon", "rain"]},
    )
    with forwards_of(CLIPVisionModel) as seen:
        found = outcomes(world.base, Evaluation(tasks_file=str(tasks_file), batch_size=BATCH))
    assert len(seen) == 4  # 13 images, 4 at a time
    assert set(found) == {"one", "two"}
    assert found["one"].predictions.tolist() != found["two"].predictions.tolist()


def test_zero_shot_heads_are_made_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CART_HF_CACHE", str(tmp_path / "cache"))

    def made(model: Path | str = world.base, **changes: Any) -> int:
        """Evaluate and return how often the text tower was run."""
        declared = {"kind": IMAGE, "classes": CLASSES, "templates": TEMPLATES, **changes}
        tasks_file = write_tasks(tmp_path / "mine.yaml", task0=declared)
        with forwards_of(CLIPTextModel) as seen:
            found = outcomes(model, world.evaluation("task0", tasks_file=str(tasks_file)), base=world.base)["task0"]
        assert found.error is None
        return len(seen)

    assert made() == 1
    assert made() == 0
    assert made(world.towers[0]) == 0  # another vision tower, the same text tower
    assert made(templates=TEMPLATES[:2]) == 1
    assert made(classes=["cat", "dog", "eft"]) == 1
    assert made(classes=["dog", "cat", "newt"]) == 1
    other = CLIPModel.from_pretrained(world.base)
    with torch.no_grad():
        other.text_projection.weight[0, 0] += 0.1
    save(other, tmp_path / "other")
    assert made(tmp_path / "other") == 1
    assert made() == 0
    for stored in (tmp_path / "cache" / "zero_shot").iterdir():
        stored.write_bytes(b"half a fi")  # a disk that was full
    assert made() == 1


def test_a_cache_that_cannot_be_written_is_done_without(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CART_HF_CACHE", str(tmp_path / "file"))
    assert outcomes(world.base, world.evaluation("task0"))["task0"].error is None


def test_prompts_that_are_too_long_are_cut(world: World, tmp_path: Path) -> None:
    """The default template alone is longer than what the small text tower can read."""
    tasks_file = write_tasks(tmp_path / "mine.yaml", task0={"kind": IMAGE, "classes": ["x" * 30, "y", "z"]})
    with forwards_of(CLIPTextModel) as seen:
        found = outcomes(world.base, world.evaluation("task0", tasks_file=str(tasks_file)))["task0"]
    assert found.error is None
    assert [inputs["input_ids"].shape for inputs in seen] == [(3, 12)]


# --- normalised


def test_a_merged_clip_is_normalised_by_its_towers(world: World) -> None:
    result = cart_hf.evaluate(world.merged, world.evaluation("task0", "task1"), normalize=True, device="cpu")
    alone = {
        f"task{i}": outcomes(world.towers[i], world.evaluation(f"task{i}"), base=world.base)[f"task{i}"].result.score
        for i in range(2)
    }
    assert result.individual == alone
    assert result.errors == {}


# --- images that cannot be decoded


def test_broken_images_count_as_wrong_and_are_named(world: World, tmp_path: Path) -> None:
    broken = [2, 7]
    rows = {"image": images(COUNT, 1, broken=broken), "label": world.labels}
    rows["image"][11] = None
    write_split(tmp_path / "data" / "task0", "test", rows, image=datasets.Image())
    whole = outcomes(world.base, world.evaluation("task0"))["task0"]
    found = outcomes(world.base, world.evaluation("task0", data=str(tmp_path / "data")))["task0"]
    assert sorted(map(int, found.result.broken_images)) == [2, 7, 11]
    assert all(found.result.broken_images.values())
    assert found.result.broken_images["11"] == "no image"
    right = [row for row in range(COUNT) if whole.predictions[row] == world.labels[row] and row not in (2, 7, 11)]
    assert found.result.metrics["accuracy"] == pytest.approx(len(right) / COUNT)
    assert [found.predictions[row] for row in (2, 7, 11)] == [-1, -1, -1]
    target = tmp_path / "results.json"
    answer = succeed(
        "evaluate",
        world.base,
        "--tasks",
        "task0",
        "--tasks-file",
        world.tasks_file,
        "--data",
        tmp_path / "data",
        "--output",
        target,
    )
    assert answer.err == "warning: task0: 3 of 13 images cannot be decoded and count as wrong (rows 2, 7, 11)\n"
    assert set(json.loads(target.read_text())["tasks"]["task0"]["broken_images"]) == {"2", "7", "11"}


def test_broken_files_of_an_image_folder(world: World, tmp_path: Path) -> None:
    for number, label in enumerate(CLASSES):
        for i in range(2):
            path = tmp_path / "task0" / "test" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(number * 2 + i))
    (tmp_path / "task0" / "test" / "dog" / "1.png").write_bytes(b"not an image")
    found = outcomes(world.base, world.evaluation("task0", data=str(tmp_path)))["task0"]
    assert list(found.result.broken_images) == ["3"]
    assert "dog/1.png" in found.result.broken_images["3"]


# --- bad input


def test_a_vision_tower_without_a_base(world: World) -> None:
    answer = call("evaluate", world.towers[0], *world.arguments("task0"))
    assert answer.code == 2
    assert len(answer.errors) == 1
    assert (
        "holds a vision tower only; name the CLIP whose text tower makes the zero-shot heads: --base"
        in answer.errors[0]
    )


def test_bases_that_cannot_lend_a_text_tower(world: World, vit: Path, tmp_path: Path) -> None:
    config = clip_config()
    config.vision_config.hidden_size = 24
    other = save(CLIPModel(config), tmp_path / "other")
    headless = tmp_path / "headless"
    shutil.copytree(world.base, headless)
    state = load_file(headless / "model.safetensors")
    save_file(
        {key: value for key, value in state.items() if "text_model" not in key},
        headless / "model.safetensors",
        {"format": "pt"},
    )
    for base, message in (
        (world.towers[1], f"base: {world.towers[1]} is a CLIPVisionModel; zero-shot heads need a whole CLIPModel"),
        (
            vit / "task0",
            f"base: {vit / 'task0'} is a ViTForImageClassification; zero-shot heads need a whole CLIPModel",
        ),
        (other, f"model: {world.towers[0]} is not a vision tower of the base {other}"),
        (headless, f"base: {headless} lacks the tensors text_model."),
        (tmp_path / "none", "folder not found"),
    ):
        answer = call("evaluate", world.towers[0], "--base", base, *world.arguments("task0"))
        assert answer.code == 2, answer
        assert len(answer.errors) == 1
        assert message in answer.errors[0]


def test_tasks_that_a_clip_cannot_answer(world: World, tmp_path: Path) -> None:
    rows = {"image": images(COUNT, 1), "label": world.labels}
    write_split(tmp_path / "data" / "nameless", "test", rows, image=datasets.Image())
    write_split(tmp_path / "data" / "words", "test", {"text": ["a", "b"], "label": [0, 1]})
    write_split(tmp_path / "data" / "task0", "test", rows, image=datasets.Image())
    tasks_file = write_tasks(
        tmp_path / "mine.yaml",
        nameless={"kind": IMAGE},
        words={"kind": TEXT, "text": "text", "labels": ["a", "b"]},
        task0={"kind": IMAGE, "classes": CLASSES},
    )
    target = tmp_path / "results.json"
    answer = call(
        "evaluate",
        world.base,
        "--tasks",
        "nameless",
        "words",
        "task0",
        "--tasks-file",
        tasks_file,
        "--data",
        tmp_path / "data",
        "--output",
        target,
    )
    assert answer.code == 2
    assert sorted(answer.errors) == [
        "task 'nameless': nothing names its classes: add `classes: [...]` to the task",
        "task 'words': its examples are texts, the model reads images",
    ]
    assert list(Results.load(target).tasks) == ["task0"]


def test_a_clip_without_a_processor(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.base, tmp_path / "bare", ignore=shutil.ignore_patterns("preprocessor_config.json"))
    answer = call("evaluate", tmp_path / "bare", *world.arguments("task0"))
    assert answer.code == 2
    assert len(answer.errors) == 1
    assert "has no usable image processor" in answer.errors[0]
    succeed("evaluate", tmp_path / "bare", "--base", world.base, *world.arguments("task0"))


def test_labels_are_compared_before_the_model_is_run(vit: Path, world: World) -> None:
    with forwards_of(ViTModel) as seen:
        answer = call("evaluate", vit / "task1", *world.arguments("task0"))
    assert answer.code == 2
    assert answer.errors[0].startswith(
        "task 'task0': the head's labels (vit1-0, vit1-1, vit1-2) are not the data's (cat, dog, newt)"
    )
    assert not seen
