"""`cart-hf adapt` as people use it: what it takes and refuses, what it writes, and what becomes of it when it is killed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from checkpoints import copy_backbone, make_clip, make_family, perturb, roberta_config, save
from commands import assert_absent, call, leftovers, refuse, run_cli, succeed
from hub_server import serving
from hub_uploads import Account, WritableHub
from merge_children import command, contents, start, start_slurm_step
from PIL import Image
from safetensors.torch import load_file, save_file
from small_tasks import images, numbers, save_processor, save_tokenizer, texts, write_split, write_tasks
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForPreTraining,
    BertForTokenClassification,
    CLIPModel,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

import cart_hf
from cart_hf.adaptation.terms import Rows
from cart_hf.cli.console import Bars
from cart_hf.output import unfinished
from cart_hf.tasks import IMAGE, REGRESSION, TEXT

pytestmark = pytest.mark.usefixtures("own_caches")

COUNT, HELD_OUT = 12, 0.4
LABELS = {"task0": ["roberta0-0", "roberta0-1"], "task1": ["roberta1-0", "roberta1-1", "roberta1-2"]}
STEPS, SAVED = 30, 25  # of the runs that are killed: in all, and between two times that the state is kept


@dataclass(frozen=True)
class World:
    """A base, two fine-tuned models that are sure of what they say, and their tasks.

    ``adapted`` is what `cart-hf adapt` made of them, on a part of their inputs, with figures.
    """

    folder: Path
    base: str
    models: Sequence[str]
    data: Path
    tasks_file: Path

    @property
    def adapted(self) -> Path:
        return self.folder / "adapted"

    def words(self, target: object, *flags: object, models: Sequence[object] | None = None, **options: object) -> list:
        """Return a command line; an option that is None is left out."""
        given = {"tasks_file": self.tasks_file, "data": self.data, "device": "cpu", "workers": 1}
        given |= {"steps": 2, "batch_size": 4, "lr": 0.05, "output": target, **options}
        words = [
            w for name, value in given.items() if value is not None for w in (f"--{name.replace('_', '-')}", value)
        ]
        return ["adapt", *words, "--base", self.base, "--models", *(models or self.models), *flags]

    def adapt(self, target: Path, **options: Any) -> None:
        """Do from Python what :func:`long_words` does."""
        cart_hf.adapt(
            output=target, base=self.base, models=self.models, device="cpu",
            learning={"steps": STEPS, "lr": 0.05, "batch_size": 2},
            examples={"tasks": ["task1"], "tasks_file": str(self.tasks_file), "data": str(self.data)},
            **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base, models = make_family(folder, "roberta", tasks=2)
    for seed, place in enumerate(models):
        make_decided(place, seed)
    save_tokenizer("roberta", base, *models)
    for number, (name, names) in enumerate(LABELS.items()):
        words = texts(COUNT - 1, seed=number, longest=6)
        rows = {"sentence": [*words, words[0]], "label": numbers(COUNT, len(names), seed=number)}
        write_split(folder / "data" / name, "test", rows, label=names)
    tasks_file = write_tasks(folder / "mine.yaml", **{name: {"kind": TEXT, "text": "sentence"} for name in LABELS})
    made = World(folder, base, models, folder / "data", tasks_file)
    succeed(*made.words(made.adapted, steps=4, held_out=HELD_OUT))
    return made


def make_decided(folder: str, seed: int) -> None:
    """Move a model away from its base, and let its head be sure: the losses of new models hardly have slopes."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    perturb(model.base_model, seed=seed + 20, size=0.1)
    with torch.no_grad():
        for layer, factor in ((model.classifier.dense, 10), (model.classifier.out_proj, 20)):
            layer.weight.mul_(factor)
    model.save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def no_figures(world: World) -> Iterator[None]:
    """Be a machine without matplotlib from now on: drawing takes longer than learning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield


def learnt(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adaptation" / "coefficients.safetensors")


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "merge.json").read_text())["adaptation"]


def weights(folder: Path) -> dict[str, bytes]:
    """Return every file of weights."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def difference(one: Path, other: Path) -> float:
    """Return the largest difference of two runs' coefficients."""
    first, second = learnt(one), learnt(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# --- what it makes


def test_what_it_writes(world: World) -> None:
    """Plain transformers loads it; heads are the models' own; figures and numbers lie beside the weights."""
    adapted = world.adapted
    assert not leftovers(adapted)
    inside = {path.name for path in (adapted / "adaptation").iterdir()}
    assert inside == {"coefficients.safetensors", "inputs.safetensors", "curves.csv", "curves.png", "coefficients.png"}
    for name in ("curves.png", "coefficients.png"):
        with Image.open(adapted / "adaptation" / name) as image:
            assert min(image.size) > 100
    root = {name.removeprefix("roberta."): tensor for name, tensor in load_file(adapted / "model.safetensors").items()}
    backbone = AutoModel.from_pretrained(adapted).state_dict()
    assert all(backbone[name].equal(tensor) for name, tensor in root.items())
    for name, folder in zip(LABELS, world.models, strict=True):
        own = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        state = AutoModelForSequenceClassification.from_pretrained(adapted, subfolder=f"tasks/{name}").state_dict()
        assert all(state[key].equal(own[key]) for key in own if key.startswith("classifier."))
        assert all(state[f"roberta.{key}"].equal(tensor) for key, tensor in root.items())
    coefficients = learnt(adapted)
    assert set(coefficients) == set(root)
    assert all(values.shape == (2,) and values.dtype == torch.float32 for values in coefficients.values())
    header, *rows = csv.reader((adapted / "adaptation" / "curves.csv").open(encoding="utf-8"))
    assert header == ["step", "loss", "task0", "task1"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    for _, total, *losses in rows:
        assert float(total) == pytest.approx(sum(map(float, losses)), rel=1e-4)
    assert "test-time-adaptation" in (adapted / "README.md").read_text()


def test_it_learns_with_two_models(world: World, tmp_path: Path) -> None:
    """Of two models cart's terms cancel, until their coefficients differ: nobody is warned of an average."""
    answer = succeed(*world.words(tmp_path / "out", steps=8, batch_size=COUNT))
    assert answer.err.splitlines() == ["warning: plots need matplotlib: pip install 'cart-hf[plot]'"]
    losses = record(tmp_path / "out")["loss"]
    rows = list(csv.reader((tmp_path / "out" / "adaptation" / "curves.csv").open(encoding="utf-8")))[1:]
    assert float(rows[-1][1]) < 0.99 * float(rows[0][1])
    whole = [float(row[1]) for row in rows]
    half = len(whole) // 2
    assert losses["first"] == pytest.approx(np.mean(whole[:half]), rel=1e-4)
    assert losses["last"] == pytest.approx(np.mean(whole[-half:]), rel=1e-4)
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["warnings"] == []


def test_what_it_says(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    monkeypatch.chdir(world.folder)
    lines = succeed(*world.words(output, held_out=HELD_OUT, tasks_file="mine.yaml", data="data")).out.splitlines()
    monkeypatch.chdir(tmp_path)
    told = record(output)["tasks"]
    assert lines[0].split("  ")[-2:] == ["loss at first", "loss at last"]
    for line, (name, task) in zip(lines[1:3], told.items(), strict=True):
        assert line.split()[:3] == [name, str(task["inputs"]), str(task["held_out"])]
        assert task["inputs"] + task["held_out"] == COUNT
        assert task["split"] == "test"
    assert lines[3].startswith("2 steps on entropy: a coefficient for each task and tensor, now from 0.9")
    assert lines[5] == f'load it: transformers.AutoModel.from_pretrained("{output}")'
    assert lines[6].startswith(f"score it: cart-hf evaluate {output} (scores on the inputs it was adapted on")
    assert lines[7].strip().startswith(f"cart-hf evaluate {output} --unseen-by {output} (on the inputs that were held")
    assert len(lines) == 8
    # the commands that it names work from anywhere
    everything = csv.reader(succeed("evaluate", output, "--format", "csv").out.splitlines())
    part = csv.reader(succeed("evaluate", output, "--unseen-by", output, "--format", "csv").out.splitlines())
    for whole, others in zip(list(everything)[1:3], list(part)[1:3], strict=True):
        assert whole[3] == f"{told[whole[0]]['inputs']} of {COUNT}"
        assert int(others[2]) == told[whole[0]]["held_out"]


def test_no_step_at_all(world: World, tmp_path: Path) -> None:
    """The static merge, with nothing to say of losses."""
    answer = succeed(*world.words(tmp_path / "out", steps=0))
    assert answer.out.splitlines()[1].split() == ["task0", str(COUNT), "0", "-", "-"]
    assert record(tmp_path / "out")["loss"] == {"first": None, "last": None}
    succeed(
        "merge", "--base", world.base, "--models", *world.models, "--output", tmp_path / "static", "--device", "cpu"
    )
    assert weights(tmp_path / "static").items() <= weights(tmp_path / "out").items()


def test_a_recipe_and_flags_amount_to_the_same(world: World, tmp_path: Path) -> None:
    """What --print-recipe prints runs with the same bytes, and prints itself."""
    flags = {"steps": 4, "held_out": HELD_OUT}
    printed = succeed(*world.words(None, "--print-recipe", **flags)).out
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(printed)
    assert yaml.safe_load(printed)["adapt"] == {"steps": 4, "lr": 0.05, "batch_size": 4, "held_out": HELD_OUT}
    assert succeed("adapt", recipe, "--print-recipe").out == printed
    answer = succeed("adapt", recipe, tmp_path / "out", "--device", "cpu", "--format", "json")
    assert json.loads(answer.out)["adaptation"] == record(world.adapted)
    assert weights(tmp_path / "out") == weights(world.adapted)
    # learnt anew from the recipe that names what was learnt
    succeed("adapt", tmp_path / "out" / "cart_hf.yaml", tmp_path / "anew", "--device", "cpu")
    assert weights(tmp_path / "anew") == weights(world.adapted)
    # flags go before the recipe
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(printed), "seed": 5}))
    succeed("adapt", recipe, tmp_path / "other", "--device", "cpu", "--granularity", "layer", "--tasks", "task1")
    told = record(tmp_path / "other")
    assert (told["seed"], told["granularity"], told["steps"], list(told["tasks"])) == (5, "layer", 4, ["task1"])


