"""`cart_hf.benchmark`: the paper's table on your models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from cart_hf import __version__
from cart_hf.adaptation import adapt
from cart_hf.api import merge, plan_merge, resolved_target
from cart_hf.benchmarking.ledger import LEDGER_FILE, Ledger, Measured
from cart_hf.benchmarking.rows import COMPRESS, INDIVIDUAL, PRETRAINED, Row, display_name, trials_of
from cart_hf.benchmarking.sizes import individual_bytes, merged_bytes, size_of
from cart_hf.compression import compress, plan_compression
from cart_hf.compression.preview import estimates
from cart_hf.errors import UserError
from cart_hf.evaluation.individual import score_individuals
from cart_hf.evaluation.model import locate
from cart_hf.evaluation.results import Results, TaskResult
from cart_hf.evaluation.run import Outcome, Reader, reader, run_tasks
from cart_hf.methods import get_method
from cart_hf.output import check_replaceable
from cart_hf.output.record import versions
from cart_hf.parallel import Progress
from cart_hf.plan import Plan
from cart_hf.processes import Processes, join
from cart_hf.recipe import Compression, Evaluation, Recipe, Selection, Trial
from cart_hf.sources import fetch_weights
from cart_hf.tasks import Task, TaskData, evaluation_of, find_tasks

RECIPE_FILE = "recipe.yaml"
MODELS_FOLDER = "models"
FACTORS_FOLDER = "factors"


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark measured.

    :param output: its folder.
    :param rows: pretrained, individual, every method, and CART-Indexing at every size.
    :param evaluation: what the rows were scored on.
    :param selection: what their settings were chosen on; None when nothing was chosen.
    """

    output: Path
    rows: list[Row]
    evaluation: Evaluation
    selection: Selection | None


