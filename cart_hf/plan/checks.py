"""Everything that makes a merge impossible or doubtful, found in headers and configurations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cart_hf.errors import shorten
from cart_hf.methods import Method
from cart_hf.plan.align import Aligned
from cart_hf.plan.model import PlannedTensor
from cart_hf.recipe import Recipe
from cart_hf.recipe.settings import evaluate, filters, matches_pattern
from cart_hf.sources import DTYPES, Architecture, Checkpoint

UNCHANGED = "changed by no model"  # why a tensor is copied
TWO_MODELS = "two models: their centred task vectors cancel, so CART equals the weight average for every rank and scale"
MOST_MISMATCHES = 3  # of one pair of models: a model of another width would fill the screen


def check_swapped(base: Checkpoint | None, models: Sequence[Checkpoint], problems: list[str]) -> None:
    """Notice base and models swapped: only the base has a task's head."""
    if base is None or base.architecture.shared_head:
        return
    if all(model.architecture.shared_head for model in models):
        problems.append(f"only the base ({base.architecture.class_name}) has a task head: are base and models swapped?")


def check_heads(models: Sequence[Aligned], problems: list[str]) -> None:
    """Report heads of which only a part is in the files."""
    for aligned in models:
        architecture, tensors = aligned.checkpoint.architecture, aligned.checkpoint.tensors
        modules = {name.split(".")[0] for name in aligned.head}
        absent = [
            name
            for name in architecture.slots
            if name.split(".")[0] in modules and name not in tensors and name not in architecture.tied
        ]
        if absent:
            problems.append(f"{aligned.checkpoint.name}: its head lacks {shorten(absent)}; save it again")


def check_tensors(
    base: Aligned | None, models: Sequence[Aligned], reference: Architecture, problems: list[str]
) -> None:
    """Report tensors that are missing, and shapes and kinds that differ, by tensor and model."""
    filled = {slot for aligned in models for slot in aligned.slots.values()}

    def is_hole(slot: str, aligned: Aligned) -> bool:
        # a tensor that no model has (RoBERTa's unused pooler) is the base's business; inside a block it is a hole
        return reference.slots[slot].block is not None or (aligned is not base and slot in filled)

    everyone = [*([base] if base else []), *models]
    for aligned in everyone:
        holes = [slot for slot in sorted(aligned.missing) if is_hole(slot, aligned)]
        if holes:
            count = "a tensor is" if len(holes) == 1 else f"{len(holes)} tensors are"
            problems.append(
                f"{aligned.checkpoint.name}: {count} missing: {shorten(holes)}; "
                "the checkpoint is incomplete, save it again"
            )
    mismatches: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(name for aligned in everyone for name in aligned.backbone):
        first, *others = [aligned for aligned in everyone if name in aligned.backbone]
        for other in others:
            problem = _mismatch(name, first, other)
            if problem:
                mismatches.setdefault((first.checkpoint.name, other.checkpoint.name), []).append(problem)
    for (one, two), found in mismatches.items():
        problems.extend(found[:MOST_MISMATCHES])
        if len(found) > MOST_MISMATCHES:
            problems.append(f"and {len(found) - MOST_MISMATCHES} more tensors of {two} do not fit those of {one}")


def _mismatch(name: str, one: Aligned, other: Aligned) -> str | None:
    a, b = one.stored(name), other.stored(name)
    names = one.checkpoint.name, other.checkpoint.name
    sizes = f"{list(a.shape)} in {names[0]} and {list(b.shape)} in {names[1]}"
    if a.shape != b.shape:
        if "embed" in name and "position" not in name and len(a.shape) == 2 and a.shape[1:] == b.shape[1:]:
            return (
                f"tensor '{name}' is {sizes}: the vocabularies have {a.shape[0]} and {b.shape[0]} tokens; "
                "merge models that kept the base's tokenizer"
            )
        return f"tensor '{name}' has shape {sizes}; merge fine-tunes of one pretrained model"
    if a.is_floating != b.is_floating:
        return f"tensor '{name}' is {a.dtype} in {names[0]} and {b.dtype} in {names[1]}; save both in one type"
    return None


