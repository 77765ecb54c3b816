"""The scores of the individual fine-tuned models, measured once: cached by their weights, task and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cart_hf.cache import cache_folder, write_through
from cart_hf.errors import UserError
from cart_hf.evaluation.model import locate
from cart_hf.evaluation.results import TaskResult
from cart_hf.evaluation.run import Outcome, Reader, Report, run_tasks
from cart_hf.parallel import Progress
from cart_hf.processes import Processes
from cart_hf.recipe import Evaluation
from cart_hf.tasks import Task


def score_individuals(
    models: Mapping[str, str],
    tasks: Sequence[Task],
    evaluation: Evaluation,
    *,
    base: str | None,
    processes: Processes,
    report: Report,
    read: Reader | None = None,
    progress: Progress | None = None,
) -> None:
    """Score each task with the model that was fine-tuned for it.

    :param models: references by name; a task's is the one called like its head.
    :param read: as for :func:`cart_hf.evaluation.run.run_tasks`.
    :param report: receives each task's outcome; a cached one has a result only.
    """

    def keep(name: str, outcome: Outcome) -> None:
        result = outcome.result
        if result is not None and processes.is_main and _cached(result.settings) is None:
            write_through(_place(result.settings), lambda place: place.write_text(json.dumps(asdict(result))))
        report(name, outcome)

    for task in tasks:
        reference = models.get(evaluation.heads.get(task.name, task.head))
        if reference is None:
            report(task.name, Outcome(error=f"task '{task.name}': no individual model is called like its head"))
            continue
        alone = evaluation.model_copy(update={"heads": {}})
        try:
            run_tasks(
                locate(reference, base=base),
                [task],
                alone,
                base=base,
                processes=processes,
                report=keep,
                known=lambda task, settings: _cached(settings),
                read=read,
                progress=progress,
            )
        except UserError as failure:  # this model is gone or broken; the others' scores are worth having
            report(task.name, Outcome(error="; ".join(failure.problems)))


def _cached(settings: Mapping[str, Any]) -> TaskResult | None:
    """Return a stored result; one that cannot be read is measured again."""
    try:
        return TaskResult(**json.loads(_place(settings).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _place(settings: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder("scores") / f"{key}.json"