def benchmark(
    recipe: Recipe,
    *,
    output: str | Path,
    device: str = "auto",
    workers: int | None = None,
    keep_models: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Measure the pretrained model, the individual ones, and every method that the recipe lists, on every task.

    Where a method has a grid, its settings are chosen by the average score on the selection split, and scored on the
    evaluation's. Where the recipe compares sizes of CART-Indexing, every row has the bytes of its weights. Nothing but
    the numbers stays on disk, unless the models are kept.

    :param output: folder for the results; goes on with an earlier run's when ``resume``.
    :param device, workers: as for :func:`cart_hf.merge`.
    :param keep_models: keep each method's merged model in ``output/models``.
    :raises UserError: when the recipe, a model or the data is wrong; all of them are looked at before any merge.
    """
    target = resolved_target(output)
    if not resume:
        check_replaceable(target, overwrite=overwrite, what="a benchmark of cart-hf", marker=LEDGER_FILE)
    processes = join(device)
    if processes.count > 1:
        raise UserError("a benchmark runs as one process (its merges use every core): start it without a launcher")
    run = _Run(recipe, target, processes, device, workers, keep_models, progress)
    run.check()
    if target.exists() and not resume:
        shutil.rmtree(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    except OSError as failure:
        raise UserError(f"cannot write {target}: {failure.strerror or failure}") from failure
    return run.table()


@dataclass(frozen=True)
class _Sample:
    """The examples of every task in one split, read once for all the models."""

    evaluation: Evaluation
    read: Reader


@dataclass(frozen=True)
class _Run:
    """A benchmark under way: what all its steps need."""

    recipe: Recipe
    target: Path
    processes: Processes
    device: str
    workers: int | None
    keep_models: bool
    progress: Progress | None

    @cached_property
    def evaluation(self) -> Evaluation:
        return evaluation_of(self.recipe)

    @cached_property
    def selection(self) -> Selection | None:
        if all(len(trial.points) == 1 for trial in self.trials):
            return None
        return self.recipe.benchmark.selection if self.recipe.benchmark is not None else Selection()

    @cached_property
    def scored(self) -> _Sample:
        """What the rows are scored on."""
        return _Sample(self.evaluation, _remembering(reader(self.evaluation)))

    @cached_property
    def chosen(self) -> _Sample | None:
        """What settings are chosen on."""
        if self.selection is None:
            return None
        limit = self.selection.limit or self.evaluation.limit
        evaluation = self.evaluation.model_copy(update={"split": self.selection.split, "limit": limit})
        return _Sample(evaluation, _remembering(reader(evaluation)))

    @cached_property
    def trials(self) -> list[Trial]:
        return trials_of(self.recipe)

    @cached_property
    def compressions(self) -> list[tuple[str, Compression]]:
        """CART-Indexing's rows: each one's name, and how its adapters are made."""
        declared = self.recipe.benchmark.compress if self.recipe.benchmark is not None else None
        return declared.rows if declared is not None else []

    @cached_property
    def tasks(self) -> list[Task]:
        wanted = self.evaluation
        return find_tasks(wanted.tasks, suite=wanted.suite, tasks_file=wanted.tasks_file)

    @property
    def samples(self) -> list[_Sample]:
        return [sample for sample in (self.scored, self.chosen) if sample is not None]

    @property
    def base(self) -> str | None:
        return str(self.recipe.base_model) if self.recipe.base_model is not None else None

    @cached_property
    def plan(self) -> Plan:
        """Plan the recipe's own merge: the models, and what any merge of them holds."""
        return plan_merge(self.recipe)

    @cached_property
    def ledger(self) -> Ledger:
        fetch_weights(self.plan.checkpoints)
        weights = {c.name: c.fingerprint() for c in self.plan.checkpoints}
        data = [[task.name, sample.read(task).fingerprint] for sample in self.samples for task in self.tasks]
        declared = [task.model_dump(mode="json") for task in self.tasks]
        return Ledger(self.target, {"cart_hf": __version__, "weights": weights, "data": data, "tasks": declared})

    def check(self) -> None:
        """Look at everything that can be wrong before the first merge."""
        problems: list[str] = []
        for sample in self.samples:
            for task in self.tasks:
                problems.extend(_problems(partial(sample.read, task)))
        for trial in self.trials:
            problems.extend(_problems(partial(plan_merge, self._variant(trial, 0))))
        if self.compressions:
            problems.extend(_problems(self._check_compressions))
        if problems:
            raise UserError(list(dict.fromkeys(problems)))

    def _check_compressions(self) -> None:
        """Plan the smallest adapters that there are, and compare them with every budget."""
        smallest = self.compressions[0][1].changed({"rank": 1})
        _, outlines = plan_compression(self._compressed(smallest))
        least = max(estimate.nbytes or 0 for estimate in estimates(outlines, smallest))
        short = [c.budget for _, c in self.compressions if c.budget_bytes is not None and c.budget_bytes < least]
        if short:
            raise UserError(
                f"benchmark.compress.budget: {', '.join(map(str, short))} is too small: with one direction of each "
                f"layer an adapter takes {least / 1e6:.2f} MB"
            )

    def table(self) -> BenchmarkResult:
        """Fill the table, row by row."""
        alone = self._individual()
        rows = [Row(INDIVIDUAL, None, {}, (), alone)]
        if self.recipe.base_model is not None:
            # the base's backbone under each task's head: a task vector of length zero
            variant = self.recipe.variant("task_arithmetic", {"scale": 0.0})
            rows.insert(0, Row(PRETRAINED, None, {}, (), self._measured(PRETRAINED, variant, self.scored).results))
        compressed = self._compressed_rows()  # before the methods, which find its factors
        rows.extend(self._row(trial) for trial in self.trials)
        if compressed:
            rows = [replace(row, nbytes=self._nbytes(row)) for row in rows] + compressed
        shutil.rmtree(self.target / FACTORS_FOLDER, ignore_errors=True)
        scores = {name: result.score for name, result in alone.tasks.items()}
        rows = [replace(row, results=replace(row.results, individual=scores)) for row in rows]
        return BenchmarkResult(self.target, rows, self.evaluation, self.selection)

    def _nbytes(self, row: Row) -> int:
        alone = row.method is None and row.name == INDIVIDUAL
        return individual_bytes(self.plan) if alone else merged_bytes(self.plan)

    def _compressed_rows(self) -> list[Row]:
        """Measure CART-Indexing at every size, the largest first: its factors are the others' too."""
        found: dict[str, Row] = {}
        for name, compression in sorted(self.compressions, key=lambda row: size_of(row[1]), reverse=True):
            keep = self.target / MODELS_FOLDER / name if self.keep_models else None
            recipe, factors = self._compressed(compression), self._store(*self.trials)
            measured = self._measured(name, recipe, self.scored, keep, factors)
            settings = compression.model_dump(mode="json", exclude_defaults=True)
            nbytes = merged_bytes(self.plan) + measured.adapter_bytes
            found[name] = Row(name, COMPRESS, settings, (), measured.results, nbytes=nbytes)
            self._tell("compressing", len(self.compressions))
        return [found[name] for name, _ in self.compressions]

    def _compressed(self, compression: Compression) -> Recipe:
        """Return the recipe of a compression: with the recipe's own weights and solver, where it is one of CART."""
        own = self.recipe.parameters if self.recipe.merge_method == "cart" else {}
        return self.recipe.variant("cart", own).model_copy(update={"compress": compression})

    def _row(self, trial: Trial) -> Row:
        name, points = display_name(trial), trial.points
        best, tried = 0, self._tried(name, trial) if len(points) > 1 else []
        if tried:
            best = max(range(len(points)), key=lambda position: tried[position]["average"] or 0.0)
        keep = self.target / MODELS_FOLDER / trial.name if self.keep_models else None
        factors = {} if keep else self._factors(trial)  # a model that is kept is what `cart-hf merge` would write
        scored = self.recipe.variant(trial.method, points[best], trial.adapt)
        results = self._measured(name, scored, self.scored, keep, factors).results
        edges = trial.on_edge(points[best]) if tried else []
        return Row(name, trial.method, points[best], edges, results, tried)

    def _tried(self, name: str, trial: Trial) -> list[dict[str, Any]]:
        """Measure every point of a grid on the selection split."""
        assert self.chosen is not None
        tried = []
        for position, parameters in enumerate(trial.points):
            found = self._measured(name, self._variant(trial, position), self.chosen, None, self._factors(trial))
            tried.append({"parameters": parameters, "average": found.results.average})
            self._tell(f"choosing: {name}", len(trial.points))
        return tried

    def _factors(self, trial: Trial) -> dict[str, Any]:
        """Say where the points of a grid, and CART-Indexing, find one decomposition, as arguments of a merge."""
        alone = len(trial.points) == 1 and not self.compressions
        return {} if alone or get_method(trial.method).of_factors is None else self._store(trial)

    def _store(self, *trials: Trial) -> dict[str, Any]:
        """Say where factors are kept, up to the largest rank that any of the trials asks for."""
        ratios = [point.get("rank_ratio") for trial in trials for point in trial.points]
        largest = max((ratio for ratio in ratios if isinstance(ratio, float | int)), default=None)
        return {"factors": self.target / FACTORS_FOLDER, "factors_rank_ratio": largest}

    def _variant(self, trial: Trial, position: int) -> Recipe:
        return self.recipe.variant(trial.method, trial.points[position])

    def _measured(
        self,
        name: str,
        variant: Recipe,
        sample: _Sample,
        keep: Path | None = None,
        factors: Mapping[str, Any] | None = None,
    ) -> Measured:
        """Merge or compress, and measure, unless it has been done."""
        evaluation = sample.evaluation
        point = {"recipe": variant.to_yaml(), "split": evaluation.split, "limit": evaluation.limit}
        known = self.ledger.get(**point)
        if known is not None and (keep is None or keep.is_dir()):
            return known
        folder = keep or self.target / "attempt"
        options = {"device": self.device, "workers": self.workers, "overwrite": True, **(factors or {})}
        adapter_bytes = 0
        if variant.compress is not None:
            made = compress(variant, output=folder, **options)
            adapter_bytes = sum(adapter.nbytes for adapter in made.adapters.values())
        elif variant.adapt is not None:
            options.pop("factors_rank_ratio", None)
            adapt(variant, output=folder, progress=self.progress, **options)
        else:
            merge(variant, output=folder, **options)
        done: dict[str, TaskResult] = {}
        errors: dict[str, str] = {}
        run_tasks(
            locate(folder),
            self.tasks,
            evaluation,
            base=self.base,
            processes=self.processes,
            report=_into(done, errors),
            read=sample.read,
            progress=self.progress,
        )
        if keep is None:
            shutil.rmtree(folder)
        measured = Measured(self._results(name, evaluation, done, errors), adapter_bytes)
        if not errors:
            self.ledger.put(measured, **point)
        return measured

    def _individual(self) -> Results:
        done: dict[str, TaskResult] = {}
        errors: dict[str, str] = {}
        score_individuals(
            {entry.name: str(entry.model) for entry in self.recipe.models},
            self.tasks,
            self.evaluation,
            base=self.base,
            processes=self.processes,
            report=_into(done, errors),
            read=self.scored.read,
            progress=self.progress,
        )
        return self._results(INDIVIDUAL, self.evaluation, done, errors)

    def _results(
        self, name: str, evaluation: Evaluation, done: Mapping[str, TaskResult], errors: Mapping[str, str]
    ) -> Results:
        environment = {
            "device": str(self.processes.device),
            "dtype": evaluation.dtype,
            "limit": evaluation.limit,
            "versions": versions(),
        }
        in_order = {task.name: done[task.name] for task in self.tasks if task.name in done}
        return Results(name, None, evaluation.suite, evaluation.split, in_order, errors, environment=environment)

    def _tell(self, step: str, total: int) -> None:
        if self.progress is not None:
            self.progress(step, 1, total)


def _into(done: dict[str, TaskResult], errors: dict[str, str]) -> Any:
    def report(name: str, outcome: Outcome) -> None:
        if outcome.result is not None:
            done[name] = outcome.result
        else:
            errors[name] = str(outcome.error)

    return report


def _remembering(read: Reader) -> Reader:
    found: dict[str, TaskData] = {}

    def remembered(task: Task) -> TaskData:
        if task.name not in found:
            found[task.name] = read(task)
        return found[task.name]

    return remembered


def _problems(step: Callable[[], object]) -> list[str]:
    try:
        step()
    except UserError as failure:
        return failure.problems
    return []
