"""Inputs that a model was adapted on: known again by their content, counted in its results, or left out."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from checkpoints import make_clip, make_family
from commands import call, run_cli, succeed
from hub_server import serving
from plain_loops import forwards_of, outcomes
from safetensors.numpy import save_file
from small_tasks import images, numbers, save_processor, save_tokenizer, texts, write_split, write_tasks
from transformers import RobertaModel

import cart_hf
from cart_hf.errors import UserError
from cart_hf.evaluation.report import as_table, transductive
from cart_hf.evaluation.results import Results, TaskResult
from cart_hf.output.record import ADAPTATION_FOLDER, INPUTS_FILE, RECIPE_FILE
from cart_hf.recipe import Evaluation
from cart_hf.tasks import IMAGE, TEXT, Task, TaskData, load_split

pytestmark = pytest.mark.usefixtures("own_caches")

COUNT, BATCH = 11, 4
ADAPTED = {"task0": [0, 2, 3, 7, 10], "task1": [1]}
"""The rows of each task that the adapted model was adapted on."""
LABELS = {"task0": ["roberta0-0", "roberta0-1"], "task1": ["roberta1-0", "roberta1-1", "roberta1-2"]}
PAIR = Task(name="mine", kind=TEXT, text=("first", "second"))
PICTURES = Task(name="mine", kind=IMAGE)


@dataclass(frozen=True)
class World:
    """A merge, the same adapted on some of the inputs, and two tasks: pairs of texts, and texts."""

    folder: Path
    merged: Path
    adapted: Path
    data: Path
    tasks_file: Path

    def evaluation(self, *names: str, **changes: Any) -> Evaluation:
        given = {"tasks": names, "tasks_file": str(self.tasks_file), "data": str(self.data), "batch_size": BATCH}
        return Evaluation(**(given | changes))

    def arguments(self, *names: str) -> list[Any]:
        """Return the command line of an evaluation on some tasks."""
        return ["--tasks", *names, "--tasks-file", self.tasks_file, "--data", self.data, "--batch-size", BATCH]

    def adapt(self, folder: Path, rows: dict[str, Sequence[int]]) -> Path:
        """Make a copy of the merge that says it was adapted on some rows of each task."""
        shutil.copytree(self.merged, folder)
        tasks = cart_hf.tasks.find_tasks(list(rows), tasks_file=self.tasks_file)
        write_inputs(folder, **{task.name: hashes(task, self.data)[list(rows[task.name])] for task in tasks})
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base, models = make_family(folder, "roberta", tasks=2)
    save_tokenizer("roberta", base, *models)
    declared = {}
    for number, (name, names) in enumerate(LABELS.items()):
        columns = ("first", "second")[: 2 - number]
        rows = {column: texts(COUNT, seed=10 * number + i, longest=6) for i, column in enumerate(columns)}
        rows |= {"label": numbers(COUNT, len(names), seed=number)}
        write_split(folder / "data" / name, "test", rows, label=names)
        declared[name] = {"kind": TEXT, "text": list(columns)}
    tasks_file = write_tasks(folder / "mine.yaml", **declared)
    merged = folder / "merged"
    cart_hf.merge(base=base, models=models, output=merged, device="cpu", workers=1)
    found = World(folder, merged, folder / "adapted", folder / "data", tasks_file)
    found.adapt(found.adapted, ADAPTED)
    return found


def hashes(task: Task, data: Path) -> np.ndarray:
    """Return the hashes of a task's test split."""
    found = load_split(task, "test", data=data).input_hashes()
    assert (found.dtype, found.shape) == (np.int64, (len(set(found.tolist())),))
    return found


def write_inputs(folder: Path, **inputs: np.ndarray) -> None:
    """Write what an adapted folder says of the inputs it was adapted on."""
    (folder / ADAPTATION_FOLDER).mkdir(exist_ok=True)
    save_file({name: np.sort(values) for name, values in inputs.items()}, folder / ADAPTATION_FOLDER / INPUTS_FILE)


def without(world: World, folder: Path, rows: dict[str, Sequence[int]] = ADAPTED) -> Path:
    """Write the tasks' data with these rows removed."""
    for name, removed in rows.items():
        whole = datasets.load_dataset("parquet", data_files=str(world.data / name / "test.parquet"), split="train")
        (folder / name).mkdir(parents=True)
        whole.select([i for i in range(COUNT) if i not in removed]).to_parquet(folder / name / "test.parquet")
    return folder


