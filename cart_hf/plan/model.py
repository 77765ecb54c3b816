"""The plan's data: plain records, made by `build`, carried out by `merge`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cart_hf.methods import Method
from cart_hf.methods.wrappers import Wrapper
from cart_hf.plan.coefficients import Coefficients, Learnt, as_float32
from cart_hf.recipe import Recipe
from cart_hf.sources import Block, Checkpoint, element_size

Role = Literal["low_rank", "matrix", "elementwise", "average", "base"]
ROLES: tuple[Role, ...] = get_args(Role)
WHOLE = ("low_rank", "matrix")  # roles of what is merged a whole matrix at a time
CHUNK = 2**20  # elements of one tensor that are one piece of element-wise work


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the merged model.

    :param name: its canonical name: the base architecture's module name, without the class's prefix.
    :param key: its key in the output file.
    :param dtype: its type in the output, as safetensors calls it.
    :param shape: its shape.
    :param role: ``low_rank`` (the method, on the whole matrix, of which it keeps some directions), ``matrix`` (the
        method, on the whole matrix), ``elementwise`` (the method, entry by entry), ``average``, or ``base`` (copied).
    :param reason: why it has this role, for people.
    :param inputs: for each model that has it, the model's place in the plan and the tensor's name there.
    :param base_input: its name in the base, if the base has it.
    :param parameters: the method's parameters for this tensor: scalars, and one list per per-model parameter.
    :param rank: directions kept (``low_rank`` only; None when ``energy`` decides).
    :param energy: share of the squared singular values kept, when that decides the rank.
    :param group: tensors of one group are stacked row-wise and merged as one matrix (fused q, k, v).
    :param linear: whether it is the weight of a Linear in an encoder block.
    :param transposed: whether that is stored as (in, out), as GPT-2's Conv1D has it.
    :param block: the encoder block it lies in; None outside of them.
    :param wrapped: whether a wrapper recomputes its update as a whole matrix.
    :param tasks: the models with a head whose class has it: their ``tasks/NAME`` share the file it lies in.
    """

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    reason: str
    inputs: tuple[tuple[int, str], ...]
    base_input: str | None
    parameters: Mapping[str, Any]
    rank: int | None = None
    energy: float | None = None
    group: str = ""
    tasks: tuple[str, ...] = ()
    linear: bool = False
    transposed: bool = False
    block: Block | None = None
    wrapped: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes in the output."""
        return self.elements * element_size(self.dtype)

    @property
    def is_whole(self) -> bool:
        """Whether the method works on it as a whole matrix."""
        return self.role in WHOLE

    @property
    def weights(self) -> list[float]:
        """The models' weights, in the order of the inputs; equal ones where the method takes none."""
        given: list[float] = self.parameters.get("weight", [1.0] * len(self.inputs))
        return given

    @property
    def has_update(self) -> bool:
        """Whether there is a base that the merged tensor differs from, by more than a copy does."""
        return self.role != "base" and self.base_input is not None

    @property
    def row(self) -> int:
        """Number of elements of a row."""
        return self.elements // max(self.shape[0], 1) if len(self.shape) > 1 else self.elements


@dataclass(frozen=True)
class HeadTensor:
    """A tensor of one task's own head, carried along unchanged.

    :param key: its key in the output file.
    :param name: its name in the model's checkpoint.
    """

    key: str
    name: str