def test_another_seed(world: World, tmp_path: Path) -> None:
    succeed(*world.words(tmp_path / "out", steps=4, held_out=HELD_OUT, seed=1))
    assert difference(tmp_path / "out", world.adapted) > 1e-4
    assert (
        weights(tmp_path / "out")["tasks/task0/head.safetensors"]
        == weights(world.adapted)["tasks/task0/head.safetensors"]
    )


def test_a_dry_run(world: World, tmp_path: Path) -> None:
    answer = succeed(*world.words(tmp_path / "out", "--dry-run"))
    assert "coefficients: 74, of 37 tensors" in answer.out
    assert_absent(tmp_path / "out")


def test_a_method_that_is_not_cart(world: World, tmp_path: Path) -> None:
    """Its coefficients begin with its own scale, or another."""
    succeed(*world.words(tmp_path / "out", method="task_arithmetic", scale=0.4, init=0.2, steps=0, terms="device"))
    assert {float(value) for values in learnt(tmp_path / "out").values() for value in values} == {
        float(np.float32(0.2))
    }


# --- the output is a recipe


@pytest.mark.parametrize(
    "options",
    [
        {"method": "cart"},
        {"mask_ratio": 0.5, "lr": 0.3, "steps": 6, "granularity": "layer"},
        {"method": "task_arithmetic", "out_dtype": None},
        {"method": "ties", "set": "density=0.4"},
    ],
    ids=["cart", "masks", "task_arithmetic", "ties"],
)
def test_merged_again_without_data(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Mapping[str, Any]
) -> None:
    """The same bytes, from another working directory, and what was learnt goes along."""
    adapted = tmp_path / "adapted"
    succeed(*world.words(adapted, **options))
    if "mask_ratio" in options:
        assert any(name.startswith("mask/") for name in learnt(adapted)), "no other direction was chosen"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    succeed("merge", os.path.relpath(adapted / "cart_hf.yaml"), "again", "--device", "cpu")
    again = tmp_path / "elsewhere" / "again"
    assert weights(again) == weights(adapted)  # also the coefficients and the hashes of the inputs
    assert record(again) == record(adapted)
    assert (again / "cart_hf.yaml").read_bytes() == (adapted / "cart_hf.yaml").read_bytes()