# --- what an input is called


def written(folder: Path, rows: dict[str, Sequence[Any]], split: str = "test", task: Task = PAIR) -> TaskData:
    write_split(folder / "mine", split, rows | {"label": [0] * len(next(iter(rows.values())))})
    return load_split(task, split, data=folder)


def test_a_text_is_called_the_same_wherever_it_stands(tmp_path: Path) -> None:
    first, second = ["a", "b, c", "naïve"], ["x", "", "東"]
    ours = written(tmp_path, {"first": first, "second": second}).input_hashes()
    # what `b2sum -l 64` says of "1 0 0 0 0 0 0 0 a 1 0 0 0 0 0 0 0 x" ...; never to change: they are stored, and published
    assert ours.tolist() == [-1651198871749850521, -6073943730269672150, -6928456989624177413]
    rows = [f'{i},"{one}","{two}",1\n' for i, (one, two) in enumerate(zip(first, second, strict=True))]
    (tmp_path / "mine" / "train.csv").write_text("idx,first,second,label\n" + "".join(reversed([rows[0], rows[2]])))
    theirs = load_split(PAIR, "train", data=tmp_path).input_hashes()
    assert theirs.tolist() == [ours[2], ours[0]]


def test_columns_are_not_confused(tmp_path: Path) -> None:
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("c", "ab"), ("a\0b", "c"), ("a", "b\0c")]
    rows = {"first": [one for one, _ in pairs], "second": [two for _, two in pairs]}
    of_pairs = written(tmp_path, rows).input_hashes()
    alone = Task(name="mine", kind=TEXT, text=("first",))
    of_texts = written(tmp_path, rows, "train", alone).input_hashes()
    assert len({*of_pairs, *of_texts}) == len(pairs) + len(set(rows["first"]))


def test_an_image_is_called_after_its_file(tmp_path: Path) -> None:
    stored = images(3, seed=4, broken=[1])  # nothing is decoded
    ours = []
    for features in ({"image": datasets.Image()}, {}):
        write_split(tmp_path / "mine", "test", {"image": stored, "label": [0, 1, 1]}, **features)
        ours.append(hashes(PICTURES, tmp_path).tolist())
    folder = tmp_path / "folder" / "mine" / "test"
    for i, image in enumerate(stored):
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"class{i % 2}" / f"{9 - i}.png").write_bytes(image["bytes"])
    read = load_split(PICTURES, "test", data=tmp_path / "folder")
    assert not any(row["image"]["bytes"] for row in read.rows)
    assert ours[0] == ours[1]
    assert set(read.input_hashes()) == set(ours[0])
    write_split(tmp_path / "mine", "train", {"image": [None, stored[2]], "label": [0, 1]}, image=datasets.Image())
    assert load_split(PICTURES, "train", data=tmp_path).input_hashes()[1] == ours[0][2]


# --- a part of a split


def test_what_is_kept_is_limited_afterwards(tmp_path: Path) -> None:
    rows = {"first": [chr(97 + i) for i in range(12)], "second": ["z"] * 12}
    write_split(tmp_path / "mine", "test", rows | {"label": [f"label{i % 3}" for i in range(12)]})
    whole = load_split(PAIR, "test", data=tmp_path)
    called = whole.input_hashes()

    def kept(*wanted: int, **options: Any) -> TaskData:
        return load_split(PAIR, "test", data=tmp_path, keep=lambda seen: np.isin(seen, called[list(wanted)]), **options)

    part = kept(0, 3, 4, 6, 9, 11, limit=3)
    assert part.texts(range(3))[0] == ["a", "e", "j"]
    assert part.labels.tolist() == [0, 1, 0]
    assert part.label_names == ("label0", "label1", "label2")
    assert kept(0, 3, limit=5).label_names == whole.label_names, "names depend on what is kept"
    assert len({kept(0, 3).fingerprint, kept(0, 4).fingerprint, whole.fingerprint}) == 3
    assert kept(*range(12)).fingerprint == whole.fingerprint
    with pytest.raises(UserError) as refused:
        kept()
    assert refused.value.problems == [
        f"task 'mine': none of the 12 examples of split 'test' of {tmp_path / 'mine'} is left to read"
    ]


