"""Making the plan: role, rank, parameters and file key of every tensor, from headers alone, all problems at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cart_hf.errors import UserError
from cart_hf.methods import Method, get_method
from cart_hf.methods.registry import BUILT_IN
from cart_hf.methods.wrappers import get_wrapper
from cart_hf.plan import checks
from cart_hf.plan.align import Aligned, align, reference_architecture
from cart_hf.plan.coefficients import Coefficients
from cart_hf.plan.model import WHOLE, HeadTensor, Plan, PlannedTensor, Role, Wrapping
from cart_hf.recipe import Recipe
from cart_hf.recipe.settings import evaluate, matches_pattern
from cart_hf.sources import DTYPES, Architecture, Checkpoint, dtype_name

# The names under which an attention layer keeps its query, key and value projections.
QKV_NAMES = (
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"query_proj", "key_proj", "value_proj"},
    {"q_lin", "k_lin", "v_lin"},
    {"q", "k", "v"},
)


@dataclass(frozen=True)
class _Context:
    """What the planning of every tensor shares."""

    recipe: Recipe
    method: Method
    reference: Architecture
    base: Aligned | None
    models: tuple[Aligned, ...]

    @property
    def headed(self) -> list[Aligned]:
        """The models with a head of their own."""
        return [aligned for aligned in self.models if aligned.head]


def make_plan(recipe: Recipe, base: Checkpoint | None, models: Sequence[Checkpoint]) -> Plan:
    """Decide what happens to every tensor.

    :raises UserError: with every problem: other architectures, shapes that differ, missing tensors, patterns and
        filters that match nothing, no Linear weight left to decompose.
    """
    method = get_method(recipe.merge_method)
    reference = reference_architecture(base, models)
    problems: list[str] = []
    context = _Context(
        recipe,
        method,
        reference,
        align(base, reference, base.name, problems) if base else None,
        tuple(align(model, reference, (base or models[0]).name, problems) for model in models),
    )
    checks.check_swapped(base, models, problems)
    checks.check_heads(context.models, problems)
    if not problems:  # else every tensor would be reported
        checks.check_tensors(context.base, context.models, reference, problems)
    if problems:
        raise UserError(problems)
    everyone = [*([context.base] if context.base else []), *context.models]
    names = dict.fromkeys(name for aligned in everyone for name in aligned.backbone)
    tensors = _fuse_qkv([_plan_tensor(context, name) for name in names])
    checks.check_patterns(recipe, method, tensors, problems)
    checks.check_weights(method, tensors, problems)
    checks.check_matrices(method, tensors, problems)
    coefficients = Coefficients.load(Path(recipe.coefficients)) if recipe.coefficients is not None else None
    if coefficients is not None:
        problems += coefficients.problems(method.name, [m.name for m in models], [t.group or t.name for t in tensors])
    if problems:
        raise UserError(problems)
    if coefficients is not None:
        tensors = [_with_learnt_rank(tensor, coefficients) for tensor in tensors]
    heads = {
        aligned.checkpoint.name: tuple(HeadTensor(aligned.checkpoint.tensors[n].key, n) for n in aligned.head)
        for aligned in context.headed
    }
    return Plan(
        recipe=recipe,
        method=method,
        base=base,
        models=tuple(models),
        output_class=reference.class_name,
        output_config=_output_config(base or models[0], reference, tensors),
        tensors=tuple(tensors),
        heads=heads,
        warnings=tuple(checks.warnings_for(recipe, method, base, models, heads, tensors)),
        coefficients=coefficients,
        wrappings=tuple(Wrapping(get_wrapper(name), told) for name, told in recipe.wrap.items()),
    )


def _plan_tensor(context: _Context, name: str) -> PlannedTensor:
    owners = [(i, model) for i, model in enumerate(context.models) if name in model.backbone]
    if not context.method.ordered:
        # Merging in the order of names, whatever the recipe's order, gives the same bytes for every order.
        owners.sort(key=lambda owner: owner[1].checkpoint.name)
    base = context.base if context.base and name in context.base.backbone else None
    first = owners[0][1] if owners else base
    assert first is not None  # every planned name comes from the base or a model
    stored, slot = first.stored(name), first.slots[name]
    place = context.reference.slots[slot]
    block = place.block
    key = _file_key(context, name, owners, base)
    role, reason = _role(context, (name, key), slot, has_models=bool(owners), has_base=base is not None)
    parameters = _parameters(context, (name, key), block.position if block else 0.0, [i for i, _ in owners])
    if not stored.is_floating:
        role, reason = "base", "not floating-point: copied"
    elif _is_unchanged(context, name, owners, base, parameters):
        role, reason = "base", checks.UNCHANGED
    elif role in WHOLE and (len(stored.shape) != 2 or not stored.elements):
        role, reason = "average", "not a matrix"
    elif role in WHOLE and context.method.needs_base and base is None:
        role, reason = "average", "not in the base"
    donors = [model for _, model in owners] or [first]
    linear = len(stored.shape) == 2 and _why_no_matrix(context.reference, slot) is None
    by_matrix = any(get_wrapper(wrapper).matrix is not None for wrapper in context.recipe.wrap)
    tensor = PlannedTensor(
        name=name,
        key=key,
        dtype=_output_dtype(context.recipe, [donor.stored(name).dtype for donor in donors]),
        shape=stored.shape,
        role=role,
        reason=reason,
        inputs=tuple((i, model.backbone[name]) for i, model in owners),
        base_input=base.backbone[name] if base else None,
        parameters=parameters,
        tasks=tuple(model.checkpoint.name for model in context.headed if name in model.backbone),
        linear=linear,
        transposed=place.transposed,
        block=block,
        wrapped=by_matrix and linear and role != "base" and base is not None,
    )
    return _with_rank(tensor) if role == "low_rank" else tensor


def _file_key(context: _Context, name: str, owners: Sequence[tuple[int, Aligned]], base: Aligned | None) -> str:
    """Name the tensor on disk as a model with a head does: its class and the bare one both read that name."""
    for _, model in owners:
        if model.head:
            return model.key(name)
    if base is None:
        return owners[0][1].key(name)
    prefix = next((model.prefix for model in context.headed if model.prefix), "")
    key = base.key(name)
    return key if key.startswith(prefix) else prefix + key


def _role(
    context: _Context, names: tuple[str, str], slot_name: str, *, has_models: bool, has_base: bool
) -> tuple[Role, str]:
    """Decide what happens to a floating tensor, and say why."""
    recipe, method = context.recipe, context.method
    if not has_models:
        return "base", "in the base only"
    excluded = next((p for p in recipe.exclude if matches_pattern(p, names)), None)
    if excluded is not None:
        return "average", f"excluded by '{excluded}'"
    if method.matrices:
        whole: Role = "low_rank" if method.low_rank else "matrix"
        included = next((p for p in recipe.include if matches_pattern(p, names)), None)
        if included:
            return whole, f"included by '{included}'"
        other = _why_no_matrix(context.reference, slot_name)
        return ("average", other) if other else (whole, f"Linear in {_block_path(context.reference, slot_name)}")
    if method.name == "average":
        return "average", "average"
    return ("elementwise", method.name) if has_base or not method.needs_base else ("average", "not in the base")


def _is_unchanged(
    context: _Context,
    name: str,
    owners: Sequence[tuple[int, Aligned]],
    base: Aligned | None,
    parameters: Mapping[str, Any],
) -> bool:
    """Whether all models are adapters of one base, none changes this tensor of it, and so the merge does not either.

    A plain sum of the models is no such merge. Fused with others that change, it is a part of what changes; and where
    entries are trimmed by their magnitudes in the whole model, its zeros count.
    """
    method = context.method
    is_sum = method.name == "average" and not parameters.get("normalize", True)
    if not owners or is_sum or parameters.get("fuse_qkv") or method.survey:
        return False
    if method.name not in BUILT_IN:  # a user's own may do anything
        return False
    if any(model.checkpoint.adapts is None for _, model in owners) or (context.base is not None and base is None):
        return False
    everyone = [model for _, model in owners] + ([base] if base else [])
    parts = [model.checkpoint.part(model.backbone[name]) for model in everyone]
    return all(part.change is None for part in parts) and len({(part.file, part.key) for part in parts}) == 1


def _why_no_matrix(reference: Architecture, slot_name: str) -> str | None:
    """Say why a tensor is not one of the blocks' Linear weights; None when it is."""
    slot = reference.slots[slot_name]
    if len(slot.shape) < 2:
        return "not a matrix"
    if slot.block is None:
        return "outside the encoder blocks"
    # a slot of three dimensions is a mixture's fused experts: the files hold one Linear weight for each
    return None if slot.linear or len(slot.shape) == 3 else "not a Linear weight"


