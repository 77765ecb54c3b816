"""`cart_hf.merge`: the whole road from a recipe to an output folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cart_hf.errors import UserError, telling
from cart_hf.factors import FactorStore, open_store
from cart_hf.merging import Span, default_workers, run
from cart_hf.methods import get_method
from cart_hf.output.folder import check_inputs, check_space, check_target, tokenizer_source, write_folder
from cart_hf.output.journal import Journal, entries
from cart_hf.output.record import write_record
from cart_hf.output.state import State, check_alike
from cart_hf.output.unfinished import cannot_write, merge_folder
from cart_hf.output.writer import WeightWriter, allocate, missing_bytes
from cart_hf.parallel import Progress, in_parallel, silent
from cart_hf.plan import Plan, Shard, lay_out, make_plan
from cart_hf.processes import Processes, StoppedError, join
from cart_hf.publishing.card import write_card
from cart_hf.recipe import Recipe, recipe_from_flags, refuse_flags
from cart_hf.recipe.calibration import check_examples
from cart_hf.sources import fetch_weights, open_checkpoints

if TYPE_CHECKING:
    from cart_hf.calibration import Statistics


@dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    :param output: the output folder.
    :param plan: roles, ranks and warnings of every tensor.
    :param seconds: wall time of each step.
    :param factors_found: of the matrices to decompose, how many had factors; None when none were looked for.
    """

    output: Path
    plan: Plan
    seconds: Mapping[str, float]
    factors_found: int | None = None


@dataclass(frozen=True)
class _Job:
    """What every step of a merge needs.

    :param plan: what happens to every tensor.
    :param shards: the weight files.
    :param target: the output folder.
    :param processes: who shares the work.
    :param store: where factors are looked for, and kept.
    """

    plan: Plan
    shards: Sequence[Shard]
    target: Path
    processes: Processes
    store: FactorStore | None

    def state(self) -> State:
        """What decides the bytes."""
        store = self.store and f"up to rank_ratio {self.store.rank_ratio}"
        return State.of(self.plan, self.shards, self.target, {"device": self.processes.device.type, "factors": store})

    def factors_found(self) -> int | None:
        """Count the matrices that have factors."""
        if self.store is None:
            return None
        groups = (group for group in self.plan.groups() if group.is_whole)
        return sum(self.store.holds(self.plan, group) for group in groups)