def test_what_is_kept_is_chosen_among_texts_that_were_checked(tmp_path: Path) -> None:
    write_split(tmp_path / "mine", "test", {"first": ["a", None], "second": ["b", "c"], "label": [0, 1]})
    with pytest.raises(UserError, match="row 1 has no text in column 'first'"):
        load_split(PAIR, "test", data=tmp_path, limit=1, keep=lambda seen: np.ones(len(seen), bool))


# --- the inputs that a model was not adapted on


def test_unseen_inputs_are_scored_as_if_the_others_were_not_there(world: World, tmp_path: Path) -> None:
    data = without(world, tmp_path)
    for model in (world.adapted, world.merged):
        held_out = outcomes(model, world.evaluation(*ADAPTED, unseen_by=str(world.adapted)))
        removed = outcomes(model, world.evaluation(*ADAPTED, data=str(data)))
        for name, rows in ADAPTED.items():
            assert held_out[name].predictions.tolist() == removed[name].predictions.tolist()
            result, expected = held_out[name].result, removed[name].result
            assert result.examples == COUNT - len(rows)
            assert (result.metrics, result.adapted_on) == (expected.metrics, 0)


def test_the_individual_models_are_scored_on_the_same_inputs(world: World, tmp_path: Path) -> None:
    found = cart_hf.evaluate(
        world.merged, world.evaluation(*ADAPTED, unseen_by=str(world.adapted)), normalize=True, device="cpu"
    )
    data = str(without(world, tmp_path))
    removed = cart_hf.evaluate(world.merged, world.evaluation(*ADAPTED, data=data), normalize=True, device="cpu")
    assert (found.individual, found.average) == (removed.individual, removed.average)
    assert found.environment["unseen_by"] == "adapted", "a path of this machine, in results that are published"
    assert "unseen_by" not in removed.environment


def test_a_limit_spreads_over_the_unseen_inputs(world: World) -> None:
    found = outcomes(world.merged, world.evaluation("task0", unseen_by=str(world.adapted), limit=3))["task0"]
    rows = [i for i in range(COUNT) if i not in ADAPTED["task0"]]
    whole = load_split(found.data.task, "test", data=world.data)
    assert found.data.input_hashes().tolist() == whole.input_hashes()[[rows[0], rows[2], rows[4]]].tolist()


def test_tasks_that_share_their_inputs_leave_out_the_same(world: World, tmp_path: Path) -> None:
    """The model is run once on the inputs of both."""
    rows = {"first": texts(COUNT, seed=5), "a": [0, 1] * 5 + [0], "b": [0, 1, 2] * 3 + [0, 1]}
    write_split(tmp_path / "shared", "test", rows)
    shared = {"kind": TEXT, "text": "first", "dataset": "shared", "label_mapping": "index"}
    tasks_file = write_tasks(tmp_path / "mine.yaml", task0=shared | {"label": "a"}, task1=shared | {"label": "b"})
    called = hashes(Task(name="shared", kind=TEXT, text=("first",), label="a"), tmp_path)
    adapted = tmp_path / "adapted"
    shutil.copytree(world.merged, adapted)
    write_inputs(adapted, task0=called[:3], task1=called[2:6])
    asked = world.evaluation("task0", "task1", tasks_file=str(tasks_file), data=None, unseen_by=str(adapted))
    with forwards_of(RobertaModel) as seen:
        found = outcomes(adapted, asked)
    assert len(seen) == 2  # 5 examples, 4 at a time
    for outcome in found.values():
        assert outcome.data.input_hashes().tolist() == called[6:].tolist()