def _block_path(reference: Architecture, slot_name: str) -> str:
    block = reference.slots[slot_name].block
    return block.path if block else ""


def _parameters(context: _Context, names: tuple[str, str], position: float, models: Sequence[int]) -> dict[str, Any]:
    """Evaluate every parameter for one tensor: the model's own setting, else the recipe's, else the default."""
    values: dict[str, Any] = {}
    for parameter in context.method.parameters:
        given = evaluate(context.recipe.parameters.get(parameter.name), names, position)
        shared: Any = parameter.default if given is None else given
        if not parameter.per_model:
            values[parameter.name] = round(shared) if parameter.kind == "integer" and shared is not None else shared
            continue
        own = [evaluate(context.recipe.models[i].parameters.get(parameter.name), names, position) for i in models]
        values[parameter.name] = [shared if value is None else value for value in own]
    return values


def _with_rank(tensor: PlannedTensor) -> PlannedTensor:
    """Settle the rank of a low-rank tensor from ``energy``, ``rank`` or ``rank_ratio``."""
    given: Mapping[str, Any] = tensor.parameters
    if given.get("energy") is not None:
        return replace(tensor, energy=given["energy"], rank=None)
    smaller = min(tensor.shape)
    if given.get("rank") is not None:
        return replace(tensor, rank=min(given["rank"], smaller))
    ratio = given.get("rank_ratio") or 1 / len(tensor.inputs)  # every task the same share of all directions
    return replace(tensor, rank=max(1, int(ratio * smaller)))