def merge(
    recipe: Recipe | None = None,
    *,
    output: str | Path,
    base: str | None = None,
    models: Sequence[str] | None = None,
    method: str | None = None,
    weights: Sequence[float] | None = None,
    wrap: Mapping[str, Mapping[str, Any]] | Sequence[str] | str | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    seed: int | None = None,
    max_shard_size: str | None = None,
    tokenizer_source: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    factors: str | Path | None = None,
    factors_rank_ratio: float | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> MergeResult:
    """Merge fine-tuned models into one.

    Under a launcher (torchrun, accelerate, Slurm) every process calls it, and they share the work.

    :param recipe: what to do; or leave it out and give ``models`` and the other arguments, which mean what the keys of
        a recipe mean.
    :param output: folder to write; it must not exist.
    :param base: the pretrained model: a Hub id, ``id@revision`` or a folder.
    :param models: the fine-tuned models, ``REF`` or ``NAME=REF``.
    :param method: name of a merge method; default: ``cart``.
    :param weights: one weight for each model.
    :param wrap: what is done to the method's result: names of wrappers, or their parameters by name.
    :param device: ``auto``, ``cpu``, ``cuda``, ``mps`` ...
    :param workers: worker threads of each process; default: one per core. The result does not depend on it.
    :param overwrite: replace an earlier output of cart-hf.
    :param resume: go on with a merge to ``output`` that was killed, if there is one.
    :param factors: folder where the singular factors of the centred weights are kept, and found by the next merge of
        the same models, with whatever rank and scale.
    :param factors_rank_ratio: rank up to which to compute them; default: as this merge needs.
    :param progress: called with (step, advance, total) as the work goes on, in the first process.
    :param parameters: the method's parameters, such as ``rank_ratio=0.08, scale=1.5``.
    :raises UserError: when the recipe or an input is wrong; nothing is then left at ``output``.
    """
    settings = {
        "base": base,
        "models": models,
        "method": method,
        "weights": weights,
        "wrap": wrap,
        "dtype": dtype,
        "out_dtype": out_dtype,
        "include": include,
        "exclude": exclude,
        "seed": seed,
        "max_shard_size": max_shard_size,
        "tokenizer_source": tokenizer_source,
    }
    if recipe is None:
        recipe = recipe_from_flags(settings, parameters)
    else:
        refuse_flags(settings, parameters)
    target = resolved_target(output)
    if workers is not None and workers < 1:
        raise UserError(f"workers: must be at least 1, not {workers}")
    store = factor_store(recipe, factors, factors_rank_ratio)
    processes = join(device)
    processes.by_main(lambda: check_target(target, overwrite=overwrite))
    if not processes.is_main:
        progress = silent
    seconds: dict[str, float] = {}
    job, state = _prepare(recipe, target, processes, store, progress, seconds)
    found = job.factors_found()
    started = time.perf_counter()
    statistics = calibrated(job.plan, processes, progress)
    if statistics is not None:
        seconds["calibrate"] = time.perf_counter() - started
        state = replace(state, settings={**state.settings, "calibrated on": statistics.digest})
    check_alike(processes.gather(state))
    with processes.entered_by_main(lambda: merge_folder(target, state, overwrite=overwrite, resume=resume)) as folder:
        workers = workers or default_workers(job.plan, processes)
        _execute(job, folder, statistics, found, workers, progress, seconds)
    return MergeResult(target, job.plan, seconds, found)


def factor_store(recipe: Recipe, folder: str | Path | None, rank_ratio: float | None) -> FactorStore | None:
    """Return where the factors are kept, if they are.

    :raises UserError: for a method without factors, or what is no folder or no ratio.
    """
    if folder is None:
        if rank_ratio is not None:
            raise UserError("--factors-rank-ratio is about kept factors: name their folder with --factors")
        return None
    method = get_method(recipe.merge_method)
    if method.of_factors is None:
        raise UserError(f"--factors: {method.name} decomposes nothing; leave it out")
    return open_store(resolved_target(folder), rank_ratio, method.factors_centre)


def resolved_target(output: str | Path) -> Path:
    """Return the output's absolute path, links resolved: a link is written through, never replaced.

    :raises UserError: when it cannot be a path.
    """
    try:
        return Path(output).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as failure:
        raise UserError(f"output '{str(output)[:100]}': {failure}") from failure


def plan_merge(recipe: Recipe, progress: Progress | None = None) -> Plan:
    """Open the recipe's models (configurations and headers only) and decide what happens to every tensor.

    :param progress: called with (step, advance, total) while pickles are downloaded, which have no headers to read.
    :raises UserError: with every problem found.
    """
    named = [(entry.name, entry.model) for entry in recipe.models]
    base = [("base", recipe.base_model)] if recipe.base_model else []
    checkpoints = open_checkpoints([*base, *named], progress)
    plan = make_plan(recipe, checkpoints[0] if base else None, checkpoints[len(base) :])
    if plan.method.calibration is not None:
        check_examples(recipe)
    tokenizer_source(plan)  # a wrong name must be found before the work
    return plan


def _prepare(
    recipe: Recipe,
    target: Path,
    processes: Processes,
    store: FactorStore | None,
    progress: Progress | None,
    seconds: dict[str, float],
) -> tuple[_Job, State]:
    """Plan the merge, bring the weights onto every machine, and say what decides the bytes."""

    def prepare() -> tuple[_Job, State]:
        started = time.perf_counter()
        plan = plan_merge(recipe, progress)
        check_inputs(target, plan)
        seconds["plan"] = time.perf_counter() - started
        started = time.perf_counter()
        fetch_weights(plan.checkpoints, progress, beside=(target, plan.nbytes))
        seconds["fetch"] = time.perf_counter() - started
        job = _Job(plan, lay_out(plan), target, processes, store)
        return job, job.state()

    references = [recipe.base_model, *(entry.model for entry in recipe.models)]
    remote = any(reference is not None and not reference.is_local for reference in references)
    return processes.everywhere(prepare, in_turns=remote)


def calibrated(plan: Plan, processes: Processes, progress: Progress | None) -> Statistics | None:
    """Return the statistics of the models at work that the plan's method needs; None where it needs none.

    :raises UserError: when they cannot be made.
    """
    if plan.method.calibration is None:
        return None
    from cart_hf.calibration import calibrate  # here: it runs the models, which other merges do without

    return calibrate(plan, processes, progress)


def _execute(
    job: _Job,
    folder: Path,
    statistics: Statistics | None,
    factors_found: int | None,
    workers: int,
    progress: Progress | None,
    seconds: dict[str, float],
) -> None:
    """Carry out a plan into ``folder``, in a work folder of its own."""
    plan, shards, processes, work = job.plan, job.shards, job.processes, folder.parent
    stop = work / "stop"  # a process that fails makes it: the others look for it now and then
    started = time.perf_counter()

    @telling(cannot_write(job.target))
    def make_room() -> None:
        stop.unlink(missing_ok=True)
        check_space(folder, missing_bytes(folder, shards))
        allocate(folder, shards)

    def check() -> None:
        if processes.count > 1 and stop.exists():
            raise StoppedError

    @telling(cannot_write(job.target))
    def merge_share() -> None:
        with Journal(work) as journal, WeightWriter(folder, shards, journal) as writer:
            done = _done(work, writer, processes, workers)
            write, store = writer.write, job.store
            run(
                plan,
                processes,
                write,
                workers=workers,
                store=store,
                calibration=statistics,
                done=done,
                check=check,
                progress=progress,
            )

    @telling(cannot_write(job.target))
    def finish() -> None:
        seconds["merge"] = time.perf_counter() - started
        write_folder(folder, plan, shards)
        write_record(folder, plan, shards, seconds, processes, factors_found)
        write_card(folder, job.target.name)

    def alarm() -> None:
        with suppress(OSError):
            stop.touch()

    processes.by_main(make_room)
    processes.together(merge_share, alarm)
    processes.by_main(finish)


def _done(work: Path, writer: WeightWriter, processes: Processes, workers: int) -> set[Span]:
    """Return what is in the output already, of what an earlier merge noted in its journals."""
    noted = processes.gather(list(dict.fromkeys(entries(work))) if processes.is_main else [])[0]
    mine = noted[processes.rank :: processes.count]

    def verify(entry: tuple[Span, int]) -> Span | None:
        return entry[0] if writer.holds(*entry) else None

    found = processes.gather([span for span in in_parallel(verify, mine, workers) if span is not None])
    return {span for share in found for span in share}
