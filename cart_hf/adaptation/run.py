"""`cart_hf.adapt`: merge, learn the coefficients on unlabelled inputs, merge again with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cart_hf.adaptation.answering import owner_of
from cart_hf.adaptation.inputs import Inputs, read_inputs
from cart_hf.adaptation.job import STATE_FILE, Adapted, Job, TermsPlace, timed
from cart_hf.adaptation.objective import check_objective
from cart_hf.adaptation.request import request, static
from cart_hf.api import factor_store, plan_merge, resolved_target
from cart_hf.errors import UserError
from cart_hf.merging import default_workers
from cart_hf.output.folder import check_inputs, check_target
from cart_hf.output.state import check_alike
from cart_hf.output.unfinished import merge_folder
from cart_hf.parallel import Progress, silent
from cart_hf.plan import Plan
from cart_hf.processes import Processes, join
from cart_hf.recipe import Adaptation, Recipe
from cart_hf.sources import fetch_weights
from cart_hf.tasks import evaluation_of, find_tasks


def adapt(
    recipe: Recipe | None = None,
    *,
    output: str | Path,
    base: str | None = None,
    models: Sequence[str] | None = None,
    method: str | None = None,
    weights: Sequence[float] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    seed: int | None = None,
    max_shard_size: str | None = None,
    tokenizer_source: str | None = None,
    learning: Mapping[str, Any] | None = None,
    examples: Mapping[str, Any] | None = None,
    device: str = "auto",
    workers: int | None = None,
    terms: TermsPlace = "disk",
    overwrite: bool = False,
    resume: bool = False,
    factors: str | Path | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Adapted:
    """Merge fine-tuned models, with coefficients that are learnt on unlabelled inputs of their tasks.

    ``W = centre + sum_t c_t term_t`` for every tensor, the ``c_t`` found by minimising the entropy of the predictions
    (AdaMerging, arXiv 2310.02575) or their distance from each task's own model. Nothing else is changed: no head, no
    weight beyond these sums. A model that was adapted on the inputs it is scored on is a *transductive* result.

    Under a launcher (torchrun, accelerate, Slurm) every process calls it; they share each batch.

    :param recipe: what to merge, and how to learn (its ``adapt`` key) on what (its ``evaluation`` key); or leave it out
        and give ``models`` and the rest, as for :func:`cart_hf.merge`.
    :param output: folder to write; it must not exist.
    :param base, models, method, weights, include, exclude, dtype, out_dtype, seed, max_shard_size, tokenizer_source:
        as for :func:`cart_hf.merge`.
    :param learning: fields of :class:`cart_hf.recipe.Adaptation`, such as ``{"steps": 500}``; they go before the
        recipe's.
    :param examples: fields of :class:`cart_hf.recipe.Evaluation` that say which tasks on which data, such as
        ``{"tasks": ["sst2"], "data": DIR}``; they go before the recipe's.
    :param device, workers: as for :func:`cart_hf.merge`.
    :param terms: where the dense terms are: on ``disk``, so that memory does not grow with the number of tasks, or on
        the ``device``, which is faster and takes T more models there.
    :param overwrite: replace an earlier output of cart-hf.
    :param resume: go on with an adaptation to ``output`` that was killed, if there is one.
    :param factors: folder where singular factors are found and kept, the same as those of merges with ``cart``.
    :param progress: called with (step, advance, total) as the work goes on, in the first process.
    :param parameters: the method's parameters.
    :raises UserError: when the recipe, an input or the data is wrong; nothing is then left at ``output``.
    """
    settings = {
        "base": base,
        "models": models,
        "method": method,
        "weights": weights,
        "include": include,
        "exclude": exclude,
        "dtype": dtype,
        "out_dtype": out_dtype,
        "seed": seed,
        "max_shard_size": max_shard_size,
        "tokenizer_source": tokenizer_source,
    }
    wanted = request(recipe, settings, parameters, learning or {}, examples or {})
    target = resolved_target(output)
    if workers is not None and workers < 1:
        raise UserError(f"workers: must be at least 1, not {workers}")
    processes = join(device)
    processes.by_main(lambda: check_target(target, overwrite=overwrite))
    if not processes.is_main:
        progress = silent
    seconds: dict[str, float] = {}
    with timed("plan", seconds):
        job = _prepared(wanted, target, processes, workers, terms, factors, progress)
        state = job.state()
        check_alike(processes.gather(state))

    def work_folder() -> Any:
        return merge_folder(
            target, state, overwrite=overwrite, resume=resume, is_empty=lambda work: not (work / STATE_FILE).is_file()
        )

    with processes.entered_by_main(work_folder) as folder:
        return job.carry_out(folder, seconds)


def _prepared(
    wanted: Recipe,
    target: Path,
    processes: Processes,
    workers: int | None,
    terms: TermsPlace,
    factors: str | Path | None,
    progress: Progress | None,
) -> Job:
    """Look at everything before the work: the plan, the weights, the tasks and their inputs."""
    adaptation, evaluation = wanted.adapt or Adaptation(), evaluation_of(wanted)
    store = factor_store(wanted, factors, None)
    place = store.folder if store is not None else None
    tasks = find_tasks(evaluation.tasks, suite=evaluation.suite, tasks_file=evaluation.tasks_file)
    check_objective(adaptation.objective, tasks)
    for task in tasks:
        owner_of(task, evaluation, [entry.name for entry in wanted.models])

    def prepare() -> tuple[Plan, list[Inputs]]:
        plan = plan_merge(static(wanted), progress)
        check_inputs(target, plan)
        fetch_weights(plan.checkpoints, progress, beside=(target, plan.nbytes))
        return plan, [read_inputs(task, evaluation, adaptation) for task in tasks]

    plan, inputs = processes.everywhere(prepare, in_turns=True)
    threads = workers or default_workers(plan, processes)
    return Job(wanted, adaptation, evaluation, plan, inputs, target, processes, threads, terms, place, progress)