def test_a_recipe_names_them(world: World, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(world.merged, merged)
    recipe = yaml.safe_load((merged / RECIPE_FILE).read_text())
    declared = {"tasks": ["task0"], "tasks_file": str(world.tasks_file), "data": str(world.data)}
    recipe["evaluation"] = declared | {"unseen_by": str(world.adapted)}
    cart_hf.Recipe.from_mapping(recipe)
    (merged / RECIPE_FILE).write_text(yaml.safe_dump(recipe))
    rows = csv.reader(io.StringIO(succeed("evaluate", merged, "--format", "csv").out))
    assert [row[2] for row in rows] == ["examples", str(COUNT - len(ADAPTED["task0"])), ""]


# --- the inputs that a model was adapted on


def test_a_model_says_how_many_it_was_adapted_on(world: World, tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    arguments = [*world.arguments(*ADAPTED), "--output", target]
    lines = succeed("evaluate", world.adapted, *arguments).out.splitlines()
    assert lines[-1] == (
        "transductive: 6 of 22 examples were among the inputs the model was adapted on; "
        "`--unseen-by FOLDER` scores the others"
    )
    assert [task["adapted_on"] for task in json.loads(target.read_text())["tasks"].values()] == [5, 1]
    printed = succeed("evaluate", world.adapted, *arguments, "--resume", "--format", "csv").out
    header, *rows = csv.reader(io.StringIO(printed))
    assert header == ["task", "score", "examples", "adapted on", "seconds", "metrics"]
    assert [row[2:4] for row in rows] == [["11", "5 of 11"], ["11", "1 of 11"], ["", ""]]
    held_out = succeed("evaluate", world.adapted, *arguments, "--overwrite", "--unseen-by", world.adapted).out
    assert "adapted" not in held_out
    assert "transductive" not in held_out
    assert "adapted_on" not in target.read_text()


@pytest.mark.parametrize("limit", [None, 4])
def test_all_of_them(world: World, tmp_path: Path, limit: int | None) -> None:
    adapted = world.adapt(tmp_path / "adapted", {"task0": range(COUNT)})
    found = cart_hf.evaluate(adapted, world.evaluation("task0", limit=limit), device="cpu")
    examples = limit or COUNT
    assert found.tasks["task0"].adapted_on == examples
    assert transductive(found) == (
        f"transductive: all {examples} examples were among the inputs the model was adapted on"
    )
    assert as_table(found).rows[0][3] == f"{examples} of {examples}"
    other = cart_hf.evaluate(adapted, world.evaluation("task1"), device="cpu")
    assert (other.tasks["task1"].adapted_on, transductive(other)) == (0, None)
    assert "adapted on" not in as_table(other).header


def test_one_task_of_an_adapted_model_alone(world: World) -> None:
    found = outcomes(world.adapted / "tasks" / "task0", world.evaluation("task0"), base=str(world.folder / "base"))
    assert found["task0"].result.adapted_on == 5


def test_results_are_taken_over_with_what_was_adapted_on(world: World, tmp_path: Path) -> None:
    """A model in memory is known by its tensors, which do not tell what it was adapted on."""
    adapted, target = tmp_path / "adapted", tmp_path / "results.json"
    world.adapt(adapted, {"task0": [1, 2]})
    model = cart_hf.MultiTaskModel.from_pretrained(adapted)

    def evaluated() -> tuple[int, int]:
        with forwards_of(RobertaModel) as seen:
            found = cart_hf.evaluate(model, world.evaluation("task0"), device="cpu", output=target, resume=True)
        return len(seen), found.tasks["task0"].adapted_on

    assert evaluated() == (3, 2)
    assert evaluated() == (0, 2)
    task = cart_hf.tasks.find_tasks(["task0"], tasks_file=world.tasks_file)[0]
    write_inputs(adapted, task0=hashes(task, world.data)[:4])
    assert evaluated() == (3, 4)
    shutil.rmtree(adapted / ADAPTATION_FOLDER)
    assert evaluated() == (3, 0)


def test_results_files_of_before_are_read() -> None:
    result = TaskResult({"accuracy": 0.5}, 0.5, "accuracy", 4, 1.0)
    plain = Results("model", None, None, None, {"a": result})
    assert "adapted_on" not in plain.to_dict()["tasks"]["a"]
    assert Results.from_dict(plain.to_dict()) == plain
    some = replace(plain, tasks={"a": replace(result, adapted_on=3), "b": result})
    assert Results.from_dict(json.loads(json.dumps(some.to_dict()))) == some
    assert transductive(some).startswith("transductive: 3 of 8 examples")
    zeros = replace(result, metrics={"accuracy": 0.0}, score=0.0, seconds=0.0)
    assert Results.from_dict(replace(plain, tasks={"a": zeros}).to_dict()).tasks["a"] == zeros


# --- models on the Hub


def test_an_adapted_model_on_the_hub(world: World, tmp_path: Path) -> None:
    clip, _ = make_clip(tmp_path / "clip", tasks=0)
    save_tokenizer("clip", clip)
    save_processor("clip", clip)
    write_split(
        tmp_path / "data" / "seen", "test", {"image": images(5, 1), "label": [0, 1] * 2 + [0]}, image=datasets.Image()
    )
    tasks_file = write_tasks(
        tmp_path / "mine.yaml", seen={"kind": IMAGE, "classes": ["cat", "dog"], "templates": ["a {}"]}
    )
    pictures = Task(name="seen", kind=IMAGE)
    (Path(clip) / "merge.json").write_text("{}")
    write_inputs(Path(clip), seen=hashes(pictures, tmp_path / "data")[1:4])
    of_images = ["--tasks-file", tasks_file, "--data", tmp_path / "data", "--tasks", "seen"]
    of_texts = world.arguments("task0")
    commands = [
        ["evaluate", "org/clip", *of_images],
        ["evaluate", "org/clip", *of_images, "--unseen-by", "org/clip@main"],
        ["evaluate", "org/adapted", *of_texts],
        ["evaluate", world.merged, *of_texts, "--unseen-by", "org/adapted"],
        ["evaluate", world.merged, *of_texts, "--unseen-by", "org/merged"],
        ["evaluate", world.merged, *of_texts, "--unseen-by", "org/nobody"],
    ]
    with serving() as hub:
        for name, folder in (("clip", clip), ("adapted", world.adapted), ("merged", world.merged)):
            hub.add(f"org/{name}", folder)
        asked = [[*map(str, words), "--device", "cpu", "--format", "csv"] for words in commands]
        *answers, not_adapted, missing = run_cli(asked, hub.url, tmp_path / "home")
    assert [answer.err for answer in answers] == [""] * 4
    counts = [answer.out.splitlines()[1].split(",")[2:4] for answer in answers]
    assert [first for first, _ in counts] == ["5", "2", "11", "6"]
    assert (counts[0][1], counts[2][1]) == ("3 of 5", "5 of 11")
    assert (not_adapted.code, missing.code) == (2, 2)
    assert "--unseen-by org/merged: it has no adaptation/inputs.safetensors" in not_adapted.errors[0]
    assert missing.errors[0].startswith("--unseen-by: org/nobody: no such folder here and no such repository")


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unseen-by", "{merged}"], "--unseen-by {merged}: it has no adaptation/inputs.safetensors, which lists the inputs"),
        (["--unseen-by", "{merged}/none"], "--unseen-by: folder not found: {merged}/none"),
        (["--unseen-by", "{adapted}", "--submission", "glue.zip"], "the leaderboard wants every example; leave --unseen-by out"),
        (["--unseen-by", "{adapted}", "--stream", "--limit", "3"], "--unseen-by: --stream reads the first rows only"),
    ],
)  # fmt: skip
def test_what_cannot_be_left_out(world: World, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"merged": world.merged, "adapted": world.adapted}
    words = [word.format(**places) for word in arguments]
    answer = call("evaluate", world.merged, *world.arguments("task0"), "--output", tmp_path / "results.json", *words)
    assert (answer.code, len(answer.errors), answer.out) == (2, 1, ""), answer
    assert message.format(**places) in answer.errors[0]
    assert not (tmp_path / "results.json").exists()