def damaged(folder: Path, kind: str) -> None:
    """Spoil what an adapted folder has learnt."""
    path = folder / "adaptation" / "coefficients.safetensors"
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "foreign":
        save_file({"a": torch.ones(2)}, path)
    else:
        recipe = yaml.safe_load((folder / "cart_hf.yaml").read_text())
        changes = {
            "method": {"merge_method": "ties", "parameters": {}},
            "average": {"merge_method": "average", "parameters": {}},
        }
        changes["models"] = {"models": [{**recipe["models"][0], "name": "other"}, recipe["models"][1]]}
        (folder / "cart_hf.yaml").write_text(yaml.safe_dump({**recipe, **changes[kind], "adapt": None}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "coefficients.safetensors: No such file or directory"),
        ("cut", "coefficients.safetensors: "),
        ("foreign", "coefficients.safetensors is no file of coefficients (`cart-hf adapt` writes them)"),
        ("method", "coefficients: they were learnt for cart, the recipe's method is ties"),
        ("average", "coefficients: average has no coefficients to learn; cart, task_arithmetic, ties"),
        ("models", "coefficients: they were learnt for the models task0, task1, the recipe has other, task1"),
    ],
)
def test_coefficients_that_do_not_fit(world: World, tmp_path: Path, kind: str, message: str) -> None:
    adapted = shutil.copytree(world.adapted, tmp_path / "adapted")
    damaged(adapted, kind)
    refuse(tmp_path / "out", "merge", adapted / "cart_hf.yaml", tmp_path / "out", naming=[message])