def _with_learnt_rank(tensor: PlannedTensor, coefficients: Coefficients) -> PlannedTensor:
    """Settle the rank of a matrix of which some directions were chosen: as many as there were to choose from."""
    mask = coefficients.masks.get(tensor.group or tensor.name)
    return tensor if mask is None else replace(tensor, rank=mask.shape[1], energy=None)


def _fuse_qkv(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """Group the query, key and value weights of each attention layer where ``fuse_qkv`` asks for it."""
    layers: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        if tensor.is_whole and tensor.parameters.get("fuse_qkv"):
            layers.setdefault(_module(tensor)[0], []).append(tensor)
    fused: dict[str, PlannedTensor] = {}
    for parent, members in layers.items():
        qkv = [t for t in members if any(_module(t)[1] in names for names in QKV_NAMES)]
        if {_module(t)[1] for t in qkv} not in QKV_NAMES or len({t.shape[1] for t in qkv}) != 1:
            continue
        stacked = (sum(t.shape[0] for t in qkv), qkv[0].shape[1])
        for member in qkv:
            rank = _with_rank(replace(member, shape=stacked)).rank
            fused[member.name] = replace(member, group=f"{parent}.qkv", rank=rank, reason="Linear, q/k/v fused")
    return [fused.get(tensor.name, tensor) for tensor in tensors]


def _module(tensor: PlannedTensor) -> tuple[str, str]:
    """Split a weight's name into its module's parent and its module's own name."""
    parent, _, leaf = tensor.name.removesuffix(".weight").rpartition(".")
    return parent, leaf


def _output_dtype(recipe: Recipe, stored: Sequence[str]) -> str:
    """Return the output type of a tensor: as the recipe says, else the inputs' own (the wider, where they differ)."""
    if not DTYPES[stored[0]].is_floating_point:
        return stored[0]
    wanted = recipe.out_dtype or (recipe.dtype if recipe.dtype in ("bfloat16", "float16") else None)
    if wanted:
        return dtype_name(getattr(torch, wanted))
    result = DTYPES[stored[0]]
    for name in stored[1:]:
        result = torch.promote_types(result, DTYPES[name])
    return dtype_name(result)


def _output_config(anchor: Checkpoint, reference: Architecture, tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
    """Return the output's ``config.json``: the base's, for the merged class and the type of most of its numbers."""
    floating = [tensor for tensor in tensors if DTYPES[tensor.dtype].is_floating_point]
    largest = DTYPES[max(floating, key=lambda tensor: tensor.elements).dtype]
    config = {key: value for key, value in anchor.config.items() if key not in ("_name_or_path", "torch_dtype")}
    return config | {"architectures": [reference.class_name], "dtype": str(largest).removeprefix("torch.")}
