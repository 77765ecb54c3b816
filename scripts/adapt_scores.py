"""What adaptation brings: static and adapted merges, scored on the inputs adapted on and on those held out.

    python scripts/adapt_scores.py rows.yaml OUTPUT

``rows.yaml`` has ``recipe:`` (a recipe's path, whose ``evaluation`` says which tasks on which data), ``adapt:`` (what
all rows have in common, ``held_out`` among it) and ``rows:``, each with a name, ``method``, ``parameters``, and what
else its ``adapt`` is told. Every row is merged as it is, and adapted; both are scored on the same inputs: *seen* are
those that were adapted on (a transductive result), *held out* as many others. The individual models are scored too.
What is in OUTPUT already is not made again. Writes ``scores.json`` and ``scores.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from merge_commands import machine

import cart_hf
from cart_hf.cli.console import progress_bars, quiet_libraries
from cart_hf.evaluation.adapted import inputs_of
from cart_hf.evaluation.individual import score_individuals
from cart_hf.evaluation.model import locate
from cart_hf.evaluation.run import Outcome, run_tasks
from cart_hf.processes import join
from cart_hf.recipe import Evaluation, Recipe
from cart_hf.tables import Table, markdown
from cart_hf.tasks import Task, TaskData, evaluation_of, find_tasks, load_split

SEEN, HELD_OUT = "seen", "held out"


def main() -> None:
    """Make what is missing, score it, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    asked = yaml.safe_load(arguments.rows.read_text(encoding="utf-8"))
    recipe = Recipe.load(asked["recipe"])
    arguments.output.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    found: dict[str, Any] = {"machine": machine(), "rows": {}}
    for row in asked["rows"]:
        found["rows"][row["name"]] = measured(recipe, asked["adapt"], row, arguments.output)
        whole = {"individual": individual(recipe, arguments.output)} | found
        (arguments.output / "scores.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        (arguments.output / "scores.md").write_text(page(whole), encoding="utf-8")
        print(page(whole), flush=True)


def measured(recipe: Recipe, common: dict[str, Any], row: dict[str, Any], output: Path) -> dict[str, Any]:
    """Merge, adapt and score one row."""
    learning = {**common, **row.get("adapt", {})}
    variant = recipe.variant(row["method"], row.get("parameters", {}))
    static, adapted = output / f"static-{row.get('static', row['name'])}", output / row["name"]
    if not static.exists():
        cart_hf.merge(variant, output=static)
    seconds = None
    if not adapted.exists():
        started = time.perf_counter()
        with progress_bars() as bars:
            cart_hf.adapt(variant, output=adapted, learning=learning, progress=bars)
        seconds = time.perf_counter() - started
        (adapted / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    record = json.loads((adapted / "merge.json").read_text(encoding="utf-8"))
    return {
        "settings": record["adaptation"],
        "seconds": json.loads((adapted / "seconds.json").read_text(encoding="utf-8")),
        "static": scores(static, recipe, adapted),
        "adapted": scores(adapted, recipe, adapted),
    }


def individual(recipe: Recipe, output: Path) -> dict[str, dict[str, float]]:
    """Score the fine-tuned models on the same inputs."""
    adapted = next(path.parent for path in sorted(output.glob("*/seconds.json")))
    models = {entry.name: str(entry.model) for entry in recipe.models}

    def score(subset: str) -> dict[str, float]:
        evaluation, tasks = examples(recipe)
        found: dict[str, float] = {}
        read = partial(rows_of, evaluation=evaluation, adapted=adapted, subset=subset)
        about = {"base": str(recipe.base_model), "processes": join(), "report": keeping(found), "read": read}
        score_individuals(models, tasks, evaluation, **about)
        return found

    return {subset: score(subset) for subset in (SEEN, HELD_OUT)}


def scores(model: Path, recipe: Recipe, adapted: Path) -> dict[str, dict[str, float]]:
    """Score a merged folder on what ``adapted`` has seen, and on as many others."""
    place = model / f"scores-{adapted.name}.json"
    if place.is_file():
        known: dict[str, dict[str, float]] = json.loads(place.read_text(encoding="utf-8"))
        return known

    def score(subset: str) -> dict[str, float]:
        evaluation, tasks = examples(recipe)
        found: dict[str, float] = {}
        read = partial(rows_of, evaluation=evaluation, adapted=adapted, subset=subset)
        about = {"base": str(recipe.base_model), "processes": join(), "report": keeping(found), "read": read}
        run_tasks(locate(model), tasks, evaluation, **about)
        return found

    found = {subset: score(subset) for subset in (SEEN, HELD_OUT)}
    place.write_text(json.dumps(found), encoding="utf-8")
    return found


def examples(recipe: Recipe) -> tuple[Evaluation, list[Task]]:
    """Return what a recipe is measured on."""
    evaluation = evaluation_of(recipe)
    return evaluation, find_tasks(evaluation.tasks, suite=evaluation.suite, tasks_file=evaluation.tasks_file)


def rows_of(task: Task, evaluation: Evaluation, adapted: Path, subset: str) -> TaskData:
    """Read the inputs that a model was adapted on, or as many that it was not."""
    told = json.loads((adapted / "merge.json").read_text(encoding="utf-8"))["adaptation"]["tasks"][task.name]
    known = inputs_of(str(adapted))

    def keep(hashes: np.ndarray) -> np.ndarray:
        return np.isin(hashes, known, invert=subset == HELD_OUT)

    limit = told["inputs"] if subset == HELD_OUT else None
    return load_split(task, told["split"], data=evaluation.data, limit=limit, keep=keep)


def keeping(found: dict[str, float]) -> Any:
    """Return what receives each task's outcome."""

    def report(name: str, outcome: Outcome) -> None:
        if outcome.result is None:
            raise RuntimeError(f"{name}: {outcome.error}")
        found[name] = outcome.result.score

    return report


def page(found: dict[str, Any]) -> str:
    """Return the tables, scores in percent."""
    parts = []
    for subset in (SEEN, HELD_OUT):
        alone = found["individual"][subset]
        header = ["", *alone, "average"]
        rows = [line("individual", alone)]
        for name, row in found["rows"].items():
            rows += [line(f"{name}, static", row["static"][subset]), line(f"{name}, adapted", row["adapted"][subset])]
        parts.append(f"## {subset}\n\n{markdown(Table(header, rows, words=1))}")
    return "\n".join(parts)


def line(name: str, scores: dict[str, float]) -> list[str]:
    """Return a row of a table."""
    values = list(scores.values())
    return [name, *(f"{100 * value:.1f}" for value in (*values, sum(values) / len(values)))]


if __name__ == "__main__":
    main()
