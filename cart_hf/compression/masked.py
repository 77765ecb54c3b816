"""Writing models as EMR-Merging has them: one unified model, and for each task a mask and a rescaler."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cart_hf.api import plan_merge
from cart_hf.compression.emr import Sums, mask, unify
from cart_hf.compression.masks import (
    MASKS_FOLDER,
    RESCALER,
    UNIFIED_FOLDER,
    Mask,
    mask_bytes,
    mask_shards,
    masked,
    whole,
)
from cart_hf.compression.record import write_masked_record
from cart_hf.compression.request import begin
from cart_hf.errors import UserError, telling
from cart_hf.merging import default_workers
from cart_hf.merging.reading import BLOCK, cast, read_block, sources_of
from cart_hf.merging.slices import merge_chunk
from cart_hf.output import WorkFolder
from cart_hf.output.folder import check_inputs, check_space, write_folder
from cart_hf.output.journal import Journal
from cart_hf.output.record import RECIPE_FILE, resolved_recipe
from cart_hf.output.unfinished import cannot_write
from cart_hf.output.writer import WeightWriter, allocate
from cart_hf.parallel import Progress, in_parallel, one_blas_thread
from cart_hf.plan import Plan, PlannedTensor, lay_out
from cart_hf.plan.model import CHUNK
from cart_hf.recipe import Recipe
from cart_hf.sources import fetch_weights

Slice = tuple[PlannedTensor, int, int]


@dataclass(frozen=True)
class Masked:
    """What EMR-Merging made.

    :param output: the folder: ``unified`` and ``masks/NAME``.
    :param plan: what was done to every tensor: ``elementwise`` ones are masked.
    :param masks: what each task has, by name.
    :param unified_bytes: bytes of the unified model's backbone.
    :param seconds: wall time of each step.
    """

    output: Path
    plan: Plan
    masks: Mapping[str, Mask]
    unified_bytes: int
    seconds: Mapping[str, float]

    @property
    def task_bytes(self) -> int:
        """Bytes of what the tasks have of their own."""
        return sum(mask.nbytes for mask in self.masks.values())


def plan_masked(recipe: Recipe, progress: Progress | None = None) -> Plan:
    """Open the recipe's models (configurations and headers only), and decide which tensors are masked.

    :raises UserError: with every problem found.
    """
    if recipe.base_model is None:
        raise UserError("base_model: emr works on task vectors and needs the base model: name it (--base)")
    if len(recipe.models) < 2:
        raise UserError(f"models: only one model ({recipe.models[0].model}); emr finds what several have in common")
    return plan_merge(recipe.variant("task_arithmetic", {}), progress)


def make_masked(
    recipe: Recipe,
    output: str | Path,
    *,
    device: str,
    workers: int | None,
    overwrite: bool,
    progress: Progress | None = None,
) -> Masked:
    """Write the unified model, and every task's mask, in one pass over the models.

    :param output, device, workers, overwrite, progress: as for :func:`cart_hf.compress`.
    :raises UserError: when the recipe or an input is wrong; nothing is then left at ``output``.
    """
    target, processes = begin(output, device=device, workers=workers, overwrite=overwrite)
    started = time.perf_counter()
    plan = plan_masked(recipe, progress)
    check_inputs(target, plan)
    fetch_weights(plan.checkpoints, progress, beside=(target, plan.nbytes + mask_bytes(plan)))
    seconds = {"plan": time.perf_counter() - started}
    with WorkFolder(target, overwrite=overwrite) as folder, telling(cannot_write(target)):
        started = time.perf_counter()
        threads = workers or default_workers(plan, processes)
        masks = _write(plan, folder, processes.device, threads, progress)
        seconds["write"] = time.perf_counter() - started
        made = Masked(target, plan, masks, plan.nbytes, seconds)
        write_masked_record(folder, plan, made.masks, made.unified_bytes, seconds)
        text = recipe.model_copy(update=_pinned(plan)).to_yaml()
        (folder / RECIPE_FILE).write_text(text, encoding="utf-8")
    return made


def _pinned(plan: Plan) -> dict[str, object]:
    pinned = resolved_recipe(plan)
    return {"models": pinned.models, "base_model": pinned.base_model, "coefficients": None}


def _write(plan: Plan, folder: Path, device: torch.device, workers: int, progress: Progress | None) -> dict[str, Mask]:
    """Fill the folder, and return what each task got."""
    unified, shards = folder / UNIFIED_FOLDER, lay_out(plan)
    own = {position: mask_shards(plan, position) for position in range(len(plan.models))}
    places = {position: folder / MASKS_FOLDER / plan.models[position].name for position in own}
    check_space(folder, sum(shard.nbytes for shard in [*shards, *(s for of_task in own.values() for s in of_task)]))
    for place, files in [(unified, shards), *((places[position], own[position]) for position in own)]:
        place.mkdir(parents=True)
        allocate(place, files)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(folder.parent))  # which the writers tell; nobody goes on from it
        writer = stack.enter_context(WeightWriter(unified, shards, journal))
        of_task = {i: stack.enter_context(WeightWriter(places[i], own[i], journal)) for i in own}
        sums = _carry_out(plan, writer, of_task, device, workers, progress)
        for position, found in sums.items():
            of_task[position].write(RESCALER, 0, torch.tensor([found.rescaler], dtype=torch.float64))
    write_folder(unified, plan, shards)
    return {
        model.name: Mask(
            sum(shard.nbytes for shard in own[position]),
            sums[position].rescaler,
            sums[position].error,
            sum(tensor.stored.nbytes for tensor in model.tensors.values()),
        )
        for position, model in enumerate(plan.models)
    }


def _carry_out(
    plan: Plan,
    writer: WeightWriter,
    of_task: Mapping[int, WeightWriter],
    device: torch.device,
    workers: int,
    progress: Progress | None,
) -> dict[int, Sums]:
    """Write every tensor, and return each task's sums."""

    def work(piece: Slice) -> tuple[int, list[tuple[int, Sums]]]:
        tensor, start, stop = piece
        if tensor.role == "elementwise":
            return stop - start, _elect(plan, piece, writer, of_task, device)
        writer.write(tensor, start, merge_chunk(plan, tensor, start, stop, device))
        for position, name in tensor.inputs if tensor.role == "average" else ():
            of_task[position].write(whole(plan, tensor, position), start, plan.models[position].read(name, start, stop))
        return stop - start, []

    parts: dict[int, list[Sums]] = {position: [] for position in of_task}
    total = sum(tensor.elements for tensor in plan.tensors)
    with one_blas_thread():
        for elements, found in in_parallel(work, _slices(plan), workers):
            for position, part in found:
                parts[position].append(part)
            if progress is not None:
                progress("masking", elements, total)
    nothing = Sums(0.0, 0.0, 0.0, 0.0, 0.0)
    return {position: Sums.over([nothing, *of_position]) for position, of_position in parts.items()}


