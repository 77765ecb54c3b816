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
from cart_hf.benchmarking.rows import COMPRESS, INDIVIDUAL, PRETRAINED, Row, display_name, trials_of
from cart_hf.benchmarking.sizes import compressed_bytes, individual_bytes, merged_bytes, size_of
from cart_hf.compression import compress, plan_compression, plan_masked, restore
from cart_hf.compression.preview import estimates
from cart_hf.errors import UserError
from cart_hf.evaluation.individual import score_individuals
from cart_hf.evaluation.model import locate
from cart_hf.evaluation.results import Results
from cart_hf.evaluation.run import Outcome, run_tasks
from cart_hf.methods import get_method
from cart_hf.output import check_replaceable
from cart_hf.parallel import Progress
from cart_hf.plan import Plan
from cart_hf.processes import Processes, join
from cart_hf.recipe import Compression, Evaluation, Recipe, Selection, Trial
from cart_hf.sources import fetch_weights
from cart_hf.tasks import evaluation_of
from cart_hf.tuning.ledger import LEDGER_FILE, Ledger, Measured, point_of
from cart_hf.tuning.merges import Merges, kept_factors
from cart_hf.tuning.sample import Collected, Sample, sample_of, selected
from cart_hf.tuning.search import Point, search_grid

RECIPE_FILE = "recipe.yaml"
MODELS_FOLDER = "models"
FACTORS_FOLDER = "factors"
ATTEMPTS_FOLDER = "attempts"


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
    def scored(self) -> Sample:
        """What the rows are scored on."""
        return sample_of(self.evaluation)

    @cached_property
    def chosen(self) -> Sample | None:
        """What settings are chosen on."""
        if self.selection is None:
            return None
        return sample_of(selected(self.evaluation, self.selection))

    @cached_property
    def trials(self) -> list[Trial]:
        return trials_of(self.recipe)

    @cached_property
    def compressions(self) -> list[tuple[str, Compression]]:
        """The rows of compressed models: each one's name, and how they are made."""
        declared = self.recipe.benchmark.compress if self.recipe.benchmark is not None else None
        return declared.rows if declared is not None else []

    @property
    def samples(self) -> list[Sample]:
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
        data = [fingerprint for sample in self.samples for fingerprint in sample.fingerprints()]
        declared = [task.model_dump(mode="json") for task in self.scored.tasks]
        return Ledger(self.target, {"cart_hf": __version__, "weights": weights, "data": data, "tasks": declared})

    def check(self) -> None:
        """Look at everything that can be wrong before the first merge."""
        problems: list[str] = []
        for sample in self.samples:
            problems.extend(sample.problems())
        for trial in self.trials:
            problems.extend(_problems(partial(plan_merge, self.recipe.of_trial(trial, trial.points[0]))))
        if self.compressions:
            problems.extend(_problems(self._check_compressions))
        if problems:
            raise UserError(list(dict.fromkeys(problems)))

    def _check_compressions(self) -> None:
        """Plan every form; of CART-Indexing the smallest adapters that there are, to compare them with every budget."""
        forms = {compression.form: compression for _, compression in self.compressions}
        for form, compression in forms.items():
            if form != "cart":
                (plan_masked if form == "emr" else plan_compression)(self._compressed(compression))
        if "cart" not in forms:
            return
        smallest = forms["cart"].changed({"rank": 1})
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
        for name in (FACTORS_FOLDER, ATTEMPTS_FOLDER):
            shutil.rmtree(self.target / name, ignore_errors=True)
        scores = {name: result.score for name, result in alone.tasks.items()}
        rows = [replace(row, results=replace(row.results, individual=scores)) for row in rows]
        return BenchmarkResult(self.target, rows, self.evaluation, self.selection)

    def _nbytes(self, row: Row) -> int:
        alone = row.method is None and row.name == INDIVIDUAL
        return individual_bytes(self.plan) if alone else merged_bytes(self.plan)

    def _compressed_rows(self) -> list[Row]:
        """Measure every form of compressed models; CART-Indexing's largest first: its factors are the others' too."""
        found: dict[str, Row] = {}
        for name, compression in sorted(self.compressions, key=lambda row: size_of(row[1]), reverse=True):
            keep = self.target / MODELS_FOLDER / name if self.keep_models else None
            recipe = self._compressed(compression)
            factors = self._store(*self.trials) if compression.form != "emr" else {}
            measured = self._measured(name, recipe, self.scored, keep, factors)
            settings = compression.model_dump(mode="json", exclude_defaults=True)
            nbytes = compressed_bytes(self.plan, compression, measured.adapter_bytes)
            found[name] = Row(name, COMPRESS, settings, (), measured.results, nbytes=nbytes)
            self._tell("compressing", len(self.compressions))
        return [found[name] for name, _ in self.compressions]

    def _compressed(self, compression: Compression) -> Recipe:
        """Return the recipe of a compression: with the recipe's own weights and solver, where it is one of CART."""
        own = self.recipe.parameters if self.recipe.merge_method == "cart" else {}
        return self.recipe.variant("cart", own).model_copy(update={"compress": compression})

    def _row(self, trial: Trial) -> Row:
        name, points = display_name(trial), trial.points
        best, tried = self._chosen(name, trial) if len(points) > 1 else (points[0], [])
        keep = self.target / MODELS_FOLDER / trial.name if self.keep_models else None
        factors = {} if keep else self._factors(trial)  # a model that is kept is what `cart-hf merge` would write
        scored = self.recipe.variant(trial.method, best, trial.adapt, trial.wrap)
        results = self._measured(name, scored, self.scored, keep, factors).results
        return Row(name, trial.method, best, trial.on_edge(best) if tried else [], results, tried)

    def _chosen(self, name: str, trial: Trial) -> tuple[Point, list[dict[str, Any]]]:
        """Return the best point of a grid, and the average of every one on the selection split."""
        assert self.chosen is not None
        merges = Merges(self.target / ATTEMPTS_FOLDER, self._factors(trial), self.device, self.workers)
        averages: dict[str, float | None] = {}

        def score(point: Point) -> float:
            if str(point) not in averages:
                variant = self.recipe.of_trial(trial, point)
                averages[str(point)] = self._compared(name, variant, merges).results.average
                self._tell(f"choosing: {name}", len(trial.points))
            return averages[str(point)] or 0.0

        best = search_grid(trial, score)
        return best, [{"parameters": point, "average": averages[str(point)]} for point in trial.points]

    def _compared(self, name: str, variant: Recipe, merges: Merges) -> Measured:
        """Measure a point on the selection split, unless it has been done."""
        assert self.chosen is not None
        known = self.ledger.get(**point_of(variant, self.chosen.evaluation))
        if known is not None:
            return known
        measured = Measured(self._score(name, merges.make(variant), self.chosen))
        self._keep(measured, variant, self.chosen)
        return measured

    def _factors(self, trial: Trial) -> dict[str, Any]:
        """Say where the points of a grid, and CART-Indexing, find one decomposition, as arguments of a merge."""
        alone = len(trial.points) == 1 and not self.compressions
        return {} if alone or get_method(trial.method).of_factors is None else self._store(trial)

    def _store(self, *trials: Trial) -> dict[str, Any]:
        """Say where factors are kept, up to the largest rank that any of the trials asks for."""
        return kept_factors(trials, self.target / FACTORS_FOLDER)

    def _score(self, name: str, folder: Path, sample: Sample) -> Results:
        return sample.measure(name, folder, base=self.base, processes=self.processes, progress=self.progress)

    def _keep(self, measured: Measured, variant: Recipe, sample: Sample) -> None:
        """Note a measurement, if every task has a score."""
        if not measured.results.errors:
            self.ledger.put(measured, **point_of(variant, sample.evaluation))

    def _measured(
        self,
        name: str,
        variant: Recipe,
        sample: Sample,
        keep: Path | None = None,
        factors: Mapping[str, Any] | None = None,
    ) -> Measured:
        """Merge or compress, and measure, unless it has been done."""
        known = self.ledger.get(**point_of(variant, sample.evaluation))
        if known is not None and (keep is None or keep.is_dir()):
            return known
        folder = keep or self.target / "attempt"
        options = {"device": self.device, "workers": self.workers, "overwrite": True, **(factors or {})}
        adapter_bytes = 0
        if variant.compress is not None:
            adapter_bytes = compress(variant, output=folder, **options).task_bytes
        elif variant.adapt is not None:
            options.pop("factors_rank_ratio", None)
            adapt(variant, output=folder, progress=self.progress, **options)
        else:
            merge(variant, output=folder, **options)
        masks = variant.compress is not None and variant.compress.form == "emr"
        results = self._score_restored(name, folder, sample) if masks else self._score(name, folder, sample)
        measured = Measured(results, adapter_bytes)
        if keep is None:
            shutil.rmtree(folder)
        self._keep(measured, variant, sample)
        return measured

    def _score_restored(self, name: str, folder: Path, sample: Sample) -> Results:
        """Measure every task with the model that its mask makes."""
        collected, place = Collected(sample, self.processes), self.target / "restored"
        alone = sample.evaluation.model_copy(update={"heads": {}})
        for task in sample.tasks:
            shutil.rmtree(place, ignore_errors=True)
            try:
                restore(folder, sample.evaluation.heads.get(task.name, task.head), place)
                run_tasks(
                    locate(place),
                    [task],
                    alone,
                    base=self.base,
                    processes=self.processes,
                    report=collected.report,
                    read=sample.read,
                    progress=self.progress,
                )
            except UserError as failure:  # no mask is called like the task's head
                collected.report(task.name, Outcome(error="; ".join(failure.problems)))
        shutil.rmtree(place, ignore_errors=True)
        return collected.results(name)

    def _individual(self) -> Results:
        collected = Collected(self.scored, self.processes)
        score_individuals(
            {entry.name: str(entry.model) for entry in self.recipe.models},
            self.scored.tasks,
            self.evaluation,
            base=self.base,
            processes=self.processes,
            report=collected.report,
            read=self.scored.read,
            progress=self.progress,
        )
        return collected.results(INDIVIDUAL)

    def _tell(self, step: str, total: int) -> None:
        if self.progress is not None:
            self.progress(step, 1, total)


def _problems(step: Callable[[], object]) -> list[str]:
    try:
        step()
    except UserError as failure:
        return failure.problems
    return []
