"""The tasks and suites there are: the built-in ones, and a user's tasks file read in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cart_hf.errors import UserError, did_you_mean
from cart_hf.recipe import Evaluation, Recipe
from cart_hf.recipe.reading import read_mapping
from cart_hf.tasks.task import DatasetSource, Submission, Task

_EXPECTED = "a tasks file is a mapping `tasks:` of a task's name to its declaration"
_BUILTIN = Path(__file__).with_name("builtin")
_KEYS: dict[tuple[str, ...], list[str]] = {
    (): [name for name in Task.model_fields if name != "name"],
    ("dataset",): list(DatasetSource.model_fields),
    ("submission",): list(Submission.model_fields),
}


@cache
def _declared() -> dict[str, Path]:
    """Return the file of every built-in task: its stem is the task's name."""
    return {path.stem: path for path in sorted(_BUILTIN.glob("*/*.yaml"))}


@cache
def _builtin(name: str) -> Task:
    return Task.model_validate({"name": name, **_read(_declared()[name])})


@cache
def suites() -> dict[str, tuple[str, ...]]:
    """Return the names of each suite's tasks."""
    return {name: tuple(members) for name, members in _read(_BUILTIN / "suites.yaml").items()}


def tasks() -> dict[str, Task]:
    """Return every built-in task by name."""
    return {name: _builtin(name) for name in _declared()}


def find_tasks(
    names: Sequence[str] | None = None, *, suite: str | None = None, tasks_file: str | Path | None = None
) -> list[Task]:
    """Return the tasks of a suite, or those named, or all of a tasks file; a tasks file's go before built-in ones.

    :raises UserError: for an unknown suite or task, or a tasks file that is wrong, with every problem found.
    """
    own = _tasks_of(Path(tasks_file)) if tasks_file is not None else {}
    if suite is not None:
        if suite not in suites():
            raise UserError(f"no suite '{suite}'{did_you_mean(suite, suites())}")
        if names:
            raise UserError("give --suite or --tasks, not both")
        names = suites()[suite]
    elif not names:
        names = list(own)
    problems = []
    found = []
    for name in dict.fromkeys(names):
        if name in own:
            found.append(own[name])
        elif name in _declared():
            found.append(_builtin(name))
        else:
            problems.append(_unknown(name, own))
    if problems:
        raise UserError(problems)
    return found


def known_among(names: Iterable[str], tasks_file: str | Path | None = None) -> list[str]:
    """Return those of ``names`` that are tasks."""
    own = _tasks_of(Path(tasks_file)) if tasks_file is not None else {}
    return [name for name in names if name in own or name in _declared()]


def evaluation_of(recipe: Recipe) -> Evaluation:
    """Return what a recipe is measured on; where it names no tasks, on those that its models are called after.

    :raises UserError: when no model is called like a task.
    """
    declared = recipe.evaluation or Evaluation()
    if declared.suite or declared.tasks:
        return declared
    names = known_among([entry.name for entry in recipe.models], declared.tasks_file)
    if not names:
        raise UserError("evaluation: name a suite or tasks (none of the models is called like a task)")
    return declared.model_copy(update={"tasks": tuple(names)})


def _unknown(name: str, own: Mapping[str, Task]) -> str:
    if name in suites():
        return f"'{name}' is a suite: give it as --suite {name}"
    suggestion = did_you_mean(name, [*own, *_declared()])
    if suggestion.startswith(" (known"):  # the whole list of built-in tasks is too long for a message
        suggestion = "; `cart-hf tasks` lists the built-in ones, --tasks-file adds your own"
    return f"no task '{name}'{suggestion}"


def _tasks_of(path: Path) -> dict[str, Task]:
    data = _read(path)
    declared = data.get("tasks")
    if set(data) != {"tasks"} or not isinstance(declared, dict) or not declared:
        raise UserError(f"{path}: {_EXPECTED}")
    problems: list[str] = []
    found = {}
    for name, body in declared.items():
        try:
            if not isinstance(body, dict):
                raise UserError("is not a mapping of a task's keys")
            found[str(name)] = Task.model_validate({"name": str(name), **_from_file(body, path.parent)})
        except ValidationError as failure:
            problems.extend(f"{path}: tasks.{name}.{_explain(error)}" for error in failure.errors())  # type: ignore[arg-type]
        except UserError as failure:
            problems.extend(f"{path}: tasks.{name} {problem}" for problem in failure.problems)
    if problems:
        raise UserError(problems)
    return found


def _from_file(body: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a declaration whose dataset path, where it is a local one, starts from the tasks file's folder."""
    dataset = body.get("dataset")
    if isinstance(dataset, str):
        dataset = {"path": dataset}
    if isinstance(dataset, dict) and isinstance(dataset.get("path"), str):
        local = folder / Path(dataset["path"]).expanduser()
        if local.exists():
            dataset = {**dataset, "path": str(local.resolve())}
    return {**body, "dataset": dataset}


def _explain(error: Mapping[str, Any]) -> str:
    """Return one validation error as ``key: what is wrong``, with a suggestion for a mistyped key."""
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key{did_you_mean(str(error['loc'][-1]), _KEYS[error['loc'][:-1]])}"
    return f"{place}: {error['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def _read(path: Path) -> dict[str, Any]:
    return read_mapping(path, "tasks file", _EXPECTED)