# --- what is refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "average": ({"method": "average"}, "adapt: average has no coefficients to learn; cart, task_arithmetic, ties, consensus, dare, breadcrumbs, della have"),
    "masks": ({"method": "ties", "mask_ratio": 0.3}, "adapt.mask_ratio: ties has no singular directions; it is for cart"),
    "mask ratio": ({"mask_ratio": 1.5}, "adapt.mask_ratio: input should be less than or equal to 1"),
    "factors": ({"method": "ties", "factors": "f"}, "--factors: ties decomposes nothing; leave it out"),
    "factors file": ({"factors": "{data}/task0/test.parquet"}, "test.parquet is not a folder"),
    "regression": ({"tasks": "stsb"}, "task 'stsb' is a regression, whose predictions have no entropy: use --objective self-labels"),
    "no such task": ({"tasks": "task9"}, "no task 'task9' - did you mean 'task"),
    "no model": ({"tasks": "sst2"}, "task 'sst2': none of the models is called 'sst2' (known: task0, task1); name one so (NAME=REF"),
    "no head": ({"heads": "task0=task7"}, "task 'task0': none of the models is called 'task7' - did you mean 'task"),
    "no tasks": ({"tasks_file": None}, "evaluation: name a suite or tasks (none of the models is called like a task)"),
    "no data": ({"data": "{data}/none"}, "/none: no such folder"),
    "no split": ({"split": "trian"}, "has no split 'trian' (looked for trian.parquet"),
    "all held out": ({"held_out": 0.99999999}, "task 'task0': --held-out 1 leaves none of its 12 inputs to learn from; hold out fewer"),
    "held out": ({"held_out": 1}, "adapt.held_out: input should be less than 1"),
    "steps": ({"steps": -1}, 'Invalid value "-1" for --steps. Must be >= 0.'),
    "lr": ({"lr": 0}, 'Invalid value "0.0" for --lr. Must be > 0.'),
    "endless lr": ({"lr": "inf"}, "adapt.lr: input should be a finite number"),
    "too high a lr": ({"lr": 1e30}, "task 'task0': the loss is not finite at step 2: the learning rate may be too high (--lr)"),
    "objective": ({"objective": "entropi"}, 'Invalid value "entropi" for --objective'),
    "exists": ({"output": "{data}"}, "exists; choose another output, or --overwrite to replace it"),
    "no output": ({"output": None}, "no output folder: give it after the recipe, or with --output"),
    "device": ({"device": "tpu"}, "--device"),
    "private": ({"private": ""}, "--private and --public are about the repository"),
    "image task": ({"tasks": "mnist", "heads": "mnist=task0"}, "mnist"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(world: World, tmp_path: Path, case: str) -> None:
    options, message = REFUSED[case]
    told = {name: value.format(data=world.data) if isinstance(value, str) else value for name, value in options.items()}
    flags = ["--private"] if told.pop("private", None) == "" else []
    refuse(tmp_path / "out", *world.words(tmp_path / "out", *flags, **told), naming=[message])
    assert not (tmp_path / "f").exists()


def test_recipes_that_are_refused(world: World, tmp_path: Path) -> None:
    recipe = yaml.safe_load(succeed(*world.words(None, "--print-recipe")).out)
    path, output = tmp_path / "recipe.yaml", tmp_path / "out"

    def refused(message: str, *flags: object, **changes: Any) -> None:
        path.write_text(yaml.safe_dump({**recipe, **changes}))
        refuse(output, "adapt", path, output, *flags, naming=[message])

    refused("adapt.granularty: unknown key - did you mean 'granularity'?", adapt={"granularty": "task"})
    refused("adapt.objective: input should be 'entropy' or 'self-labels'", adapt={"objective": "accuracy"})
    refused("--scale: with a recipe file, edit the recipe instead", "--scale", 2)
    refused("adapt: average has no coefficients to learn", merge_method="average", parameters={})
    refused("no task 'task9' - did you mean", evaluation={**recipe["evaluation"], "tasks": ["task9"]})


def test_no_tensor_to_learn(world: World, tmp_path: Path) -> None:
    recipe = yaml.safe_load(succeed(*world.words(None, "--print-recipe", method="task_arithmetic")).out)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "exclude": ["*"]}))
    refuse(
        tmp_path / "out", "adapt", tmp_path / "recipe.yaml", tmp_path / "out", naming=["nothing to learn: no tensor"]
    )


