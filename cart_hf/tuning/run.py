"""`cart_hf.tune`: the settings of a method that score best on a validation split, or by a rule without any data."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from cart_hf import __version__
from cart_hf.api import plan_merge, resolved_target
from cart_hf.errors import UserError, telling
from cart_hf.evaluation.results import Results
from cart_hf.methods import get_method
from cart_hf.output import check_replaceable
from cart_hf.parallel import Progress
from cart_hf.processes import Processes, join
from cart_hf.recipe import Recipe, Selection, Trial, Tuning, with_examples
from cart_hf.recipe.wrapping import as_point
from cart_hf.sources import fetch_weights
from cart_hf.tasks import evaluation_of, known_among
from cart_hf.tuning.data_free import settings_without_data
from cart_hf.tuning.ledger import LEDGER_FILE, Ledger, Measured, point_of
from cart_hf.tuning.merges import Merges, kept_factors
from cart_hf.tuning.sample import Sample, sample_of, selected
from cart_hf.tuning.search import Point, search_coordinates, search_grid

T = TypeVar("T")
FACTORS_FOLDER, WORK_FOLDER = "factors", "work"


@dataclass(frozen=True)
class Tried:
    """A point that was measured.

    :param parameters: the method's settings.
    :param results: every task's result on the selection split.
    """

    parameters: Mapping[str, Any]
    results: Results


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    :param output: its folder.
    :param recipe: the recipe with the best settings.
    :param trial: what was searched; None when the settings were chosen without data.
    :param best: the best settings.
    :param points: what was measured, in the order of the grid.
    :param on_edge: the parameters whose best value is the least or the largest that was tried.
    :param selection: the examples that the points were compared on; None without data.
    :param scored_split: the split that the recipe is evaluated on; None without data.
    :param seconds: wall time of ``merging`` (the decomposition included) and of ``measuring``.
    """

    output: Path
    recipe: Recipe
    trial: Trial | None
    best: Mapping[str, Any]
    points: Sequence[Tried]
    on_edge: Sequence[str]
    selection: Selection | None
    scored_split: str | None
    seconds: Mapping[str, float]


