"""Having every model read examples of its own task, once for all merges of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cart_hf import __version__
from cart_hf.cache import cache_folder
from cart_hf.calibration.grams import gram_matrices
from cart_hf.calibration.information import fisher_information
from cart_hf.calibration.kept import FORMAT, Kept, keep
from cart_hf.calibration.reading import tasks_of_models
from cart_hf.calibration.statistics import Statistics
from cart_hf.errors import UserError
from cart_hf.evaluation.run import reader
from cart_hf.parallel import Progress
from cart_hf.plan import Plan
from cart_hf.processes import Processes
from cart_hf.recipe import Evaluation
from cart_hf.recipe.calibration import Calibration, check_examples
from cart_hf.tasks import TaskData
from cart_hf.tasks.catalogue import evaluation_of


def calibrate(plan: Plan, processes: Processes, progress: Progress | None = None) -> Statistics:
    """Return the statistics that the plan's method needs, from our cache or else computed and kept there.

    Each model reads examples of its own task; one is loaded at a time. Under a launcher every process calls it; they
    share the models.

    :param progress: called with the examples as they are read; not at all where all is known.
    :raises UserError: when the recipe names no examples, a task has no model or a model no task, data or a model
        cannot be read, or the cache cannot be written.
    """
    check_examples(plan.recipe)
    wanted = plan.recipe.calibration or Calibration()
    evaluation = evaluation_of(plan.recipe).model_copy(
        update={"split": wanted.split, "limit": wanted.limit, "unseen_by": None}
    )
    read, tasks = reader(evaluation, labelled=False), tasks_of_models(plan, evaluation)
    data = processes.everywhere(lambda: [read(task) for task in tasks], in_turns=True)
    work = _Work(plan, wanted, evaluation, data, processes.device)
    keys = processes.by_main(lambda: [work.key(place) for place in range(len(tasks))])
    paths = [cache_folder("calibration") / f"{key}.safetensors" for key in keys]

    def share(first: int, step: int) -> None:
        missing = [place for place in range(first, len(paths), step) if Kept.find(paths[place]) is None]
        total = sum(len(data[place]) for place in missing)
        for place in missing:
            work.compute(place, paths[place], lambda done: progress and progress("calibrating", done, total))

    processes.together(lambda: share(processes.rank, processes.count))
    # on a machine with a cache of its own: what the others have made
    processes.together(lambda: share(processes.local_rank, processes.local_count))
    return Statistics(plan, tuple(_found(path) for path in paths), _digest(keys))


@dataclass(frozen=True)
class _Work:
    """What the statistics are made from."""

    plan: Plan
    wanted: Calibration
    evaluation: Evaluation
    data: Sequence[TaskData]
    device: torch.device

    def key(self, place: int) -> str:
        """Return a name for the statistics of a model: for all that decides them."""
        statistic, model, data = self.plan.method.calibration, self.plan.models[place], self.data[place]
        name = re.sub(r"[^A-Za-z0-9.]+", "_", model.name)[-60:]
        return f"{statistic}-{name}-{_digest([self._about(place), data.task.digest, data.fingerprint])}"

    def _about(self, place: int) -> Mapping[str, Any]:
        base, recipe = self.plan.base, self.plan.recipe
        about = {
            "format": FORMAT,
            "versions": [__version__, torch.__version__, version("transformers")],
            "device": self.device.type,
            "statistic": self.plan.method.calibration,
            "model": self.plan.models[place].fingerprint(),
            "base": base and str(base.pinned),  # lends its tokenizer
        }
        if self.plan.method.calibration == "gram":
            return about
        drawn = {"labels": self.wanted.labels, "seed": recipe.seed}
        return about | drawn | ({"text": base.fingerprint()} if base is not None and _is_clip(base.config) else {})

    def compute(self, place: int, path: Path, advance: Any) -> None:
        """Compute the statistics of a model and keep them."""
        model, data, base = self.plan.models[place], self.data[place], self.plan.base
        if self.plan.method.calibration == "gram":
            lender = None if base is None else str(base.reference)
            size = self.evaluation.batch_size
            found = gram_matrices(model, data, base=lender, device=self.device, batch_size=size, advance=advance)
        else:
            labels, seed = self.wanted.labels, self.plan.recipe.seed
            found = fisher_information(
                model, data, base=base, device=self.device, labels=labels, seed=seed, advance=advance
            )
        keep(path, found, model.name)


def _is_clip(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type")) == "clip"


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _found(path: Path) -> Kept:
    kept = Kept.find(path)
    if kept is None:
        raise UserError(f"calibration: {path} has gone from the cache: run it again, and do not empty it meanwhile")
    return kept