# --- interrupted


def long_words(world: World, output: Path, *flags: object, **options: object) -> list:
    """Return a command line that is worth killing."""
    return world.words(output, *flags, **{"steps": STEPS, "batch_size": 2, "tasks": "task1", **options})


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is written by one that nobody disturbs."""
    output = tmp_path_factory.mktemp("whole") / "out"
    succeed(*long_words(world, output, terms="device"))
    return contents(output)


@pytest.fixture(scope="module")
def killed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which an adaptation to `out` was killed while it learnt."""
    folder = tmp_path_factory.mktemp("killed")
    child = start(folder, command, *long_words(world, folder / "out"))
    for _ in range(6000):
        if any(folder.glob(".out*/learning.pt")):
            break
        time.sleep(0.01)
    os.kill(child.process.pid, signal.SIGKILL)
    assert child.answer().code == -signal.SIGKILL
    assert len(unfinished(folder / "out")) == 1
    assert not (folder / "out").exists()
    return folder


@pytest.fixture
def bereft(killed: Path, tmp_path: Path) -> Path:
    """Return the output of a copy of what was left."""
    return Path(shutil.copytree(killed, tmp_path / "copy")) / "out"


def test_continued(world: World, whole: dict[str, Any], bereft: Path) -> None:
    """It goes on where the state was kept last, and ends with the same bytes."""
    (left,) = unfinished(bereft)
    done = len(torch.load(left / "learning.pt")["now"]["losses"]["task1"])
    assert done % SAVED == 0
    steps = []

    def progress(step: str, advance: int, total: int) -> None:
        steps.extend([step] * (step == "adapting"))

    world.adapt(bereft, resume=True, progress=progress)
    assert len(steps) == STEPS - done
    assert contents(bereft) == whole
    assert not leftovers(bereft)


def test_killed_before_its_state_was_kept(world: World, whole: dict[str, Any], bereft: Path) -> None:
    """It begins to learn again; what was merged and computed before that is used."""
    (left,) = unfinished(bereft)
    (left / "learning.pt").rename(left / ".learning.pt")
    before = (left / "static" / "model.safetensors").stat().st_ino
    seen = []

    def progress(step: str, advance: int, total: int) -> None:
        seen.append((step, (left / "static" / "model.safetensors").stat().st_ino))

    world.adapt(bereft, resume=True, progress=progress)
    assert [step for step, _ in seen].count("adapting") == STEPS
    assert {place for _, place in seen} == {before}
    assert contents(bereft) == whole


def test_other_settings_are_refused(world: World, bereft: Path) -> None:
    """All that differ, each with both values; what does not change the result may differ."""
    (left,) = unfinished(bereft)
    answer = call(*long_words(world, bereft, "--resume", lr=0.1, steps=4, granularity="task", heads="task1=task0"))
    assert answer.code == 2
    assert answer.errors == [
        "--resume: adapt.granularity was tensor, is task, adapt.steps was 30, is 4, adapt.lr was 0.05, is 0.1, "
        "head of task1 was task1, is task0: give the same settings, or leave out --resume to start afresh"
    ]
    answer = call(*long_words(world, bereft, "--resume", limit=4))
    assert "adapt.limit was not given, is 4, inputs of task1 was " in answer.errors[0]
    assert unfinished(bereft) == [left]


def test_starting_afresh(world: World, bereft: Path) -> None:
    """What was left is told of, and goes when the new one has succeeded."""
    told = succeed(*long_words(world, bereft, steps=1))
    assert f"an adaptation to {bereft} was interrupted: --resume would continue it; this one starts afresh" in told.err
    assert record(bereft)["steps"] == 1
    assert not leftovers(bereft)


def test_interrupted_at_the_end(
    world: World, whole: dict[str, Any], bereft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all learnt, and with all but the card written."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for place in ("write_learnt", "write_card"):
        with monkeypatch.context() as patch:
            patch.setattr(f"cart_hf.adaptation.job.{place}", fail)
            answer = call(*long_words(world, bereft, "--resume"))
        assert (answer.code, answer.err) == (130, "interrupted; the same command with --resume continues\n")
        assert not bereft.exists()
    succeed(*long_words(world, bereft, "--resume"))
    assert contents(bereft) == whole
    assert not leftovers(bereft)


def test_interrupted_before_anything_is_worth_keeping(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Bars, step: str, advance: int, total: int) -> None:
        if step == "adapting":
            raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "__call__", interrupt)
    answer = call(*world.words(tmp_path / "out"))
    assert (answer.code, answer.err) == (130, "interrupted; nothing was written\n")
    assert_absent(tmp_path / "out")


