"""`cart_hf.analyze`: everything that can be measured of a merge without running the merged model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from cart_hf.analysis.files import check_place, write_files
from cart_hf.analysis.job import Job
from cart_hf.analysis.layer_inputs import layer_inputs
from cart_hf.analysis.matrices import Matrices
from cart_hf.analysis.model import RATIOS, Analysis, Normalizer
from cart_hf.analysis.request import inputs_wanted, request
from cart_hf.analysis.results import read_results, read_tuning
from cart_hf.api import plan_merge, resolved_target
from cart_hf.errors import UserError, did_you_mean
from cart_hf.factors import FactorStore, open_store
from cart_hf.merging import default_workers
from cart_hf.output.folder import WorkFolder, check_inputs
from cart_hf.parallel import Progress, silent
from cart_hf.plan.build import make_plan
from cart_hf.processes import join
from cart_hf.recipe import Recipe
from cart_hf.recipe.compression import Centre
from cart_hf.sources import fetch_weights
from cart_hf.tasks import evaluation_of


def analyze(
    recipe: Recipe | None = None,
    *,
    output: str | Path | None = None,
    base: str | None = None,
    models: Sequence[str] | None = None,
    method: str | None = None,
    weights: Sequence[float] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    up_to: float = 1.0,
    normalizer: Normalizer = "all",
    inputs: int | None = None,
    examples: Mapping[str, Any] | None = None,
    results: str | Path | None = None,
    tuning: str | Path | None = None,
    factors: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **parameters: Any,
) -> Analysis:
    """Measure why a merge works or fails: its models, their interference, and what the merge keeps of each.

    What CART decomposes is decomposed around the models' average and, where there is a base, around the base, whatever
    the recipe's method; the merge itself is carried out as the recipe says, and not written.

    :param recipe: the merge; or leave it out and give ``models`` and the rest, as for :func:`cart_hf.merge`.
    :param output: folder for JSON, CSV, figures and the page; default: nothing is written.
    :param base, models, method, weights, include, exclude, dtype, seed, parameters: as for :func:`cart_hf.merge`.
    :param up_to: the rank ratio up to which singular values and curves are computed, above 0, at most 1.
    :param normalizer: of the interference: singular values over the norm of all of them (``all``, which never falls
        with the rank), of the ``top`` ones that are kept, or as they are (``none``).
    :param inputs: check Theorem 1 on so many vectors that reach each layer of each task's model; 0: do not; default:
        32 where ``examples`` are given.
    :param examples: fields of :class:`cart_hf.recipe.Evaluation` that say which tasks on which data, such as
        ``{"tasks": ["sst2"], "data": DIR}``; they go before the recipe's.
    :param results: ``benchmark.json`` or ``results.json``, or the folder of one, to show with the analysis.
    :param tuning: ``tuning.json``, or its folder, likewise.
    :param factors: folder where singular factors are found and kept, the same as those of merges with ``cart``.
    :param device, workers: as for :func:`cart_hf.merge`.
    :param overwrite: replace an earlier analysis.
    :param progress: called with (step, advance, total) as the work goes on.
    :raises UserError: when the recipe, an input or an option is wrong; nothing is then left at ``output``.
    """
    settings = {
        "base": base,
        "models": models,
        "method": method,
        "weights": weights,
        "include": include,
        "exclude": exclude,
        "dtype": dtype,
        "seed": seed,
    }
    recipe, wanted = request(recipe, settings, parameters, examples or {}), inputs_wanted(inputs, examples or {})
    _check(recipe, up_to, normalizer, wanted, workers)
    target = None if output is None else resolved_target(output)
    if target is not None:
        check_place(target, overwrite=overwrite)
    scores = None if results is None else read_results(Path(results).expanduser())
    search = None if tuning is None else read_tuning(Path(tuning).expanduser())
    processes = join(device)
    if processes.count > 1:
        raise UserError("analyze runs as one process (it uses every core): start it without a launcher")
    stores = {} if factors is None else _stores(resolved_target(factors))
    evaluation = evaluation_of(recipe) if wanted else None
    plan = plan_merge(recipe, progress)
    if target is not None:
        check_inputs(target, plan)
    is_cart = plan.method.name == "cart" and not plan.wrappings
    of_cart = plan if is_cart else make_plan(recipe.variant("cart", {}), plan.base, plan.models)
    fetch_weights(plan.checkpoints, progress)
    ratios = tuple(ratio for ratio in RATIOS if ratio <= up_to)
    matrices = Matrices(of_cart, ratios, up_to, normalizer, of_cart is plan, processes.device, stores)
    threads = workers or default_workers(matrices.wide_plan(), processes)
    room = nullcontext() if target is None else WorkFolder(target, overwrite=overwrite, check=check_place)
    with room as folder:
        if evaluation is not None:
            seen = layer_inputs(recipe, of_cart, evaluation, rows=wanted, processes=processes, progress=progress)
            matrices = replace(matrices, inputs=seen)
        analysis = Job(plan, matrices, processes, threads, progress or silent).analysis(scores, search)
        if target is None or folder is None:
            return analysis
        return replace(analysis, notes=tuple(write_files(analysis, folder, target)))


def _check(recipe: Recipe, up_to: float, normalizer: str, inputs: int, workers: int | None) -> None:
    """Refuse options that make no sense.

    :raises UserError: with every one of them.
    """
    problems = []
    if len(recipe.models) < 2:
        problems.append("models: an analysis compares models; give at least two")
    if not 0 < up_to <= 1:
        problems.append(f"up_to: must be above 0 and at most 1, not {up_to}")
    if normalizer not in get_args(Normalizer):
        problems.append(f"normalizer: unknown '{normalizer}'{did_you_mean(normalizer, get_args(Normalizer))}")
    if inputs < 0:
        problems.append(f"inputs: must be 0 or more, not {inputs}")
    if workers is not None and workers < 1:
        problems.append(f"workers: must be at least 1, not {workers}")
    if problems:
        raise UserError(problems)


def _stores(folder: Path) -> dict[Centre, FactorStore]:
    return {centre: open_store(folder, centre=centre) for centre in get_args(Centre)}
