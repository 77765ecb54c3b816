"""`cart_hf.compress`: one model, and for each task a LoRA adapter (CART-Indexing, TSV-C) or a mask (EMR-Merging)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from cart_hf.api import merge, plan_merge, resolved_target
from cart_hf.compression.adapter import Adapter, Centre, write_adapter
from cart_hf.compression.decompose import Ranks, decomposer, factors_of, ranks_as_planned, ranks_within
from cart_hf.compression.masked import Masked, make_masked
from cart_hf.compression.outline import Outline, outline_adapters
from cart_hf.compression.record import sources_in, write_record
from cart_hf.compression.request import begin, centre_of, making_of, request, writes_centre
from cart_hf.errors import UserError, telling
from cart_hf.factors import FactorStore, open_store
from cart_hf.merging import default_workers
from cart_hf.methods import get_method
from cart_hf.output import WorkFolder
from cart_hf.output.folder import check_inputs
from cart_hf.output.record import ADAPTATION_FOLDER, ADAPTERS_FOLDER, RECIPE_FILE, resolved_recipe, sources_of
from cart_hf.output.unfinished import cannot_write
from cart_hf.parallel import Progress
from cart_hf.plan import Plan
from cart_hf.plan.checks import TWO_MODELS
from cart_hf.processes import Processes
from cart_hf.publishing.card import write_card
from cart_hf.recipe import Recipe, Reference
from cart_hf.sources import fetch_weights, open_checkpoint

Result = TypeVar("Result")

_OF_CART = ("rank_ratio", "rank", "energy", "solver", "weight")  # what a recipe for merging may say of factors


@dataclass(frozen=True)
class Compressed:
    """What a compression made.

    :param output: the folder: the centre and ``adapters/NAME``; or the adapter itself, of a single model.
    :param plan: roles of every tensor; ``low_rank`` ones have factors.
    :param outlines: what each adapter holds.
    :param adapters: each adapter's size and errors, by task.
    :param centre_bytes: bytes of the centre's weights; 0 where it is the base, which is not copied.
    :param seconds: wall time of each step.
    """

    output: Path
    plan: Plan
    outlines: Sequence[Outline]
    adapters: Mapping[str, Adapter]
    centre_bytes: int
    seconds: Mapping[str, float]

    @property
    def task_bytes(self) -> int:
        """Bytes of what the tasks have of their own."""
        return sum(adapter.nbytes for adapter in self.adapters.values())


def compress(
    recipe: Recipe | None = None,
    *,
    output: str | Path,
    base: str | None = None,
    models: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    form: str | None = None,
    rank_ratio: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: str | None = None,
    restore: str | None = None,
    centre: str | None = None,
    adapter_dtype: str | None = None,
    solver: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    max_shard_size: str | None = None,
    tokenizer_source: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    factors: str | Path | None = None,
    factors_rank_ratio: float | None = None,
    progress: Progress | None = None,
) -> Compressed | Masked:
    """Store fine-tuned models as one model and a little for each.

    CART-Indexing (``form="cart"``): ``W_t ~ A + lowrank_k(W_t - A)`` with ``A = mean_t W_t``: task t's own model, as
    nearly as its rank allows, as PEFT has it. Of a single model, the adapter of its difference from the base is made,
    and nothing else. TSV-C (``tsv_c``): the same around the base, with 1/T of the directions for each of T tasks.
    EMR-Merging (``emr``): ``W_t ~ base + λ_t m_t u``, one task vector ``u`` for all, and a bit for each weight and
    task; :func:`cart_hf.restore` makes a task's model of it.

    :param recipe: what to compress, and how (its ``compress`` key, which the arguments about adapters change); or leave
        it out and give ``models`` and the rest.
    :param output: folder to write; it must not exist.
    :param base, models, weights, include, exclude, dtype, out_dtype, max_shard_size, tokenizer_source: as for
        :func:`cart_hf.merge`; ``out_dtype`` is the centre's type.
    :param form, rank_ratio, rank, energy, budget, restore, centre: see :class:`cart_hf.recipe.Compression`.
    :param adapter_dtype: type of the factors: ``float32``, ``bfloat16`` or ``float16``.
    :param solver: ``fast`` or ``exact``.
    :param device, workers: as for :func:`cart_hf.merge`.
    :param overwrite: replace an earlier output of cart-hf.
    :param factors: folder where singular factors are found and kept, the same as those of merges with ``cart``.
    :param factors_rank_ratio: rank up to which to compute them; default: as this compression needs.
    :param progress: called with (step, advance, total) as the work goes on.
    :raises UserError: when the recipe or an input is wrong; nothing is then left at ``output``.
    """
    settings = {
        "base": base,
        "models": models,
        "weights": weights,
        "include": include,
        "exclude": exclude,
        "dtype": dtype,
        "out_dtype": out_dtype,
        "max_shard_size": max_shard_size,
        "tokenizer_source": tokenizer_source,
    }
    making = {
        "form": form,
        "rank_ratio": rank_ratio,
        "rank": rank,
        "energy": energy,
        "budget": budget,
        "restore": restore,
        "centre": centre,
        "dtype": adapter_dtype,
        "solver": solver,
    }
    wanted = request(recipe, settings, making)
    if making_of(wanted).form == "emr":
        if factors is not None or factors_rank_ratio is not None:
            raise UserError("--factors: emr decomposes nothing; leave it out")
        return make_masked(wanted, output, device=device, workers=workers, overwrite=overwrite, progress=progress)
    return make(
        wanted,
        output,
        device=device,
        workers=workers,
        overwrite=overwrite,
        factors=factors,
        factors_rank_ratio=factors_rank_ratio,
        progress=progress,
    )


def make(
    recipe: Recipe,
    output: str | Path,
    *,
    device: str,
    workers: int | None,
    overwrite: bool,
    factors: str | Path | None = None,
    factors_rank_ratio: float | None = None,
    progress: Progress | None = None,
    merged: Path | None = None,
    title: str | None = None,
) -> Compressed:
    """Compress what a recipe says to adapters.

    :param output, device, workers, overwrite, factors, factors_rank_ratio, progress: as for :func:`compress`.
    :param merged: the merge that the recipe's models are the tasks of: its sources and its recipe are what is recorded.
    :param title: what the cards call the output; default: as its folder is called.
    :raises UserError: when the recipe or an input is wrong; nothing is then left at ``output``.
    """
    target, processes = begin(output, device=device, workers=workers, overwrite=overwrite)
    started = time.perf_counter()
    plan, outlines = plan_compression(recipe, progress)
    check_inputs(target, plan)
    fetch_weights(plan.checkpoints, progress, beside=(target, plan.nbytes))
    seconds = {"plan": time.perf_counter() - started}
    with WorkFolder(target, overwrite=overwrite) as folder, telling(cannot_write(target)):
        place = folder.parent / "factors" if factors is None else resolved_target(factors)
        store = open_store(place, factors_rank_ratio, centre_of(recipe))
        threads = workers or default_workers(plan, processes)
        job = _Job(recipe, plan, outlines, target, store, processes, threads, progress, merged, title or target.name)
        return job.carry_out(folder, seconds)


def plan_compression(recipe: Recipe, progress: Progress | None = None) -> tuple[Plan, list[Outline]]:
    """Open the recipe's models (configurations and headers only), and decide what every adapter holds.

    :raises UserError: with every problem found.
    """
    making = making_of(recipe)
    _check_tsv_c(recipe)
    own = recipe.parameters if recipe.merge_method == "cart" else {}
    kept = {name: value for name, value in own.items() if name in _OF_CART}
    if making.decides_ranks:
        kept = {name: value for name, value in kept.items() if name not in get_method("cart").one_of}
    elif making.form == "tsv_c":
        kept = {name: value for name, value in kept.items() if name == "solver"}
        kept["rank_ratio"] = 1 / len(recipe.models)  # as the authors' code has it: int(r (1/T)) directions
    if centre_of(recipe) == "base" and recipe.base_model is None:
        raise UserError("base_model: the adapter of a single model is its difference from the base: name it (--base)")
    plan = plan_merge(recipe.variant("cart", {**kept, **making.parameters}), progress)
    plan = replace(plan, warnings=tuple(warning for warning in plan.warnings if warning != TWO_MODELS))
    return plan, outline_adapters(plan, making.restored, "average" if writes_centre(recipe) else "base")


def _check_tsv_c(recipe: Recipe) -> None:
    """Refuse what TSV-C says nothing about.

    :raises UserError: naming what is missing.
    """
    if making_of(recipe).form != "tsv_c":
        return
    if recipe.base_model is None:
        raise UserError("base_model: tsv_c works on task vectors and needs the base model: name it (--base)")
    if len(recipe.models) < 2:
        raise UserError(
            f"models: only one model ({recipe.models[0].model}); tsv_c divides the directions between several. For an "
            "adapter of one model leave --form out"
        )


@dataclass(frozen=True)
class _Job:
    """A compression under way: what all its steps need."""

    recipe: Recipe
    plan: Plan
    outlines: Sequence[Outline]
    target: Path
    store: FactorStore
    processes: Processes
    workers: int
    progress: Progress | None
    merged: Path | None
    title: str

    def carry_out(self, folder: Path, seconds: dict[str, float]) -> Compressed:
        """Fill the output folder."""
        centre = self._timed("centre", seconds, lambda: self._centre(folder))
        ranks = self._timed("decompose", seconds, self._ranks)
        adapters = self._timed("write", seconds, lambda: self._adapters(folder, centre, ranks))
        nbytes = 0 if centre.is_base else sum(t.stored.nbytes for t in centre.checkpoint.tensors.values())
        made = Compressed(self.target, self.plan, self.outlines, adapters, nbytes, seconds)
        self._describe(folder, made)
        return made

    def _describe(self, folder: Path, made: Compressed) -> None:
        """Write the records and cards; without a centre each adapter stands for itself, in a folder of its own."""
        sources = sources_in(self.merged) if self.merged else self._sources(folder)
        groups = [(folder, self.title, self.outlines)]
        if not writes_centre(self.recipe) and len(self.outlines) > 1:
            groups += [(self._folder_of(folder, one), one.name, [one]) for one in self.outlines]
        for place, title, outlines in groups:
            names = [outline.name for outline in outlines]
            mine = (
                sources if self.merged else sources | {"models": [m for m in sources["models"] if m["name"] in names]}
            )
            write_record(
                place,
                self.plan,
                making_of(self.recipe),
                outlines,
                made.adapters,
                mine,
                centre_bytes=made.centre_bytes,
                seconds=made.seconds,
            )
            (place / RECIPE_FILE).write_text(self._resolved(names), encoding="utf-8")
            if self.merged is not None and (self.merged / ADAPTATION_FOLDER).is_dir():  # which the recipe names
                shutil.copytree(self.merged / ADAPTATION_FOLDER, place / ADAPTATION_FOLDER)
            if made.centre_bytes or len(outlines) == 1:
                write_card(place, title)

    def _sources(self, folder: Path) -> dict[str, Any]:
        """Return what is recorded of base and models; where the centre was merged, it has asked the Hub about them."""
        if not writes_centre(self.recipe):
            return sources_of(self.plan)
        found = sources_in(folder)
        return {key: found[key] for key in ("base", "models")}

    def _resolved(self, names: Sequence[str]) -> str:
        """Return the recipe that gives the same bytes of some of the adapters."""
        if self.merged:
            return (self.merged / RECIPE_FILE).read_text(encoding="utf-8")
        pinned = resolved_recipe(self.plan)
        models = tuple(entry for entry in pinned.models if entry.name in names)
        update = {"models": models, "base_model": pinned.base_model, "coefficients": None}  # an average has none
        return self.recipe.model_copy(update=update).to_yaml()

    def _folder_of(self, folder: Path, outline: Outline) -> Path:
        return folder if len(self.outlines) == 1 else folder / ADAPTERS_FOLDER / outline.name

    def _timed(self, step: str, seconds: dict[str, float], work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = work()
        seconds[step] = time.perf_counter() - started
        return result

    def _centre(self, folder: Path) -> Centre:
        """Write the average, or TSV-C's base, as a merge does; or take the base where it lies."""
        if not writes_centre(self.recipe):
            assert self.plan.base is not None  # checked when it was planned
            return Centre(self.plan.base, is_base=True)
        of_base = centre_of(self.recipe) == "base"
        variant = self.recipe.variant(*(("task_arithmetic", {"scale": 0.0}) if of_base else ("average", {})))
        merge(variant, output=folder, device=str(self.processes.device), workers=self.workers, progress=self.progress)
        return Centre(open_checkpoint("centre", Reference(str(folder))), is_base=False)

    def _ranks(self) -> list[Ranks]:
        decompose = decomposer(self.plan, self.store, self.processes.device, self.workers, self.progress)
        making = making_of(self.recipe)
        if making.budget_bytes is None:
            return ranks_as_planned(self.outlines, decompose)
        size = getattr(torch, making.dtype).itemsize
        return ranks_within(self.plan, self.outlines, self.store, decompose, budget=making.budget_bytes, size=size)

    def _adapters(self, folder: Path, centre: Centre, ranks: Sequence[Ranks]) -> dict[str, Adapter]:
        adapters = {}
        for outline, mine in zip(self.outlines, ranks, strict=True):
            adapters[outline.name] = write_adapter(
                outline,
                factors_of(self.plan, outline, mine, self.store),
                centre,
                self._folder_of(folder, outline),
                base=self._base_of(outline),
                dtype=making_of(self.recipe).dtype,
            )
            if self.progress is not None:
                self.progress("writing adapters", 1, len(self.outlines))
        return adapters

    def _base_of(self, outline: Outline) -> Reference | str:
        """Return the model that people add an adapter to."""
        if writes_centre(self.recipe):
            return str(self.target / "tasks" / outline.name if outline.name in self.plan.heads else self.target)
        base = self.plan.base
        assert base is not None  # checked when it was planned
        return str(base.folder) if base.reference.is_local else base.reference