def check_patterns(recipe: Recipe, method: Method, tensors: Sequence[PlannedTensor], problems: list[str]) -> None:
    """Report patterns and filters that match no tensor: they are typing mistakes."""
    names = [(tensor.name, tensor.key) for tensor in tensors]
    example = next((t.name for t in tensors if t.is_whole), tensors[-1].name)
    if recipe.include and not method.matrices:
        problems.append(f"include: {method.name} is not about matrices, it already acts on every tensor; leave it out")
    for place, patterns in (("include", recipe.include), ("exclude", recipe.exclude)):
        for pattern in patterns:
            if not any(matches_pattern(pattern, pair) for pair in names):
                problems.append(f"{place}: '{pattern}' matches no tensor; names look like {example}")
    scopes: list[tuple[str, Mapping[str, Any]]] = [("parameters", recipe.parameters)]
    scopes += [(f"{entry.name}: parameters", entry.parameters) for entry in recipe.models]
    for place, parameters in scopes:
        for key, setting in parameters.items():
            for wanted in filters(setting):
                if not any(evaluate({"filter": wanted, "value": True}, pair, 0.0) for pair in names):
                    problems.append(f"{place}.{key}: filter '{wanted}' matches no tensor; names look like {example}")


def check_matrices(method: Method, tensors: Sequence[PlannedTensor], problems: list[str]) -> None:
    """Refuse a method on matrices that would act on nothing: it would silently be an average."""
    if not method.matrices or any(tensor.is_whole for tensor in tensors):
        return
    unchanged = sum(tensor.reason == UNCHANGED for tensor in tensors)
    kind = "low-rank" if method.low_rank else method.name
    if unchanged:
        problems.append(
            f"{method.name} has nothing to decompose: the adapters change {len(tensors) - unchanged} tensors, and none "
            "is a Linear weight in encoder blocks; use --method average"
        )
    else:
        problems.append(
            f"{method.name} found no Linear weight in encoder blocks ({kind}: 0 of {len(tensors)} tensors), "
            "so it would only average; name the matrices with --include, or use --method average"
        )


def check_weights(method: Method, tensors: Sequence[PlannedTensor], problems: list[str]) -> None:
    """Refuse weights that sum to zero where the method divides by their sum."""
    for tensor in tensors:
        weights = tensor.parameters.get("weight")
        divides = tensor.is_whole or tensor.role == "average" or tensor.parameters.get("normalize")
        if tensor.role == "average" and method.name == "average":
            divides = tensor.parameters.get("normalize")
        if weights and divides and abs(sum(weights)) <= 1e-9 * max(map(abs, weights)):
            problems.append(
                f"the models' weights for tensor '{tensor.name}' sum to zero ({weights}); "
                "give others (--weights, or weight in the recipe)"
            )
            return


def warnings_for(
    recipe: Recipe,
    method: Method,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    heads: Collection[str],
    tensors: Sequence[PlannedTensor],
) -> list[str]:
    """Return what the user should know although the merge is possible."""
    warnings = []
    if method.name == "cart" and len(models) == 2 and recipe.coefficients is None:
        warnings.append(TWO_MODELS)
    stored = {models[i].tensors[name].stored for tensor in tensors for i, name in tensor.inputs}
    types = sorted({s.dtype for s in stored if DTYPES[s.dtype].is_floating_point})
    if len(types) > 1:
        warnings.append(f"the models' weights are stored in different types ({', '.join(types)})")
    warnings += [
        f"{model.name} is an adapter of {model.adapts.reference}, and not of the base, {base.reference}: "
        "where these two differ, that is merged too"
        for model in models
        if base is not None and model.adapts is not None and model.adapts is not base
    ]
    headless = [model.name for model in models if model.name not in heads and not model.architecture.shared_head]
    if headless:
        warnings.append(f"{shorten(headless)}: the files hold no head, so tasks/NAME is not written")
    vocabularies = {checkpoint.name: _vocabulary(checkpoint) for checkpoint in (*([base] if base else []), *models)}
    known = {name: text for name, text in vocabularies.items() if text is not None}
    first = next(iter(known), None)
    different = [name for name, text in known.items() if first is not None and text != known[first]]
    if different:
        warnings.append(
            f"the vocabulary of {shorten(different)} differs from that of {first}; is it the same tokenizer?"
        )
    return warnings


def _vocabulary(checkpoint: Checkpoint) -> str | None:
    """Return a checkpoint's vocabulary file as text, if it has one of the plain kinds."""
    for name in ("vocab.txt", "vocab.json"):
        for folder in checkpoint.folders:
            path = folder / name
            if path.is_file():
                return name + path.read_text(encoding="utf-8")
    return None
