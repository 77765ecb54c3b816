"""The vectors that reach each Linear layer when a fine-tuned model reads inputs of its own task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cart_hf.calibration.reading import first_argument, opened, real_places, real_tokens, tasks_of_models
from cart_hf.evaluation.batches import Batch, batches, split_into_batches
from cart_hf.evaluation.heads import check_modality
from cart_hf.evaluation.prediction import on_device
from cart_hf.evaluation.run import reader
from cart_hf.parallel import Progress
from cart_hf.plan import Group, Plan
from cart_hf.plan.align import reference_architecture
from cart_hf.processes import Processes
from cart_hf.recipe import Evaluation, Recipe
from cart_hf.sources import Checkpoint
from cart_hf.tasks import TaskData

_EXAMPLES, _FEWEST_TOKENS = 64, 4  # read at least, if that many are wanted; what a short text has
_GOLDEN = (5**0.5 - 1) / 2


def layer_inputs(
    recipe: Recipe,
    plan: Plan,
    evaluation: Evaluation,
    *,
    rows: int,
    processes: Processes,
    progress: Progress | None = None,
) -> Mapping[str, list[torch.Tensor]]:
    """Return what reaches the Linear layers, by the plan's low-rank matrices (and fused groups).

    Each fine-tuned model reads a few examples of its own task, of several the first; one model is loaded at a time.
    Of each layer's inputs at most ``rows`` are kept: tokens that are no padding (or image patches), spread over all
    examples and the places in them, the same for all layers that see the same tokens. A layer that is called several
    times in one pass counts with its first call, and one that no input reaches (the text tower of a CLIP that reads
    images) has none. Of a fused group all read what its first member reads.

    Under a launcher every process calls it; they share the models.

    :param evaluation: the tasks and their data.
    :param rows: how many vectors of each layer and model.
    :return: by the group's name, for each of the group's models, in the order of its inputs, shape (at most ``rows``,
        what the Linear reads), float32, on the CPU.
    :raises UserError: when a task has no model or a model no task, or data or a model cannot be read.
    """
    groups = [group for group in plan.groups() if group.is_whole]
    tasks = tasks_of_models(plan, evaluation)
    examples = min(rows, max(_EXAMPLES, rows // _FEWEST_TOKENS), evaluation.limit or rows)
    read = reader(evaluation.model_copy(update={"limit": examples}), labelled=False)
    data = processes.everywhere(lambda: [read(task) for task in tasks], in_turns=True)
    base = str(recipe.base_model) if recipe.base_model is not None else None
    sizes = {group.name: group.shape[0 if is_transposed(plan, group) else 1] for group in groups}
    mine = range(len(plan.models))[processes.rank :: processes.count]

    def share() -> dict[int, Mapping[str, torch.Tensor]]:
        found: dict[int, Mapping[str, torch.Tensor]] = {}
        for place in mine:
            kept = _Kept(rows, sizes, len(data[place]))
            _read_by(plan.models[place], _modules(groups, place), kept, data[place], evaluation, base, processes)
            found[place] = kept.tensors()
            if progress is not None:
                progress("reading inputs", 1, len(mine))
        return found

    of_model = {place: found for one in processes.together(share) for place, found in one.items()}
    return {group.name: [of_model[place][group.name] for place, _ in group.tensors[0].inputs] for group in groups}


def is_transposed(plan: Plan, group: Group) -> bool:
    """Whether a matrix is stored as (in, out), as the weight of GPT-2's Conv1D is."""
    slot = reference_architecture(plan.base, plan.models).slots.get(group.tensors[0].name)
    return slot is not None and slot.transposed


def _modules(groups: Sequence[Group], place: int) -> dict[str, str]:
    """Return the name that one model has for the Linear of each group that it has, by the group's name."""
    names = {group.name: dict(group.tensors[0].inputs).get(place) for group in groups}
    return {group: name.removesuffix(".weight") for group, name in names.items() if name is not None}


def _read_by(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    kept: _Kept,
    data: TaskData,
    evaluation: Evaluation,
    base: str | None,
    processes: Processes,
) -> None:
    """Let a model read examples, and keep what reaches its layers.

    :param names: of its Linear modules, by group.
    """
    module, model = opened(checkpoint, base, processes.device)
    check_modality(data.task, model)
    modules = dict(module.named_modules(remove_duplicate=False))
    for group, name in names.items():
        if name in modules:  # the experts of a mixture are fused into one parameter, and called by nobody
            modules[name].register_forward_pre_hook(kept.hook(group), with_kwargs=True)
    everything = split_into_batches(data, evaluation.batch_size)
    with torch.no_grad():
        for batch in batches(data, everything, model.preprocess):
            kept.start(batch)
            model.logits([], on_device(processes.device, batch))


class _Kept:
    """What is kept of the vectors that reach one model's layers.

    :param rows: how many of each at most.
    :param sizes: of the vectors, by group.
    :param examples: how many the model reads.
    """

    def __init__(self, rows: int, sizes: Mapping[str, int], examples: int) -> None:
        self._rows, self._sizes, self._examples = rows, sizes, examples
        self._found: dict[str, list[torch.Tensor]] = {group: [] for group in sizes}
        self._called: set[str] = set()
        self._read = self._first = self._quota = 0
        self._real = torch.empty(0)

    def start(self, batch: Batch) -> None:
        """Say what is read next."""
        self._first = self._rows * self._read // self._examples
        self._read += len(batch.rows)
        self._quota = self._rows * self._read // self._examples - self._first
        self._real = real_tokens(batch)
        self._called.clear()

    def hook(self, group: str) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """Return what is called before the Linear of a group."""

        def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if group not in self._called:
                self._called.add(group)
                x = first_argument(args, kwargs)
                places = spread(real_places(x, self._real), self._quota, self._first).to(x.device)
                chosen = x.detach().reshape(-1, x.shape[-1])[places]
                self._found[group].append(chosen.float().cpu())

        return keep

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what was kept, by group."""
        return {group: torch.cat([torch.empty(0, size), *self._found[group]]) for group, size in self._sizes.items()}


def spread(places: torch.Tensor, count: int, first: int = 0) -> torch.Tensor:
    """Choose ``count`` of some places: one of each of as many equal stretches.

    Where in its stretch each lies goes by multiples of the golden ratio: with every k-th, stretches as long as an
    image has patches would all give the same patch.

    :param first: how many were chosen before, elsewhere.
    """
    if len(places) <= count or not count:
        return places[:count]
    edges = torch.arange(count + 1) * len(places) // count
    within = torch.arange(first + 1, first + count + 1, dtype=torch.float64) * _GOLDEN % 1
    return places[edges[:-1] + (within * edges.diff()).long()]