def tune(
    recipe: Recipe,
    *,
    output: str | Path,
    tuning: Mapping[str, Any] | None = None,
    examples: Mapping[str, Any] | None = None,
    data_free: bool | None = None,
    device: str = "auto",
    workers: int | None = None,
    factors: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Tuned:
    """Search the settings of a recipe's method: those with the best average score on the selection split.

    The matrices are decomposed once for all points, and points that differ in their scale alone are mixed from two
    merges. Every point that was measured is kept in ``output``: a search that is killed or widened goes on from there.

    :param recipe: what to merge, with its ``tune`` key for the grid and ``evaluation`` for the tasks and their data.
    :param output: folder for the best recipe and all points.
    :param tuning: fields of :class:`cart_hf.recipe.Tuning`, such as ``{"search": "coordinate"}``; before the recipe's.
    :param examples: fields of :class:`cart_hf.recipe.Evaluation` that say which tasks on which data; before the
        recipe's.
    :param data_free: choose by the rule of :mod:`cart_hf.tuning.data_free`, and measure nothing; default: only where
        the recipe has no ``evaluation`` and none of its models is called like a task.
    :param device, workers: as for :func:`cart_hf.merge`.
    :param factors: folder where the singular factors are found, and stay; default: they go when the search ends.
    :param resume: go on with an earlier search in ``output``, with the same grid or another.
    :param overwrite: replace an earlier search.
    :param progress: called with (step, advance, total) as the work goes on.
    :raises UserError: when the recipe, a model or the data is wrong, before any work; and when a point has no score.
    """
    wanted = _wanted(recipe, tuning or {}, examples or {})
    target = resolved_target(output)
    if not resume:
        check_replaceable(target, overwrite=overwrite, what="a search of cart-hf", marker=LEDGER_FILE)
    processes = join(device)
    if processes.count > 1:
        raise UserError("a search runs as one process (its merges use every core): start it without a launcher")
    search = _Search(wanted, target, processes, device, workers, factors, progress)
    if data_free is None:
        data_free = wanted.evaluation is None and not known_among([entry.name for entry in wanted.models])
    if data_free:
        found = search.without_data()
        _make_room(target, resume=resume)
        return found
    search.check()
    _make_room(target, resume=resume)
    found = search.run()
    for name in (FACTORS_FOLDER, WORK_FOLDER):
        shutil.rmtree(target / name, ignore_errors=True)
    return found


def _make_room(target: Path, *, resume: bool) -> None:
    """Make the folder, with the file by which an interrupted search is known."""
    with telling(f"cannot write {target}"):
        if target.exists() and not resume:
            shutil.rmtree(target)
        target.mkdir(parents=True, exist_ok=True)
        Ledger(target, {}).save()


def _wanted(recipe: Recipe, tuning: Mapping[str, Any], examples: Mapping[str, Any]) -> Recipe:
    """Return the recipe with what flags say of the search and its examples, checked again."""
    if recipe.coefficients is not None:
        raise UserError("coefficients: they take the place of the settings that tune would search; leave them out")
    fields = {name: getattr(recipe, name) for name in Recipe.model_fields}
    if tuning:
        own = recipe.tune.model_dump(exclude_defaults=True) if recipe.tune is not None else {}
        fields["tune"] = {**own, **tuning}
    if examples:
        fields["evaluation"] = with_examples(recipe.evaluation, examples)
    return Recipe.from_mapping(fields)


@dataclass(frozen=True)
class _Search:
    """A search under way: what all its steps need."""

    recipe: Recipe
    target: Path
    processes: Processes
    device: str
    workers: int | None
    factors: str | Path | None
    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=lambda: {"merging": 0.0, "measuring": 0.0})

    @cached_property
    def tuning(self) -> Tuning:
        return self.recipe.tune or Tuning()

    @cached_property
    def trial(self) -> Trial:
        return self.recipe.tuned()

    @cached_property
    def sample(self) -> Sample:
        return sample_of(selected(evaluation_of(self.recipe), self.tuning.selection))

    @cached_property
    def merges(self) -> Merges:
        decomposes = get_method(self.trial.method).of_factors is not None
        kept = kept_factors([self.trial], self.factors or self.target / FACTORS_FOLDER) if decomposes else {}
        return Merges(self.target / WORK_FOLDER, kept, self.device, self.workers)

    def check(self) -> None:
        """Look at everything that can be wrong before the first merge."""
        problems = self.sample.problems()
        try:
            plan_merge(self._variant(self.trial.points[0]))
        except UserError as failure:
            problems += failure.problems
        if problems:
            raise UserError(list(dict.fromkeys(problems)))

    def run(self) -> Tuned:
        """Search, and return the best."""
        trial = self.trial
        plan = plan_merge(self.recipe)
        fetch_weights(plan.checkpoints, self.progress)
        weights = {c.name: c.fingerprint() for c in plan.checkpoints}
        declared = [task.model_dump(mode="json") for task in self.sample.tasks]
        about = {"weights": weights, "data": self.sample.fingerprints(), "tasks": declared}
        ledger = Ledger(self.target, {"cart_hf": __version__, **about})
        tried: dict[str, Tried] = {}

        def score(point: Point) -> float:
            key = str(point)
            if key not in tried:
                tried[key] = Tried(point, self._measured(point, ledger))
            return tried[key].results.average or 0.0

        if self.tuning.search == "coordinate":
            start = {**self.recipe.parameters, **as_point(self.recipe.wrap)}
            best = search_coordinates(trial, start, score)
        else:
            best = search_grid(trial, score)
        points = [tried[str(point)] for point in trial.points if str(point) in tried]
        selection, scored = self.tuning.selection, evaluation_of(self.recipe).split
        return Tuned(
            self.target, self._best(best), trial, best, points, trial.on_edge(best), selection, scored, self.seconds
        )

    def without_data(self) -> Tuned:
        """Choose by the rule."""
        kept = {"factors": self.factors} if self.factors is not None else {}
        best = self._timed(
            "merging",
            lambda: settings_without_data(
                self.recipe, kept, processes=self.processes, workers=self.workers, progress=self.progress
            ),
        )
        return Tuned(self.target, self._best(best), None, best, (), (), None, None, self.seconds)

    def _best(self, point: Point) -> Recipe:
        """Return the recipe with the best settings, all its other keys as they are."""
        chosen = self._variant(point)
        return self.recipe.model_copy(update={"parameters": chosen.parameters, "wrap": chosen.wrap})

    def _variant(self, point: Point) -> Recipe:
        return self.recipe.of_trial(self.trial, point)

    def _measured(self, point: Point, ledger: Ledger) -> Results:
        """Merge and measure a point, unless it has been done.

        :raises UserError: when a task has no score: points could not be compared.
        """
        variant = self._variant(point)
        key = point_of(variant, self.sample.evaluation)
        known = ledger.get(**key)
        if known is None:
            first = self.progress if self.seconds["merging"] == 0 else None  # the decomposition, which takes longest
            folder = self._timed("merging", lambda: self.merges.make(variant, first))
            base = str(self.recipe.base_model) if self.recipe.base_model is not None else None
            found = self._timed(
                "measuring",
                lambda: self.sample.measure(str(point), folder, base=base, processes=self.processes, progress=None),
            )
            if found.errors:
                raise UserError([f"task '{task}': {why}" for task, why in found.errors.items()])
            known = Measured(found)
            ledger.put(known, **key)
        if self.progress is not None:
            self.progress("points", 1, len(self.trial.points))
        return known.results

    def _timed(self, what: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        self.seconds[what] += time.perf_counter() - started
        return result