@dataclass(frozen=True)
class Group:
    """Tensors that are merged in one call: one, or the fused q, k, v of an attention layer."""

    tensors: tuple[PlannedTensor, ...]

    @property
    def name(self) -> str:
        """What to call it."""
        return self.tensors[0].group or self.tensors[0].name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stacked matrix."""
        first = self.tensors[0].shape
        return first if len(self.tensors) == 1 else (sum(t.shape[0] for t in self.tensors), *first[1:])

    @property
    def is_whole(self) -> bool:
        """Whether the method works on it as a whole matrix."""
        return self.tensors[0].is_whole


@dataclass(frozen=True)
class Wrapping:
    """A wrapper, and what it is told."""

    wrapper: Wrapper
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """Everything a merge will do, decided from headers and configurations.

    :param recipe: what was asked.
    :param method: its method.
    :param base: the base checkpoint, if the recipe names one.
    :param models: the fine-tuned checkpoints, in the recipe's order.
    :param output_class: the model class of the output folder.
    :param output_config: the output folder's ``config.json``.
    :param tensors: the merged model's tensors.
    :param heads: the head tensors of each model that has any, by task name.
    :param warnings: what the user should know.
    :param coefficients: those that were learnt, if the recipe names any.
    :param wrappings: what is done to the method's result.
    """

    recipe: Recipe
    method: Method
    base: Checkpoint | None
    models: tuple[Checkpoint, ...]
    output_class: str
    output_config: Mapping[str, Any]
    tensors: tuple[PlannedTensor, ...]
    heads: Mapping[str, tuple[HeadTensor, ...]]
    warnings: tuple[str, ...]
    coefficients: Coefficients | None = None
    wrappings: tuple[Wrapping, ...] = ()

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The base, if there is one, and the models."""
        return (self.base, *self.models) if self.base is not None else self.models

    @property
    def loader(self) -> str:
        """The transformers class that people load the output with."""
        return "CLIPModel" if self.output_class == "CLIPModel" else "AutoModel"

    @property
    def first_task(self) -> tuple[str, str] | None:
        """The name and the class of the first task with a head, to show how tasks are loaded."""
        for model in self.models:
            if model.name in self.heads:
                return model.name, model.architecture.class_name
        return None

    def count(self, role: Role) -> int:
        """Return how many tensors have ``role``."""
        return sum(t.role == role for t in self.tensors)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each role that any has."""
        return {role: count for role in ROLES if (count := self.count(role))}

    def groups(self) -> Iterator[Group]:
        """Yield the groups of tensors that are merged together."""
        groups: dict[str, list[PlannedTensor]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.group or tensor.name, []).append(tensor)
        return (Group(tuple(tensors)) for tensors in groups.values())

    def arguments_of(self, tensor: PlannedTensor) -> dict[str, Any]:
        """Return the parameters that the method's function takes for a tensor."""
        planning = {p.name for p in self.method.parameters if p.planning}
        return {name: value for name, value in tensor.parameters.items() if name not in planning}

    def own_coefficients(self, group: Group) -> list[float] | None:
        """Return what the method multiplies each model's term with; None where it has no such terms."""
        first, linear = group.tensors[0], self.method.linear
        averaged = first.role == "average" and self.method.matrices  # its terms cancel, unless others are learnt
        if linear is None or not (averaged or group.is_whole or first.role == "elementwise"):
            return None
        return linear.coefficients(**first.parameters)

    def learnt(self, group: Group) -> Learnt | None:
        """Return what was learnt for a tensor (or fused group); None where that is what the method does by itself."""
        own = self.own_coefficients(group) if self.coefficients is not None else None
        if self.coefficients is None or own is None:
            return None
        found = self.coefficients.of(group.name, tuple(self.models[i].name for i, _ in group.tensors[0].inputs))
        if found is None or (found.mask is None and found.values == as_float32(own)):
            return None
        return found

    @property
    def arithmetic(self) -> Literal["float32", "float64"]:
        """The type that everything is computed in."""
        return "float64" if self.recipe.dtype == "float64" else "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of the merged backbone."""
        return sum(t.nbytes for t in self.tensors)

    def memory(self, workers: int) -> int:
        """Estimate the peak bytes of tensors held by ``workers`` workers, besides the libraries themselves."""
        size = 8 if self.arithmetic == "float64" else 4
        models = len(self.models) + 2  # the base or the sum, and the result

        def of(group: Group) -> int:
            first = group.tensors[0]
            elements = math.prod(group.shape)
            if not (group.is_whole or first.wrapped):
                return models * min(elements, CHUNK) * size
            small, large = sorted(group.shape)
            kept = min(first.rank or small, small)
            # the stack, the Gram matrix and its factors in float64, and all the bases and coordinates
            inner = first.shape[0 if first.transposed else 1]
            moments = 6 * inner * inner * 8 if first.role == "matrix" else 0  # as measured: ACE has the most
            return (
                moments
                + models * elements * size
                + (4 * small * small + large * small) * 8
                + models * kept * (small + large) * size
            )

        return workers * max((of(group) for group in self.groups()), default=0)
