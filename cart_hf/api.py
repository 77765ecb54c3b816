"""`cart_hf.merge`: the whole road from a recipe to an output folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cart_hf.device import choose_device
from cart_hf.errors import UserError
from cart_hf.merging import default_workers, run
from cart_hf.output.folder import WorkFolder, check_inputs, check_space, check_target, tokenizer_source, write_folder
from cart_hf.output.record import write_record
from cart_hf.output.writer import WeightWriter
from cart_hf.parallel import Progress
from cart_hf.plan import Plan, lay_out, make_plan
from cart_hf.publishing.card import write_card
from cart_hf.recipe import Recipe, recipe_from_flags, refuse_flags
from cart_hf.sources import fetch_weights, open_checkpoints


@dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    :param output: the output folder.
    :param plan: roles, ranks and warnings of every tensor.
    :param seconds: wall time of each step.
    """

    output: Path
    plan: Plan
    seconds: Mapping[str, float]


def merge(
    recipe: Recipe | None = None,
    *,
    output: str | Path,
    base: str | None = None,
    models: Sequence[str] | None = None,
    method: str | None = None,
    weights: Sequence[float] | None = None,
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
    progress: Progress | None = None,
    **parameters: Any,
) -> MergeResult:
    """Merge fine-tuned models into one.

    :param recipe: what to do; or leave it out and give ``models`` and the other arguments, which mean what the keys of
        a recipe mean.
    :param output: folder to write; it must not exist.
    :param base: the pretrained model: a Hub id, ``id@revision`` or a folder.
    :param models: the fine-tuned models, ``REF`` or ``NAME=REF``.
    :param method: name of a merge method; default: ``cart``.
    :param weights: one weight for each model.
    :param device: ``auto``, ``cpu``, ``cuda``, ``mps`` ...
    :param workers: worker threads; default: one per core. The result does not depend on it.
    :param overwrite: replace an earlier output of cart-hf.
    :param progress: called with (step, advance, total) as the work goes on.
    :param parameters: the method's parameters, such as ``rank_ratio=0.08, scale=1.5``.
    :raises UserError: when the recipe or an input is wrong; nothing is then left at ``output``.
    """
    settings = {
        "base": base,
        "models": models,
        "method": method,
        "weights": weights,
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
    check_target(target, overwrite=overwrite)
    if workers is not None and workers < 1:
        raise UserError(f"workers: must be at least 1, not {workers}")
    chosen = choose_device(device)
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    plan = plan_merge(recipe, progress)
    check_inputs(target, plan)
    seconds["plan"] = time.perf_counter() - started
    started = time.perf_counter()
    fetch_weights(plan.checkpoints, progress, beside=(target, plan.nbytes))
    seconds["fetch"] = time.perf_counter() - started
    workers = workers or default_workers(plan, chosen)
    with WorkFolder(target, overwrite=overwrite) as folder:
        _execute(plan, folder, target.name, chosen, workers, progress, seconds)
    return MergeResult(target, plan, seconds)


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
    tokenizer_source(plan)  # a wrong name must be found before the work
    return plan


def _execute(
    plan: Plan,
    folder: Path,
    title: str,
    device: torch.device,
    workers: int,
    progress: Progress | None,
    seconds: dict[str, float],
) -> None:
    """Carry out a plan into ``folder``, an empty folder of its own."""
    shards = lay_out(plan)
    check_space(folder, sum(shard.nbytes for shard in shards))
    started = time.perf_counter()
    try:
        with WeightWriter(folder, shards) as writer:
            run(plan, device, writer.write, workers=workers, progress=progress)
        seconds["merge"] = time.perf_counter() - started
        write_folder(folder, plan, shards)
        write_record(folder, plan, shards, seconds, str(device))
        write_card(folder, title)
    except (OSError, SafetensorError) as failure:  # safetensors wraps a full disk in an error of its own
        reason = getattr(failure, "strerror", None) or failure
        raise UserError(f"cannot write the output {folder.parent / title}: {reason}") from failure