def test_nothing_to_continue(world: World, tmp_path: Path) -> None:
    """A job that is queued again can always say --resume."""
    succeed(*world.words(tmp_path / "out", "--resume", steps=4, held_out=HELD_OUT))
    assert weights(tmp_path / "out") == weights(world.adapted)


# --- several processes


def test_two_processes_learn_what_one_does(world: World, tmp_path: Path) -> None:
    """An odd batch: the shares differ in size. Plain descent, for Adam makes much of the last digits of small slopes."""
    options = {"steps": 4, "batch_size": 3, "objective": "self-labels", "optimizer": "sgd", "lr": 0.3}
    succeed(*world.words(tmp_path / "one", **options))
    first, second = (
        child.answer() for child in start_slurm_step(tmp_path, command, *world.words(tmp_path / "two", **options))
    )
    assert (first.code, second.code) == (0, 0), (first, second)
    assert first.out.count("4 steps on self-labels") == 1
    assert (second.out, second.err) == ("", "")
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-6
    assert difference(tmp_path / "one", world.adapted) > 1e-3
    assert json.loads((tmp_path / "two" / "merge.json").read_text())["processes"] == 2
    assert record(tmp_path / "two")["loss"] == pytest.approx(record(tmp_path / "one")["loss"], rel=1e-5)
    assert not leftovers(tmp_path / "two")