def _slices(plan: Plan) -> Iterator[Slice]:
    for tensor in plan.tensors:
        for start in range(0, tensor.elements, CHUNK):
            yield tensor, start, min(start + CHUNK, tensor.elements)


def _elect(
    plan: Plan, piece: Slice, writer: WeightWriter, of_task: Mapping[int, WeightWriter], device: torch.device
) -> list[tuple[int, Sums]]:
    """Write a slice of the unified model, on a CPU a block at a time that stays in the core's cache, and its masks."""
    tensor, start, stop = piece
    sources, bits = sources_of(plan, tensor), masked(tensor)
    sums = []
    step = BLOCK if device.type == "cpu" else stop - start
    for first in range(start, stop, step):
        block = read_block(plan, sources, (first, min(first + step, stop))).to(device)
        task_vectors, base = block[:-1], block[-1]
        unified = unify(models=task_vectors, base=base)
        for (position, _), task_vector in zip(tensor.inputs, task_vectors, strict=True):
            agrees = mask(task_vector=task_vector, unified=unified)
            packed = torch.from_numpy(np.packbits(agrees.cpu().numpy()))
            of_task[position].write(bits, first // 8, packed)  # blocks are whole bytes
            sums.append((position, Sums.of(task_vector, unified * agrees)))
        writer.write(tensor, first, cast(plan, tensor, unified.add_(base)))
    return sums
