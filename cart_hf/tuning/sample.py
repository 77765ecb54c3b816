"""What models are compared on: tasks with the examples of one split, read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cart_hf.errors import UserError
from cart_hf.evaluation.model import locate
from cart_hf.evaluation.results import Results, TaskResult
from cart_hf.evaluation.run import Outcome, Reader, Report, reader, run_tasks
from cart_hf.output.record import versions
from cart_hf.parallel import Progress
from cart_hf.processes import Processes
from cart_hf.recipe import Evaluation, Selection
from cart_hf.tasks import Task, TaskData, find_tasks


@dataclass(frozen=True)
class Sample:
    """The examples of every task in one split.

    :param tasks: what is measured.
    :param evaluation: on which split, and how.
    :param read: returns a task's examples, the same object every time.
    """

    tasks: Sequence[Task]
    evaluation: Evaluation
    read: Reader

    def problems(self) -> list[str]:
        """Read everything, and return what is wrong with it."""
        found: list[str] = []
        for task in self.tasks:
            try:
                self.read(task)
            except UserError as failure:
                found += failure.problems
        return found

    def fingerprints(self) -> list[list[str]]:
        """Return what tells the examples from others."""
        return [[task.name, self.read(task).fingerprint] for task in self.tasks]

    def measure(
        self, name: str, folder: Path, *, base: str | None, processes: Processes, progress: Progress | None
    ) -> Results:
        """Measure the merged or compressed model in a folder.

        :param name: what the results call it.
        :param base: lends a CLIP vision tower its text tower.
        """
        collected = Collected(self, processes)
        run_tasks(
            locate(folder),
            self.tasks,
            self.evaluation,
            base=base,
            processes=processes,
            report=collected.report,
            read=self.read,
            progress=progress,
        )
        return collected.results(name)


class Collected:
    """What a run over the tasks reports, until it is results.

    :param sample: what is being measured.
    """

    def __init__(self, sample: Sample, processes: Processes) -> None:
        self._sample, self._processes = sample, processes
        self._done: dict[str, TaskResult] = {}
        self._errors: dict[str, str] = {}

    @property
    def report(self) -> Report:
        """What takes the outcome of a task."""

        def report(name: str, outcome: Outcome) -> None:
            if outcome.result is not None:
                self._done[name] = outcome.result
            else:
                self._errors[name] = str(outcome.error)

        return report

    def results(self, name: str) -> Results:
        """Return what was reported, in the order of the tasks.

        :param name: what the results call the model.
        """
        evaluation = self._sample.evaluation
        environment: dict[str, Any] = {
            "device": str(self._processes.device),
            "dtype": evaluation.dtype,
            "limit": evaluation.limit,
            "versions": versions(),
        }
        in_order = {task.name: self._done[task.name] for task in self._sample.tasks if task.name in self._done}
        return Results(
            name, None, evaluation.suite, evaluation.split, in_order, dict(self._errors), environment=environment
        )


def sample_of(evaluation: Evaluation) -> Sample:
    """Return the sample that an evaluation names; nothing is read yet.

    :raises UserError: when there is no such task.
    """
    tasks = find_tasks(evaluation.tasks, suite=evaluation.suite, tasks_file=evaluation.tasks_file)
    return Sample(tasks, evaluation, _remembering(reader(evaluation)))


def selected(evaluation: Evaluation, selection: Selection) -> Evaluation:
    """Return an evaluation of the examples that settings are chosen on."""
    limit = selection.limit or evaluation.limit
    return evaluation.model_copy(update={"split": selection.split, "limit": limit})


def _remembering(read: Reader) -> Reader:
    found: dict[str, TaskData] = {}

    def remembered(task: Task) -> TaskData:
        if task.name not in found:
            found[task.name] = read(task)
        return found[task.name]

    return remembered
