"""What an evaluation found, as `results.json` holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cart_hf.errors import UserError

_MAY_BE_EMPTY = ("broken_images", "settings", "adapted_on")


@dataclass(frozen=True)
class TaskResult:
    """One task's result.

    :param metrics: every metric, as fractions or correlations, not percent.
    :param score: the number that counts in the average.
    :param metric: what the score is: a metric, or a mean of metrics.
    :param examples: how many examples were scored.
    :param seconds: wall time, reading the data included.
    :param broken_images: rows whose image could not be decoded, with the reason; they count as wrong answers.
    :param settings: what a run must have in common with this one to take its result over.
    :param adapted_on: how many of the examples the model was adapted on, without their labels.
    """

    metrics: Mapping[str, float]
    score: float
    metric: str
    examples: int
    seconds: float
    broken_images: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapted_on: int = 0


@dataclass(frozen=True)
class Results:
    """A model's results.

    :param model: as the user named it.
    :param revision: its Hub commit.
    :param suite: the suite, or None for tasks named one by one.
    :param split: the split that was asked for, or None for each task's own.
    :param tasks: each task's result.
    :param errors: why a task has none.
    :param individual: the scores of the individual models, by task, when they are known.
    :param environment: versions, device and types.
    """

    model: str
    revision: str | None
    suite: str | None
    split: str | None
    tasks: Mapping[str, TaskResult]
    errors: Mapping[str, str] = field(default_factory=dict)
    individual: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def average(self) -> float | None:
        """Mean score over tasks."""
        scores = [result.score for result in self.tasks.values()]
        return sum(scores) / len(scores) if scores else None

    @property
    def normalized(self) -> float | None:
        """Mean over tasks of the score over the individual model's; None when one of those is not known (or zero)."""
        if not self.tasks or any(not self.individual.get(name) for name in self.tasks):
            return None
        return sum(result.score / self.individual[name] for name, result in self.tasks.items()) / len(self.tasks)

    @property
    def first_metric_average(self) -> float | None:
        """Mean over tasks of the first metric: accuracy for MRPC and QQP, where ``average`` takes the mean with F1."""
        firsts = [next(iter(result.metrics.values())) for result in self.tasks.values()]
        return sum(firsts) / len(firsts) if firsts else None

    def to_dict(self) -> dict[str, Any]:
        """Return what ``results.json`` holds."""
        return {
            "model": self.model,
            "revision": self.revision,
            "suite": self.suite,
            "split": self.split,
            "tasks": {name: _without_empty(asdict(result)) for name, result in self.tasks.items()},
            "average": self.average,
            "average_of_first_metrics": self.first_metric_average,
            "normalized": self.normalized,
            "individual": dict(self.individual),
            "errors": dict(self.errors),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Results:
        """Read what :meth:`to_dict` returned."""
        derived = ("average", "average_of_first_metrics", "normalized")
        kept = {key: value for key, value in data.items() if key not in derived}
        return cls(**{**kept, "tasks": {name: TaskResult(**result) for name, result in data["tasks"].items()}})

    def save(self, path: Path) -> None:
        """Write the file so that it is whole at any moment: a run that is killed leaves what was finished."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.partial")
            beside.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            beside.replace(path)
        except OSError as failure:
            raise UserError(f"cannot write {path}: {failure.strerror or failure}") from failure

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a results file.

        :raises UserError: when it is not one.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as failure:
            raise UserError(f"cannot read {path}: {failure.strerror}") from failure
        except (ValueError, KeyError, TypeError, AttributeError) as failure:
            raise UserError(f"{path} is not a results file of cart-hf") from failure


def _without_empty(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if value not in ({}, 0) or key not in _MAY_BE_EMPTY}
