"""What each task's adapter holds, decided from the plan: which layers, which modules whole, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cart_hf.errors import UserError
from cart_hf.plan import Group, Plan, PlannedTensor
from cart_hf.plan.align import reference_architecture
from cart_hf.recipe.compression import Centre, Restore
from cart_hf.sources import Architecture, Checkpoint


@dataclass(frozen=True)
class Target:
    """A linear layer that an adapter changes by factors.

    :param module: its name in the task's class.
    :param group: its weight, as planned.
    :param place: the model's place among the weight's inputs.
    :param transposed: whether the weight is stored as (in, out), as a Conv1D's is.
    :param bias: its bias, where the adapter restores it.
    """

    module: str
    group: Group
    place: int
    transposed: bool
    bias: PlannedTensor | None

    @property
    def tensor(self) -> PlannedTensor:
        """Its weight, as planned."""
        return self.group.tensors[0]

    @property
    def numbers(self) -> int:
        """How many numbers one direction takes."""
        return sum(self.tensor.shape)


@dataclass(frozen=True)
class Outline:
    """What one task's adapter holds.

    :param name: the task.
    :param position: the fine-tuned model's place in the plan.
    :param model: that model.
    :param class_name: the class that the adapter is made for: the task's own, or the centre's where it has no head.
    :param targets: the layers changed by factors.
    :param saved: the modules restored whole: for each the names of its tensors, in the class and in the checkpoint.
    :param heads: those of them that are the task's head.
    :param left_out: what the adapter lacks of the model: there it stays the centre's.
    """

    name: str
    position: int
    model: Checkpoint
    class_name: str
    targets: tuple[Target, ...]
    saved: Mapping[str, Mapping[str, str]]
    heads: tuple[str, ...]
    left_out: tuple[PlannedTensor, ...]

    @property
    def biased(self) -> bool:
        """Whether it restores the biases of its layers."""
        return any(target.bias for target in self.targets)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of all that does not depend on the ranks."""
        stored = [self.model.tensors[name].stored.nbytes for names in self.saved.values() for name in names.values()]
        return sum(stored) + 4 * sum(target.bias.elements for target in self.targets if target.bias)

    @property
    def label_count(self) -> int | None:
        """How many labels its head has, where its configuration names them: a model for it is made with as many."""
        labels = self.model.config.get("id2label") if self.heads else None
        return len(labels) if labels else None

    @property
    def model_bytes(self) -> int:
        """Bytes of the fine-tuned model's tensors: what is stored without compression."""
        return sum(tensor.stored.nbytes for tensor in self.model.tensors.values())


@dataclass(frozen=True)
class _Names:
    """The tensors of one model, by their names in the class that its adapter is made for.

    :param architecture: that class.
    :param planned: the merged tensors.
    :param sources: all of the model's own, and their names in its checkpoint.
    """

    architecture: Architecture
    planned: Mapping[str, PlannedTensor]
    sources: Mapping[str, str]

    def under(self, module: str) -> list[str]:
        """Return the class's tensors at or below a module."""
        return [name for name in self.architecture.slots if name.startswith(f"{module}.")]


def outline_adapters(plan: Plan, restore: Restore, centre: Centre) -> list[Outline]:
    """Say what the adapter of each model holds, in the recipe's order.

    :param plan: of ``cart``: what it would decompose gets factors.
    :param restore, centre: see :class:`cart_hf.recipe.Compression`.
    :raises UserError: when a model would have no adapter.
    """
    return [_outline(plan, position, restore, centre) for position in range(len(plan.models))]


