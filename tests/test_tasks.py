"""Tasks: what is built in, what a tasks file may say, and the examples that are read from every kind of place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from commands import call, refuse, succeed
from small_tasks import dataset, image_bytes, images, write_split, write_tasks

from cart_hf.errors import UserError
from cart_hf.tasks import IMAGE, REGRESSION, TEXT, DatasetSource, Task, find_tasks, load_split, suites, tasks

pytestmark = pytest.mark.usefixtures("own_caches")

# name, dataset, configuration, split, classes, templates: the checkpoints of tanganke/clip-vit-...
VISION_20 = [
    ("sun397", "tanganke/sun397", None, "test", 397, 2),
    ("stanford_cars", "tanganke/stanford_cars", None, "test", 196, 8),
    ("resisc45", "tanganke/resisc45", None, "test", 45, 18),
    ("eurosat", "tanganke/eurosat", None, "test", 10, 3),
    ("svhn", "ufldl-stanford/svhn", "cropped_digits", "test", 10, 1),
    ("gtsrb", "tanganke/gtsrb", None, "test", 43, 3),
    ("mnist", "ylecun/mnist", None, "test", 10, 1),
    ("dtd", "tanganke/dtd", None, "test", 47, 8),
    ("oxford_flowers102", "dpdl-benchmark/oxford_flowers102", None, "test", 102, 1),
    ("pcam", "1aurent/PatchCamelyon", None, "test", 2, 1),
    ("fer2013", "clip-benchmark/wds_fer2013", None, "test", 7, 6),
    ("oxford_iiit_pet", "timm/oxford-iiit-pet", None, "test", 37, 1),
    ("stl10", "tanganke/stl10", None, "test", 10, 2),
    ("cifar100", "tanganke/cifar100", None, "test", 100, 18),
    ("cifar10", "tanganke/cifar10", None, "test", 10, 18),
    ("food101", "ethz/food101", None, "validation", 101, 1),
    ("fashion_mnist", "zalando-datasets/fashion_mnist", None, "test", 10, 2),
    ("emnist_letters", "tanganke/emnist_letters", None, "test", 26, 1),
    ("kmnist", "tanganke/kmnist", None, "test", 10, 1),
    ("rendered_sst2", "nateraw/rendered-sst2", None, "test", 2, 1),
]
# columns, labels, metrics, score, file of the leaderboard
GLUE = {
    "cola": (1, 2, ("matthews", "accuracy"), "matthews", "CoLA.tsv"),
    "sst2": (1, 2, ("accuracy",), "accuracy", "SST-2.tsv"),
    "mrpc": (2, 2, ("accuracy", "f1"), "mean of accuracy and f1", "MRPC.tsv"),
    "stsb": (2, 0, ("pearson", "spearman"), "mean of pearson and spearman", "STS-B.tsv"),
    "qqp": (2, 2, ("accuracy", "f1"), "mean of accuracy and f1", "QQP.tsv"),
    "mnli": (2, 3, ("accuracy",), "accuracy", "MNLI-m.tsv"),
    "mnli_mismatched": (2, 3, ("accuracy",), "accuracy", "MNLI-mm.tsv"),
    "qnli": (2, 2, ("accuracy",), "accuracy", "QNLI.tsv"),
    "rte": (2, 2, ("accuracy",), "accuracy", "RTE.tsv"),
    "wnli": (2, 2, ("accuracy",), "accuracy", "WNLI.tsv"),
    "ax": (2, 3, ("matthews",), "matthews", "AX.tsv"),
}


# --- the built-in tasks


def test_every_built_in_task_is_valid() -> None:
    found = tasks()
    by_kind = {kind: [name for name, task in found.items() if task.kind == kind] for kind in (TEXT, REGRESSION, IMAGE)}
    assert len(by_kind[IMAGE]) == 29
    assert by_kind[REGRESSION] == ["stsb"]
    assert len(by_kind[TEXT]) == 10 + 11  # GLUE without STS-B; CLINC150 and its ten domains
    for name, task in found.items():
        assert task.title != name, f"{name} has no title for people"
        if task.kind == IMAGE:
            assert task.classes
            assert task.templates
            assert len(set(task.classes)) == len(task.classes), f"{name}: a class twice"


@pytest.mark.parametrize(("name", "path", "config", "split", "classes", "templates"), VISION_20)
def test_a_vision_task_is_that_of_its_checkpoints(
    name: str, path: str, config: str | None, split: str, classes: int, templates: int
) -> None:
    task = tasks()[name]
    assert task.dataset == DatasetSource(path=path, name=config)
    assert task.splits.get(task.split, task.split) == split
    assert (len(task.classes), len(task.templates)) == (classes, templates)


def test_the_other_family_of_vision_tasks_has_the_same_sets() -> None:
    found = tasks()
    assert len(found["emnist_digits"].classes) == 10
    for name in ("food101", "fashion_mnist", "fer2013", "cifar100", "oxford_iiit_pet", "kmnist", "oxford_flowers102"):
        ours, other = found[name], found[f"{name}_tall"]
        assert len(ours.classes) == len(other.classes), name
        assert (ours.classes, ours.templates) != (other.classes, other.templates), f"{name}: why declare it twice?"


@pytest.mark.parametrize("name", GLUE)
def test_a_glue_task(name: str) -> None:
    task = tasks()[name]
    columns, labels, metrics, score, file = GLUE[name]
    config = {"mnli_mismatched": "mnli"}.get(name, name)
    assert task.dataset == DatasetSource(path="nyu-mll/glue", name=config)
    assert (len(task.text), len(task.labels), task.metrics, task.scored_by) == (columns, labels, metrics, score)
    assert task.submission is not None
    assert task.submission.file == file
    assert task.max_length == 128


def test_suites_name_tasks_that_exist() -> None:
    sizes = {name: len(members) for name, members in suites().items()}
    assert sizes == {
        **{"glue": 8, "glue-7": 7, "glue-all": 10, "glue-submission": 10, "clinc150-10": 10},
        **{"vision-8": 8, "vision-14": 14, "vision-20": 20},
        **{"vision-8-tall": 8, "vision-14-tall": 14, "vision-20-tall": 20},
    }
    for name, members in suites().items():
        assert [task.name for task in find_tasks(suite=name)] == list(dict.fromkeys(members))
    assert [row[0] for row in VISION_20] == list(suites()["vision-20"])


def test_the_domains_of_clinc150_share_out_its_intents() -> None:
    domains = [task.labels for task in find_tasks(suite="clinc150-10")]
    assert {len(labels) for labels in domains} == {15}
    assert len({label for labels in domains for label in labels}) == 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["sst3"]}, "no task 'sst3' - did you mean 'sst2'?"),
        (
            {"names": ["zzzzzz"]},
            "no task 'zzzzzz'; `cart-hf tasks` lists the built-in ones, --tasks-file adds your own",
        ),
        ({"names": ["glue"]}, "'glue' is a suite: give it as --suite glue"),
        ({"suite": "vision-9"}, "no suite 'vision-9' - did you mean 'vision-8'?"),
        ({"suite": "glue", "names": ["sst2"]}, "give --suite or --tasks, not both"),
    ],
)
def test_an_unknown_task_or_suite(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as failure:
        find_tasks(**arguments)
    assert failure.value.problems == [message]


# --- the command


def test_the_command_lists_tasks_and_suites() -> None:
    lines = succeed("tasks").out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert {*tasks(), *suites()} <= set(rows)
    assert "nyu-mll/glue (mrpc)" in rows["mrpc"]
    assert "mean of accuracy and f1" in rows["mrpc"]


def test_what_the_command_prints_is_a_tasks_file(tmp_path: Path) -> None:
    names = ["mnli", "eurosat", "stsb", "clinc150_home", "mnist"]
    (tmp_path / "mine.yaml").write_text(succeed("tasks", *names).out)
    assert find_tasks(tasks_file=tmp_path / "mine.yaml") == [tasks()[name] for name in names]
    again = succeed("tasks", "--tasks-file", tmp_path / "mine.yaml").out
    assert again == (tmp_path / "mine.yaml").read_text()


def test_the_command_refuses_an_unknown_task(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "tasks", "sst3", naming=["did you mean 'sst2'"])
    assert call("tasks", "sst3", "qnlii").errors == [
        "no task 'sst3' - did you mean 'sst2'?",
        "no task 'qnlii' - did you mean 'qnli'?",
    ]


# --- a tasks file

GOOD = {
    "mine": {"kind": TEXT, "dataset": "reviews.csv", "text": "review", "labels": ["bad", "good"]},
    "pairs": {"kind": TEXT, "dataset": {"path": "org/pairs", "name": "en", "revision": "v1"}, "text": ["a", "b"]},
    "degree": {"kind": REGRESSION, "dataset": "degree", "text": ["a", "b"], "label": "similarity"},
    "digits": {"kind": IMAGE, "classes": [0, 1, 2], "templates": ["the digit {}"], "splits": {"test": "held-out"}},
}


def test_a_tasks_file(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("review,label\n")
    (tmp_path / "degree").mkdir()
    path = write_tasks(tmp_path / "mine.yaml", **GOOD)
    mine, pairs, degree, digits = find_tasks(tasks_file=path)
    assert (mine.name, mine.title, mine.head, mine.text, mine.metrics) == (
        "mine",
        "mine",
        "mine",
        ("review",),
        ("accuracy",),
    )
    assert mine.dataset == DatasetSource(path=str(tmp_path / "reviews.csv"))  # beside the tasks file
    assert pairs.dataset == DatasetSource(path="org/pairs", name="en", revision="v1")
    assert degree.dataset == DatasetSource(path=str(tmp_path / "degree"))
    assert (degree.metrics, degree.scored_by) == (("pearson",), "pearson")
    assert (digits.dataset, digits.classes, digits.image) == (None, ("0", "1", "2"), "image")
    assert find_tasks(["digits", "sst2"], tasks_file=path) == [digits, tasks()["sst2"]]


def test_a_task_of_ones_own_goes_before_the_built_in_one(tmp_path: Path) -> None:
    path = write_tasks(tmp_path / "mine.yaml", sst2={"kind": TEXT, "text": "mine"})
    assert find_tasks(["sst2"], tasks_file=path)[0].text == ("mine",)


def body(**changes: Any) -> dict[str, Any]:
    """Return a good task with changes; None leaves a key out."""
    whole = {"kind": TEXT, "text": "sentence", "labels": ["a", "b"], **changes}
    return {key: value for key, value in whole.items() if value is not None}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (body(lables=["a", "b"]), "mine.lables: unknown key - did you mean 'labels'?"),
    "unknown key of dataset": (
        body(dataset={"path": "x", "nmae": "y"}),
        "mine.dataset.nmae: unknown key - did you mean 'name'?",
    ),
    "unknown key of submission": (
        body(submission={"file": "a.tsv", "lables": ["a"]}),
        "mine.submission.lables: unknown key - did you mean 'labels'?",
    ),
    "no kind": (body(kind=None), "mine.kind: "),
    "unknown kind": (body(kind="token-classification"), "mine.kind: "),
    "no text": (body(text=None), "mine.text: name one column of text, or two for pairs"),
    "three texts": (body(text=["a", "b", "c"]), "mine.text: name one column of text, or two for pairs"),
    "text of an image": (body(kind=IMAGE), "mine.text: an image-classification task has no text columns"),
    "yes and no": (
        body(labels=[True, False]),
        "mine.labels: YAML reads an unquoted yes, no, on or off as true or false",
    ),
    "no metric": (body(metrics=[]), "mine.metrics: name at least one"),
    "score of another metric": (
        body(metrics=["accuracy"], score="f1"),
        "mine.score: 'f1' is none of the metrics (accuracy)",
    ),
    "template without a place": (
        body(kind=IMAGE, text=None, templates=["a cat"]),
        "mine.templates: a prompt needs '{}'",
    ),
    "fewer classes than labels": (body(kind=IMAGE, text=None, classes=["a"]), "mine.classes: 1 names for 2 labels"),
    "unknown split": (body(splits={"held-out": "test"}), "mine.splits: 'held-out' is none of train, validation, test"),
    "max_length 0": (body(max_length=0), "mine.max_length: "),
    "label twice": (body(labels=["a", "a"]), "mine.labels: 'a' stands twice"),
    "labels that are no list": (body(labels="positive"), "mine.labels: "),
    "alias of no label": (body(aliases={"c": ["d"]}), "mine.aliases: 'c' is none of the labels"),
    "not a mapping": ("sst2", "mine is not a mapping of a task's keys"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_tasks_file_has_one_message(tmp_path: Path, case: str) -> None:
    mistaken, message = MISTAKES[case]
    path = write_tasks(tmp_path / "mine.yaml", mine=mistaken)
    problems = refuse(tmp_path / "none", "tasks", "--tasks-file", path)
    assert problems[0].startswith(f"{path}: tasks.{message}"), problems


def test_every_mistake_of_a_tasks_file_is_told_at_once(tmp_path: Path) -> None:
    path = write_tasks(tmp_path / "mine.yaml", one=body(lables=[]), two=body(text=None), three=body())
    assert len(refuse(tmp_path / "none", "tasks", "--tasks-file", path, count=2)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [", "is not valid YAML"),
        ("- sst2", "a tasks file is a mapping"),
        ("mine: {kind: text-classification}", "a tasks file is a mapping `tasks:`"),
        ("tasks: []", "a tasks file is a mapping `tasks:`"),
        ("tasks: {a/b: {kind: text-classification, text: s}}", "'a/b' cannot name a task"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_no_tasks_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    refuse(tmp_path / "none", "tasks", "--tasks-file", path, naming=[str(path), message])


# --- reading a split

COLUMNS = {"sentence": ["so so", "good", "bad", "fine"], "label": [0, 1, 0, 1]}


def task(**changes: Any) -> Task:
    return Task.model_validate({"name": "mine", "kind": TEXT, "text": "sentence", **changes})


def problem(*args: Any, **options: Any) -> str:
    """Return the one message that reading a split raises."""
    with pytest.raises(UserError) as failure:
        load_split(*args, **options)
    assert len(failure.value.problems) == 1
    assert "\n" not in failure.value.problems[0]
    return failure.value.problems[0]


LAYOUTS = {
    "parquet": lambda rows, folder: rows.to_parquet(folder / "test.parquet"),
    "csv": lambda rows, folder: rows.to_csv(folder / "test.csv"),
    "tsv": lambda rows, folder: rows.to_csv(folder / "test.tsv", sep="\t"),
    "jsonl": lambda rows, folder: rows.to_json(folder / "test.jsonl"),
    "json": lambda rows, folder: (folder / "test.json").write_text(json.dumps(rows.to_list())),
    "as on the Hub": lambda rows, folder: rows.to_parquet(folder / "data" / "test-00000-of-00001.parquet"),
    "shards": lambda rows, folder: [
        rows.shard(2, shard, contiguous=True).to_parquet(folder / f"test-0000{shard}-of-00002.parquet")
        for shard in range(2)
    ],
    "save_to_disk": lambda rows, folder: datasets.DatasetDict({"test": rows, "train": rows}).save_to_disk(folder),
    "one split, save_to_disk": lambda rows, folder: rows.save_to_disk(folder / "test"),
}


def write_as(layout: str, folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    LAYOUTS[layout](dataset(COLUMNS), folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_local_folder(tmp_path: Path, layout: str) -> None:
    write_as(layout, tmp_path / "mine")
    read = load_split(task(labels=["negative", "positive"]), data=tmp_path)
    assert read.texts(range(4)) == [COLUMNS["sentence"]]
    assert read.labels is not None
    assert (read.labels.tolist(), read.labels.dtype) == (COLUMNS["label"], np.int64)
    assert (read.label_names, read.split, len(read)) == (("negative", "positive"), "test", 4)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "rows.tsv", "rows.jsonl"])
def test_a_task_may_be_one_file(tmp_path: Path, name: str) -> None:
    write_as(name.split(".")[1], tmp_path / "made")
    (tmp_path / "made" / f"test.{name.split('.')[1]}").rename(tmp_path / name)
    path = write_tasks(tmp_path / "mine.yaml", mine={"kind": TEXT, "text": "sentence", "dataset": name})
    assert len(load_split(find_tasks(tasks_file=path)[0])) == 4


def test_quotation_marks_of_a_tsv_quote_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test.tsv").write_text('sentence\tlabel\n"so so\t0\nsaid "good"\t1\n')
    assert load_split(task(), data=tmp_path).texts([0, 1]) == [['"so so', 'said "good"']]


def test_a_task_has_a_folder_or_one_of_its_other_names(tmp_path: Path) -> None:
    write_split(tmp_path / "Mine-v2", "test", COLUMNS)
    assert len(load_split(task(folders=["Mine-v2"]), data=tmp_path)) == 4
    assert problem(task(folders=["mine-v1"]), data=tmp_path) == (
        f"task 'mine': no folder {tmp_path / 'mine'} or {tmp_path / 'mine-v1'}"
    )
    assert problem(task(), data=tmp_path / "nowhere") == f"--data {tmp_path / 'nowhere'}: no such folder"


def test_splits_are_found_by_their_own_names(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "dev", "validation_matched"), start=1):
        write_split(tmp_path / "mine", split, {key: value[:number] for key, value in COLUMNS.items()})
    sizes = {split: len(load_split(task(), split, data=tmp_path)) for split in ("train", "validation")}
    assert sizes == {"train": 1, "validation": 2}
    renamed = task(splits={"validation": "validation_matched"}, split="validation")
    assert len(load_split(renamed, data=tmp_path)) == 3
    message = problem(task(), data=tmp_path)
    assert message.startswith(f"task 'mine': {tmp_path / 'mine'} has no split 'test' (looked for test.parquet, .csv")
    assert "found dev.parquet, train.parquet, validation_matched.parquet" in message


def test_a_val_folder_stands_for_the_test_split(tmp_path: Path) -> None:
    write_split(tmp_path / "mine", "val", COLUMNS)
    assert len(load_split(task(), "test", data=tmp_path)) == 4
    write_split(tmp_path / "mine", "test", {"sentence": ["one"], "label": [0]})
    assert len(load_split(task(), "test", data=tmp_path)) == 1


def test_no_dataset_and_no_data() -> None:
    assert problem(task()).startswith("task 'mine' declares no dataset: give --data DIR with DIR/mine/SPLIT.parquet")
    assert problem(task(dataset={"path": "./rows"})) == "task 'mine': no such file or folder: ./rows"
    assert problem(task(dataset={"path": "rows.csv"})) == "task 'mine': no such file or folder: rows.csv"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test.parquet").write_bytes(b"not parquet")
    assert problem(task(), data=tmp_path).startswith(f"cannot read {tmp_path / 'mine' / 'test.parquet'}: ")
    (tmp_path / "rows.xlsx").write_bytes(b"a table")
    assert problem(task(dataset={"path": str(tmp_path / "rows.xlsx")})) == (
        f"{tmp_path / 'rows.xlsx'}: not a Parquet, CSV, TSV or JSON lines file"
    )


# --- columns and texts


def test_a_missing_column(tmp_path: Path) -> None:
    write_split(tmp_path / "mine", "test", {"sentense": ["a"], "label": [0]})
    assert problem(task(), data=tmp_path) == (
        f"task 'mine': {tmp_path / 'mine'} has no column 'sentence' - did you mean 'sentense'?"
    )
    write_split(tmp_path / "mine", "test", {"sentence": ["a"], "intent": [0]})
    assert "has no column 'label'" in problem(task(), data=tmp_path)
    assert "has no column 'sentence2'" in problem(task(text=["sentence", "sentence2"]), data=tmp_path)


def test_plain_columns_stand_for_declared_ones(tmp_path: Path) -> None:
    write_split(tmp_path / "mine", "test", COLUMNS)
    assert load_split(task(label="intent"), data=tmp_path).labels.tolist() == [0, 1, 0, 1]
    write_split(tmp_path / "mine", "test", {"image": images(2, 1), "label": [0, 1]}, image=datasets.Image())
    read = load_split(task(kind=IMAGE, text=(), image="png", label="cls"), data=tmp_path)
    assert read.image(0).size == (18, 20)


@pytest.mark.parametrize("bad", [None, 7])
def test_a_text_that_is_none(tmp_path: Path, bad: object) -> None:
    columns = {"sentence": ["a", "b", None] if bad is None else [1, 2, 7], "label": [0, 1, 0]}
    write_split(tmp_path / "mine", "test", columns)
    row, shown = (2, "None") if bad is None else (0, "1")
    assert problem(task(), data=tmp_path) == (
        f"task 'mine': row {row} has no text in column 'sentence' (found {shown})"
    )


def test_an_empty_split(tmp_path: Path) -> None:
    nothing = {"sentence": [], "label": []}
    write_split(tmp_path / "mine", "test", nothing, sentence=datasets.Value("string"))
    (tmp_path / "mine" / "train.csv").write_text("sentence,label\n")
    for file in ("test.parquet", "train.csv"):
        assert problem(task(), file.split(".")[0], data=tmp_path) == f"{tmp_path / 'mine' / file}: the split is empty"


def test_a_limit_is_spread_over_the_split(tmp_path: Path) -> None:
    write_split(tmp_path / "mine", "test", {"sentence": list("abcdefghij"), "label": [0] * 5 + [1] * 5})
    read = load_split(task(), data=tmp_path, limit=4)
    assert read.texts(range(4)) == [["a", "c", "f", "h"]]
    assert read.labels.tolist() == [0, 0, 1, 1]
    for limit in (10, 11, 1000):
        assert len(load_split(task(), data=tmp_path, limit=limit)) == 10
    assert problem(task(), data=tmp_path, limit=0) == "limit: must be at least 1, not 0"
    assert "say how many with --limit" in problem(task(), data=tmp_path, stream=True)


# --- labels

NAMES = ["negative", "neutral", "positive"]


def labels_of(
    folder: Path, values: list[Any], feature: Any = None, **declared: Any
) -> tuple[list[float], tuple[str, ...]]:
    columns = {"sentence": ["a"] * len(values), "label": values}
    write_split(folder / "mine", "test", columns, **({"label": feature} if feature is not None else {}))
    read = load_split(task(**declared), data=folder)
    assert read.labels is not None
    return read.labels.tolist(), read.label_names


@pytest.mark.parametrize(
    ("values", "feature", "declared", "expected", "names"),
    [
        ([2, 0, 1], None, {}, [2, 0, 1], ()),
        ([2, 0, 1], None, {"labels": NAMES}, [2, 0, 1], NAMES),
        ([2.0, 0.0, 1.0], None, {"labels": NAMES}, [2, 0, 1], NAMES),
        ([True, False], None, {"labels": ["no", "yes"]}, [1, 0], ["no", "yes"]),
        ([2, 0, 1], NAMES, {}, [2, 0, 1], NAMES),
        ([2, 0, 1], NAMES, {"labels": NAMES}, [2, 0, 1], NAMES),
        ([2, 0, 1], NAMES, {"labels": ["positive", "negative", "neutral"]}, [0, 1, 2], ["positive", "negative", "neutral"]),
        ([2, 0, 1], NAMES, {"labels": ["Positive", "NEGATIVE", "neutral"]}, [0, 1, 2], ["Positive", "NEGATIVE", "neutral"]),
        (
            [2, 0, 1],
            NAMES,
            {"labels": ["good", "bad", "so so"], "aliases": {"good": ["positive"], "bad": ["negative"], "so so": ["neutral"]}},
            [0, 1, 2],
            ["good", "bad", "so so"],
        ),
        (["neutral", "positive", "negative"], None, {}, [1, 2, 0], NAMES),
        (["neutral", "positive", "negative"], None, {"labels": ["positive", "negative", "neutral"]}, [2, 0, 1], ["positive", "negative", "neutral"]),
        # a label that is not in the split, or not among the rows of --limit
        (["positive", "negative"], None, {"labels": NAMES}, [2, 0], NAMES),
        (["yes", "no"], None, {"labels": ["negative", "positive"], "aliases": {"negative": ["no"], "positive": ["yes"]}}, [1, 0], ["negative", "positive"]),
        # a prompt spells a class in its own way
        ([1, 0], ["T-shirt", "dress"], {"classes": ["T - shirt / top", "dress"]}, [1, 0], ["T - shirt / top", "dress"]),
    ],
)  # fmt: skip
def test_labels_have_the_order_that_is_declared(
    tmp_path: Path, values: list[Any], feature: Any, declared: dict[str, Any], expected: list[int], names: list[str]
) -> None:
    assert labels_of(tmp_path, values, feature, **declared) == (expected, tuple(names))


@pytest.mark.parametrize(
    ("values", "feature", "declared", "message"),
    [
        ([0, None, 1], None, {}, "row 1 has no label in column 'label'"),
        ([0.0, float("nan")], None, {}, "row 1 has no label in column 'label'"),
        ([0, 1, 3], None, {"labels": NAMES}, "row 2 has label 3, but there are 3 labels"),
        ([0, -1, 1], None, {"labels": NAMES}, "row 1 has label -1, but there are 3 labels"),
        ([0, -1, 1], NAMES, {"labels": NAMES[::-1]}, "row 1 has label -1, but there are 3 labels"),
        ([0, -2, 1], None, {}, "row 1 has label -2"),
        ([0.5, 1.0], None, {}, "column 'label' holds fractions; a regression is kind: text-regression"),
        ([0, 1], ["a", "b"], {"labels": NAMES}, "the data has 2 labels, the task declares 3"),
        ([0, 1], ["positive", "sad"], {"labels": ["angry", "positive"]}, "the data's labels are ['positive', 'sad'] ..., the task's ['angry', 'positive'] ..."),
        (["yes", "no"], None, {"labels": ["negative", "positive"]}, "label 'yes' of row 0 is none of the task's: negative, positive"),
        ([[0], [1]], None, {}, "column 'label' does not hold numbers or names"),
        ([-1, -1], None, {}, "the labels of split 'test' are hidden"),
    ],
)  # fmt: skip
def test_labels_that_are_wrong(
    tmp_path: Path, values: list[Any], feature: Any, declared: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as failure:
        labels_of(tmp_path, values, feature, **declared)
    assert failure.value.problems[0].startswith(f"task 'mine': {message}")


def test_hidden_labels_may_be_asked_for(tmp_path: Path) -> None:
    write_split(tmp_path / "mine", "test", {"sentence": ["a", "b"], "label": [-1, -1]}, label=NAMES)
    assert load_split(task(), data=tmp_path, labelled=False).labels is None
    write_split(tmp_path / "mine", "test", {"sentence": ["a", "b"]})
    read = load_split(task(labels=NAMES), data=tmp_path, labelled=False)
    assert (read.labels, read.label_names) == (None, tuple(NAMES))


def test_a_regression_reads_numbers(tmp_path: Path) -> None:
    scored = {"kind": REGRESSION}
    assert labels_of(tmp_path, [0.5, 4.25], **scored) == ([0.5, 4.25], ())
    assert labels_of(tmp_path, [0, 5], **scored) == ([0.0, 5.0], ())
    with pytest.raises(UserError, match="does not hold numbers"):
        labels_of(tmp_path, ["high", "low"], **scored)
    with pytest.raises(UserError, match="labels of split 'test' are hidden"):
        labels_of(tmp_path, [-1.0, -1.0], **scored)


def test_words_name_the_labels_of_the_whole_split_whatever_the_limit(tmp_path: Path) -> None:
    words = ["positive"] * 4 + ["negative"] * 4
    write_split(tmp_path / "mine", "test", {"sentence": ["a"] * 8, "label": words})
    read = load_split(task(), data=tmp_path, limit=1)
    assert (read.labels.tolist(), read.label_names) == ([1], ("negative", "positive"))


def test_labels_that_differ_in_punctuation_only(tmp_path: Path) -> None:
    names = ["C", "C++", "c#"]
    assert labels_of(tmp_path, ["C++", "c#", "C"], labels=names) == ([1, 2, 0], tuple(names))
    with pytest.raises(UserError, match=r"label 'c' of row 0 is none of the task's: C, C\+\+, c#"):
        labels_of(tmp_path, ["c"], labels=names)


# --- images


def test_an_image_folder(tmp_path: Path) -> None:
    for number, label in enumerate(("cat", "t_train_railway", "dog")):  # a class whose name holds a split's
        for i in range(2):
            path = tmp_path / "mine" / "test" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(number * 2 + i))
    read = load_split(task(kind=IMAGE, text=(), classes=["dog", "cat", "t_train_railway"]), data=tmp_path)
    assert sorted(read.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    place = read.rows[0]["image"]["path"]
    assert read.label_names[read.labels[0]] == Path(place).parent.name
    assert read.image(0).tobytes() == read.image(0).copy().tobytes()
    assert (read.image(0).mode, read.image(0).size) == ("RGB", (18, 20))
    assert "and an image folder train/" in problem(task(kind=IMAGE, text=()), "train", data=tmp_path)


def test_images_in_parquet_stay_encoded_until_asked_for(tmp_path: Path) -> None:
    stored = images(3, 1, broken=[1])
    for features in ({"image": datasets.Image()}, {}):
        write_split(tmp_path / "mine", "test", {"image": stored, "label": [0, 1, 0]}, **features)
        read = load_split(task(kind=IMAGE, text=()), data=tmp_path)
        assert read.image(2).size == (18, 20)
        with pytest.raises(OSError, match=r"\w"):
            read.image(1)


def test_a_column_that_holds_no_images(tmp_path: Path) -> None:
    write_split(tmp_path / "mine", "test", {"image": ["a.png"], "label": [0]})
    assert problem(task(kind=IMAGE, text=()), data=tmp_path) == "task 'mine': column 'image' does not hold images"
    write_split(tmp_path / "mine", "test", {"image": [None], "label": [0]}, image=datasets.Image())
    with pytest.raises(OSError, match="no image"):
        load_split(task(kind=IMAGE, text=()), data=tmp_path).image(0)


# --- what exactly was read


def test_a_fingerprint_names_the_examples(tmp_path: Path) -> None:
    write_split(tmp_path / "mine", "test", COLUMNS)
    first = load_split(task(), data=tmp_path).fingerprint
    assert load_split(task(), data=tmp_path).fingerprint == first
    assert load_split(task(), data=tmp_path, limit=3).fingerprint != first
    assert load_split(task(labels=["a", "b"]), data=tmp_path).fingerprint != first
    write_split(tmp_path / "mine", "test", COLUMNS | {"sentence": ["so so", "good", "bad", "fine!"]})
    assert load_split(task(), data=tmp_path).fingerprint != first


def test_a_declaration_survives_yaml() -> None:
    for declared in tasks().values():
        dumped = yaml.safe_load(yaml.safe_dump(declared.model_dump(mode="json", exclude_unset=True)))
        assert Task.model_validate(dumped) == declared