def lose_a_disk(*words: object) -> None:
    """Be ``cart-hf WORDS``; in the second process the dense terms are gone when it has begun to learn."""
    if os.environ["SLURM_PROCID"] == "1":
        read, calls = Rows.blocks, []

        def fail(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 150:
                raise OSError(5, "Input/output error")
            return read(*arguments, **options)

        Rows.blocks = fail
    command(*words)


@pytest.mark.parametrize(
    ("work", "options", "message"),
    [
        (command, {"lr": 1e30}, "the loss is not finite at step 2"),
        (lose_a_disk, {"steps": 9}, "cannot adapt: Input/output error"),
    ],
    ids=["of all", "of one"],
)
def test_a_mistake_is_told_once(world: World, tmp_path: Path, work: Any, options: dict[str, Any], message: str) -> None:
    """Whichever process finds it."""
    children = start_slurm_step(tmp_path, work, *world.words(tmp_path / "out", **options))
    first, second = (child.answer() for child in children)
    assert (first.code, second.code) == (2, 2), (first, second)
    (error,) = first.errors
    assert message in error
    assert (first.out, second.out, second.err) == ("", "", "")
    assert_absent(tmp_path / "out")


# --- what it learns on, and of which models


def test_stopping_early(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One input, over and over, at a rate that changes nothing: the second window is not better than the first."""
    monkeypatch.setattr("cart_hf.adaptation.learn.WINDOW", 3)
    options = {"steps": 9, "lr": 1e-30, "limit": 1, "tasks": "task0"}
    answer = succeed(*world.words(tmp_path / "out", patience=1, **options))
    assert answer.out.splitlines()[2].startswith("6 steps (stopped early) on entropy")
    told = record(tmp_path / "out")
    assert (told["steps"], told["stopped_early"], told["tasks"]["task0"]["inputs"]) == (6, True, 1)
    assert "stopped early" not in succeed(*world.words(tmp_path / "patient", patience=2, **options)).out


def test_autocast(world: World, tmp_path: Path) -> None:
    """Half precision finds nearly the same, and what is kept is not rounded."""
    for dtype in ("float32", "bfloat16"):
        succeed(*world.words(tmp_path / dtype, dtype=dtype, optimizer="sgd", lr=0.3))
    assert 0 < difference(tmp_path / "float32", tmp_path / "bfloat16") < 0.02
    assert difference(tmp_path / "float32", world.adapted) > 0.02
    assert record(tmp_path / "bfloat16")["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "bfloat16" / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.float32}


def test_regressions_and_data_without_labels(world: World, tmp_path: Path) -> None:
    """A model learns from its own predictions, also where they are numbers; labels are absent, or empty."""
    model = RobertaForSequenceClassification(roberta_config(num_labels=1))
    copy_backbone(model, RobertaForMaskedLM.from_pretrained(world.base))
    perturb(model, seed=7, size=0.1)
    save_tokenizer("roberta", save(model, tmp_path / "alike"))
    write_split(tmp_path / "data" / "alike", "test", {"one": texts(5, 1), "two": texts(5, 2)})
    (tmp_path / "data" / "task1").mkdir()
    (tmp_path / "data" / "task1" / "test.csv").write_text("sentence,label\na b,\nc,\nd e,\n")
    tasks_file = write_tasks(
        tmp_path / "mine.yaml",
        alike={"kind": REGRESSION, "text": ["one", "two"]},
        task1={"kind": TEXT, "text": "sentence"},
    )
    models, output = [tmp_path / "alike", world.models[1]], tmp_path / "out"
    options = {"tasks_file": tasks_file, "data": tmp_path / "data", "models": models}
    refuse(output, *world.words(output, **options), naming=["task 'alike' is a regression", "--objective self-labels"])
    succeed(*world.words(output, **options, objective="self-labels", batch_size=5, steps=5, lr=0.02))
    assert {name: task["inputs"] for name, task in record(output)["tasks"].items()} == {"alike": 5, "task1": 3}
    rows = list(csv.DictReader((output / "adaptation" / "curves.csv").open(encoding="utf-8")))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[0]["alike"]) > 0


def test_half_precision_and_a_tensor_that_one_model_lacks(tmp_path: Path) -> None:
    """A tagger has no pooler: its coefficient there is none, which nobody is told as a number."""
    base, models = make_family(tmp_path, "bert", dtype=torch.bfloat16)
    tagger = BertForTokenClassification(BertConfig.from_pretrained(base))
    copy_backbone(tagger, BertForPreTraining.from_pretrained(base))
    perturb(tagger, seed=9)
    save(tagger.to(torch.bfloat16), Path(models[1]))
    save_tokenizer("bert", base, *models)
    write_split(tmp_path / "data" / "task0", "test", {"sentence": texts(6, 3)})
    write_tasks(tmp_path / "mine.yaml", task0={"kind": TEXT, "text": "sentence"})
    own = World(tmp_path, base, models, tmp_path / "data", tmp_path / "mine.yaml")
    answer = succeed(*own.words(tmp_path / "out"))
    assert "now from 0.9" in answer.out
    values = learnt(tmp_path / "out")["pooler.dense.weight"].tolist()
    assert values[1] == 0
    assert all(abs(value - 1) > 0.01 for value in (values[0], values[2]))
    shards = [load_file(path) for path in (tmp_path / "out").glob("model*.safetensors")]
    assert {tensor.dtype for shard in shards for tensor in shard.values()} == {torch.bfloat16}
    succeed("merge", tmp_path / "out" / "cart_hf.yaml", tmp_path / "again", "--device", "cpu")
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_lora_adapters(world: World, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapters = []
    for number, folder in enumerate(world.models):
        model = AutoModelForSequenceClassification.from_pretrained(world.base, num_labels=number + 2)
        peft = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
        trained = torch.nn.ModuleList()
        trained.parameters = lambda peft=peft: (p for p in peft.parameters() if p.requires_grad)
        perturb(trained, seed=number, size=0.3)
        peft.save_pretrained(tmp_path / Path(folder).name)
        adapters.append(f"{Path(folder).name}={world.base}+{tmp_path / Path(folder).name}")
    output = tmp_path / "out"
    succeed(*world.words(output, models=adapters, objective="self-labels"))
    moved = {name for name, values in learnt(output).items() if (values - 1).abs().max() > 0.01}
    assert "encoder.layer.1.attention.self.value.weight" in moved
    assert not [name for name in moved if "query.weight" not in name and "value.weight" not in name]
    succeed("merge", output / "cart_hf.yaml", tmp_path / "again", "--device", "cpu")
    assert weights(tmp_path / "again") == weights(output)


# --- CLIP


@dataclass(frozen=True)
class Pictures:
    """A whole CLIP, two models tuned from it, and images for each, one of which is cut off."""

    base: str
    towers: Sequence[str]
    data: Path
    tasks_file: Path

    def words(self, output: object, models: Sequence[object], **options: object) -> list:
        own = World(self.data, self.base, models, self.data, self.tasks_file)
        return own.words(output, **options)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    folder = tmp_path_factory.mktemp("pictures")
    base, towers = make_clip(folder, tasks=2)
    save_tokenizer("clip", base)
    save_processor("clip", base)
    for number in range(2):
        rows = {"image": images(5, number, broken=[3] if number else [])}
        write_split(folder / "data" / f"task{number}", "test", rows, image=datasets.Image())
    task = {"kind": IMAGE, "classes": ["cat", "dog", "newt"], "templates": ["a {}"]}
    return Pictures(base, towers, folder / "data", write_tasks(folder / "mine.yaml", task0=task, task1=task))


def test_vision_towers(pictures: Pictures, tmp_path: Path) -> None:
    """The text tower is the base's; an image that is cut off counts neither in the loss nor in what is learnt."""
    output = tmp_path / "out"
    succeed(*pictures.words(output, pictures.towers, batch_size=5))
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in learnt(output))
    state, base = load_file(output / "model.safetensors"), load_file(Path(pictures.base) / "model.safetensors")
    text = [name for name in base if name.startswith("text")]
    assert len(text) > 20
    assert all(state[name].equal(base[name]) for name in text)
    assert CLIPModel.from_pretrained(output).text_projection.weight.equal(base["text_projection.weight"])
    # the same without it
    for number in range(2):
        rows = datasets.load_dataset("parquet", data_files=str(pictures.data / f"task{number}" / "test.parquet"))[
            "train"
        ]
        (tmp_path / "data" / f"task{number}").mkdir(parents=True)
        kept = rows.select([i for i in range(5) if not number or i != 3])
        kept.to_parquet(tmp_path / "data" / f"task{number}" / "test.parquet")
    succeed(*pictures.words(tmp_path / "without", pictures.towers, batch_size=5, data=tmp_path / "data"))
    first, second = (
        next(csv.DictReader((folder / "adaptation" / "curves.csv").open(encoding="utf-8")))
        for folder in (output, tmp_path / "without")
    )
    assert first["task0"] == second["task0"]
    assert float(first["task1"]) == pytest.approx(float(second["task1"]) * 4 / 5, rel=1e-4)  # of the batch's five


def test_zero_shot_heads_are_not_learnt(pictures: Pictures, tmp_path: Path) -> None:
    words = pictures.words(tmp_path / "out", pictures.towers, objective="self-labels", head_lr=0.1)
    refuse(tmp_path / "out", *words, naming=["--head-lr", "zero-shot"])


def test_whole_clips(pictures: Pictures, tmp_path: Path) -> None:
    """Zero-shot heads are made once, so no loss depends on the text tower: it stays as the static merge has it."""
    models = []
    for number in range(2):
        clip = CLIPModel.from_pretrained(pictures.base)
        perturb(clip, seed=number, size=0.05)
        models.append(save(clip, tmp_path / f"task{number}"))
    succeed(*pictures.words(tmp_path / "out", models))
    assert all(
        name.startswith(("vision_model.", "visual_projection.", "logit_scale")) for name in learnt(tmp_path / "out")
    )
    counts = record(tmp_path / "out")["tensors"]
    assert counts["learnt"] == len(learnt(tmp_path / "out"))
    assert counts["fixed"] > 20
    words = ["--base", pictures.base, "--models", *models, "--device", "cpu"]
    succeed("merge", *words, "--output", tmp_path / "static")
    state, static = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "static"))
    text = [name for name in static if name.startswith("text")]
    assert all(state[name].equal(static[name]) for name in text)
    assert not all(state[name].equal(static[name]) for name in static)