def _outline(plan: Plan, position: int, restore: Restore, centre: Centre) -> Outline:
    model = plan.models[position]
    names = _names(plan, position)
    weights = {name: tensor for name, tensor in names.planned.items() if _is_target(names.architecture, name, tensor)}
    if not weights:
        raise UserError(
            f"{model.name}: no Linear weight of it is decomposed, so there is nothing to make an adapter of"
        )
    biases = {name: f"{_module(name)}.bias" for name in weights}
    # PEFT adds biases to all layers of an adapter or to none
    biased = restore != "none" and all(bias in names.planned for bias in biases.values())
    targets = tuple(
        Target(
            _module(name),
            Group((tensor,)),
            next(place for place, (i, _) in enumerate(tensor.inputs) if i == position),
            names.architecture.slots[name].transposed,
            names.planned[biases[name]] if biased else None,
        )
        for name, tensor in weights.items()
    )
    held = {*weights, *(biases.values() if biased else ())}
    others = [name for name in names.planned if name not in held]
    needed = {name for name in others if centre == "base" and names.planned[name].base_input is None}
    restored = _restored(names, others, {target.module for target in targets}, restore, needed)
    heads = _heads(plan, model, leaves=restore == "none")
    saved = {module: {name: names.sources[name] for name in names.under(module)} for module in (*restored, *heads)}
    kept = {name for module in restored for name in saved[module]}
    left_out = tuple(names.planned[name] for name in others if name not in kept)
    kind = names.architecture.class_name
    return Outline(model.name, position, model, kind, targets, saved, tuple(heads), left_out)


def _names(plan: Plan, position: int) -> _Names:
    """Name a model's tensors as its task's class does, or as the centre's where it has no head."""
    model = plan.models[position]
    mine = [(tensor, dict(tensor.inputs)[position]) for tensor in plan.tensors if position in dict(tensor.inputs)]
    changed = [(tensor, name) for tensor, name in mine if tensor.role != "base"]
    if model.name in plan.heads:
        planned = {name: tensor for tensor, name in changed}
        return _Names(model.architecture, planned, {name: name for name in model.tensors})
    planned = {tensor.name: tensor for tensor, _ in changed}
    centre = reference_architecture(plan.base, plan.models)
    return _Names(centre, planned, {tensor.name: name for tensor, name in mine})


def _is_target(architecture: Architecture, name: str, tensor: PlannedTensor) -> bool:
    slot = architecture.slots.get(name)  # a fused mixture's experts have names of their own
    return tensor.role == "low_rank" and slot is not None and slot.linear


def _restored(names: _Names, others: list[str], targets: set[str], restore: Restore, needed: set[str]) -> list[str]:
    """Return the modules that are kept whole, outermost first.

    :param needed: tensors that the centre does not have.
    """

    def is_wanted(module: str) -> bool:
        if restore == "all" or not needed.isdisjoint(names.under(module)):
            return True
        return restore == "small" and all(len(names.architecture.slots[n].shape) <= 1 for n in names.under(module))

    modules: list[str] = []
    for module in sorted({_module(name) for name in others}, key=lambda module: (module.count("."), module)):
        is_inside = any(module == outer or module.startswith(f"{outer}.") for outer in modules)
        if not is_inside and is_wanted(module) and _can_be_saved(names, module, targets):
            modules.append(module)
    return modules


def _can_be_saved(names: _Names, module: str, targets: set[str]) -> bool:
    """Whether a module can be swapped as a whole, and nothing in it is shared or an adapter's layer."""
    below = names.under(module)
    tied = {*names.architecture.tied, *names.architecture.tied.values()}
    return (
        bool(module and below)
        and all(name in names.sources and name not in tied for name in below)
        and not any(target == module or target.startswith(f"{module}.") for target in targets)
    )


def _heads(plan: Plan, model: Checkpoint, *, leaves: bool) -> list[str]:
    """Return the modules of a model's own head: as a whole, or each of its layers, which mixed batches need."""
    tensors = plan.heads.get(model.name, ())
    modules = [_module(tensor.name) if leaves else tensor.name.split(".")[0] for tensor in tensors]
    return list(dict.fromkeys(modules))


def _module(name: str) -> str:
    return name.rpartition(".")[0]
