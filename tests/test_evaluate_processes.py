"""Two processes find what one finds: no example lost, none read twice, and no waiting for one that failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from checkpoints import make_clip, make_family
from commands import call, succeed
from merge_children import command, fork_launched, start_slurm_step
from shared_work import fail_crash_and_work, squares
from small_tasks import images, numbers, save_processor, save_tokenizer, texts, write_split, write_tasks

from cart_hf.errors import UserError
from cart_hf.evaluation.results import Results
from cart_hf.processes import join, launch
from cart_hf.tasks import IMAGE, TEXT

pytestmark = pytest.mark.usefixtures("own_caches")

COUNT = 13  # odd: the shares differ in size


def without_time(results: Results | dict[str, Any]) -> dict[str, Any]:
    """Return the tasks' results without what may differ."""
    tasks = (results.to_dict() if isinstance(results, Results) else results)["tasks"]
    return {name: {key: value for key, value in task.items() if key != "seconds"} for name, task in tasks.items()}


def test_two_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that fails beside two that do not, one of them with fewer batches than processes."""
    fork_launched(monkeypatch)
    _, (model,) = make_family(tmp_path, "roberta", tasks=1)
    save_tokenizer("roberta", model)
    labels = ["roberta0-1", "roberta0-0"]
    for name, count in (("many", COUNT), ("one", 1), ("bad", 5)):
        column = "sentense" if name == "bad" else "sentence"
        rows = {column: texts(count, seed=count), "label": numbers(count, 2, seed=3)[:count]}
        write_split(tmp_path / "data" / name, "test", rows, label=labels)
    task = {"kind": TEXT, "text": "sentence", "metrics": ["accuracy", "f1_macro", "matthews"]}
    tasks_file = write_tasks(tmp_path / "mine.yaml", many=task, bad=task, one=task)
    arguments = ["evaluate", model, "--tasks-file", tasks_file, "--data", tmp_path / "data", "--batch-size", 2]
    answers = {
        count: call(*arguments, "--device", "cpu", "--num-processes", count, "--output", tmp_path / f"{count}.json")
        for count in (1, 2)
    }
    message = f"task 'bad': {tmp_path / 'data' / 'bad'} has no column 'sentence' - did you mean 'sentense'?"
    for answer in answers.values():
        assert (answer.code, answer.errors) == (2, [message])
    alone, shared = (Results.load(tmp_path / f"{count}.json") for count in (1, 2))
    assert list(shared.tasks) == ["many", "one"]
    assert without_time(shared) == without_time(alone)
    assert shared.errors == alone.errors
    assert shared.environment["processes"] == 2
    # what two processes finished, one takes over
    again = call(*arguments, "--device", "cpu", "--output", tmp_path / "2.json", "--resume")
    assert again.code == 2
    assert Results.load(tmp_path / "2.json").tasks == shared.tasks


def test_a_step_of_slurm(tmp_path: Path) -> None:
    """``srun -n 2``: what a launcher starts measures together, and one process tells."""
    base, (tower,) = make_clip(tmp_path, tasks=1)
    save_tokenizer("clip", base)
    save_processor("clip", base)
    rows = {"image": images(COUNT, 1, broken=[3, 10]), "label": numbers(COUNT, 3, seed=2)}
    write_split(tmp_path / "data" / "task0", "test", rows, image=datasets.Image())
    tasks_file = write_tasks(
        tmp_path / "mine.yaml", task0={"kind": IMAGE, "classes": ["cat", "dog", "newt"], "templates": ["a {}"]}
    )
    options = ["--base", base, "--tasks-file", tasks_file, "--data", tmp_path / "data", "--batch-size", 2]
    arguments = ["evaluate", tower, *options, "--device", "cpu", "--format", "json"]
    alone = succeed(*arguments)
    (tmp_path / "answers").mkdir()
    children = start_slurm_step(tmp_path / "answers", command, *arguments)
    first, second = (child.answer() for child in children)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert second.out == ""
    results = json.loads(first.out)
    assert without_time(results) == without_time(json.loads(alone.out))
    assert set(results["tasks"]["task0"]["broken_images"]) == {"3", "10"}
    assert results["environment"]["processes"] == 2
    assert (first.err + second.err).count("2 of 13 images cannot be decoded") == 1


def test_an_error_in_one_process_reaches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a mistake nor a bug in one of them leaves the other waiting; both go on, and the launcher tells."""
    fork_launched(monkeypatch)
    with pytest.raises(UserError) as failure:
        launch(fail_crash_and_work, 2, upto=5)
    assert failure.value.problems == [
        "UserError: process 1 found a mistake",
        "RuntimeError: process 1: ZeroDivisionError: oops",
        "[[0, 4, 16], [1, 9]]",
    ]


def test_alone() -> None:
    assert squares(4) == [[0, 1, 4, 9]]
    with pytest.raises(UserError, match="process 0 found a mistake"):
        squares(4, fails=0)
    with pytest.raises(ZeroDivisionError):
        squares(4, crashes=0)


def test_processes_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a launcher has started several processes already"):
        launch(squares, 2, upto=5)
    with pytest.raises(UserError, match="--device cuda:0: 2 processes each take a device of their own"):
        join("cuda:0")