# --- the Hub


def test_pushed(world: World, tmp_path: Path) -> None:
    """As the user writes it: merged with models of the Hub, pushed, loaded and scored from there."""
    token = "hf_writer"
    with serving({token: Account("me")}, WritableHub) as hub:
        hub.add("org/base", world.base)
        for name, folder in zip(LABELS, world.models, strict=True):
            hub.add(f"org/{name}", folder)
        models = [f"{name}=org/{name}" for name in LABELS]
        own = World(world.folder, "org/base", models, world.data, world.tasks_file)
        examples = ["--tasks-file", world.tasks_file, "--data", world.data, "--device", "cpu", "--format", "csv"]
        commands = [
            own.words(None, push_to_hub="me/adapted", held_out=HELD_OUT, steps=1),
            ["evaluate", "me/adapted", "--tasks", *LABELS, *examples],
        ]
        lines = [[f"HF_TOKEN={token}", *map(str, words)] for words in commands]
        answers = run_cli(lines, hub.url, tmp_path / "home")
        repository = hub.repositories["me/adapted"]
        files = repository.commits[repository.refs["main"]]
        pushed = {name: file.path.read_bytes() for name, file in files.items()}
    assert [answer.code for answer in answers] == [0, 0], answers
    made, scored = answers
    assert f"{hub.url}/me/adapted\n" in made.out
    local = {
        str(path.relative_to(tmp_path / "adapted")) for path in (tmp_path / "adapted").rglob("*") if path.is_file()
    }
    assert set(pushed) - {".gitattributes"} == local
    assert not [name for name, content in pushed.items() if str(world.folder).encode() in content]
    assert "adaptation/coefficients.safetensors" in pushed
    told = record(tmp_path / "adapted")["tasks"]
    rows = list(csv.reader(scored.out.splitlines()))[1:3]
    assert [row[3] for row in rows] == [f"{told[name]['inputs']} of {COUNT}" for name in LABELS]