def test_nothing_is_left(world: World, tmp_path: Path) -> None:
    adapted = world.adapt(tmp_path / "adapted", {"task0": range(COUNT)})
    answer = call("evaluate", adapted, *world.arguments(*ADAPTED), "--unseen-by", adapted, "--format", "csv")
    assert answer.code == 2
    assert answer.errors == [
        "task 'task0', split 'test': the model of --unseen-by was adapted on all 11 examples; score another split "
        "(--split), or adapt on a part of this one"
    ]
    assert [line.split(",")[0] for line in answer.out.splitlines()] == ["task", "task1", "average"]


@pytest.mark.parametrize("content", ["cut", "floats"])
def test_a_damaged_list_of_inputs(world: World, tmp_path: Path, content: str) -> None:
    adapted = world.adapt(tmp_path / "adapted", {"task0": [1]})
    path = adapted / ADAPTATION_FOLDER / INPUTS_FILE
    path.write_bytes(path.read_bytes()[:9])
    if content == "floats":
        save_file({"task0": np.ones(3)}, path)
    for words in ([], ["--unseen-by", adapted]):
        answer = call("evaluate", adapted, *world.arguments("task0"), *words)
        assert (answer.code, len(answer.errors)) == (2, 1), answer
        assert str(path) in answer.errors[0]
