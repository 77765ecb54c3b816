"""What a person should know about the models, and about what the merge made of them, before they trust it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from cart_hf.analysis.model import Floats, Tensor, Warned
from cart_hf.analysis.tensors import Sums, cosine_of
from cart_hf.errors import shorten
from cart_hf.plan import Plan
from cart_hf.plan.checks import TWO_MODELS
from cart_hf.tasks.labels import are_generic, plain

NEAR_DUPLICATES = 0.95
"""Cosine of two task vectors: those of different tasks are nearly orthogonal, those of two runs on one task are not,
and only two states of one run come as close as this."""

MUCH_LARGER = 5.0
"""Over the others' median: different tasks, steps and learning rates move models two or three times as far as others.
Five times as far, one of eight models is nearly four fifths of the square of their summed task vectors."""

UNMOVED = 1e-6
"""Of the base's norm: saving a model in float32 and reading it again changes nothing at all; training does more."""

OVERGROWN = 3.0
"""Over the length of the models' summed task vectors, as if these were orthogonal: every published scale, of CART as of
task arithmetic, is at most 3, and what it multiplies is no longer than that sum."""

MOSTLY_AVERAGED = 0.5
"""Of the squared length of the centred task vectors: more than this, and most of what the models differ by is outside
the matrices that the method looks at."""


def find_warnings(plan: Plan, tensors: Sequence[Tensor]) -> list[Warned]:
    """Return all that is worth a warning, the plan's own first.

    :param tensors: all that were measured.
    """
    names = [model.name for model in plan.models]
    sums = Sums.over(tensors, names)
    based = plan.base is not None
    found = [Warned("merge", text) for text in plan.warnings if text != TWO_MODELS]
    if len(names) == 2:
        found.append(Warned("two_models", TWO_MODELS, tuple(names)))
    unmoved = [name for name, growth in zip(names, sums.growth, strict=True) if based and growth < UNMOVED]
    found += [_said_unmoved(name) for name in unmoved]
    moved = [place for place, name in enumerate(names) if name not in unmoved]
    if based or len(names) > 2:  # around their average, two are opposite whatever they are
        found += _near_duplicates(cosine_of(sums.products if based else sums.centred), names, moved)
    if based:  # around the average all are pulled towards the largest: their lengths say little
        found += _much_larger(sums.update, names, moved) + _overgrown(sums)
    if plan.method.low_rank:
        found += _mostly_averaged(tensors, plan.method.title)
    return found + _other_labels(plan)


def _said_unmoved(name: str) -> Warned:
    text = (
        f"{name} is the base itself, but for its head: it adds nothing to the merge, and pulls the average to the base"
    )
    return Warned("no_update", text, (name,))


def _near_duplicates(cosine: Floats, names: Sequence[str], moved: Sequence[int]) -> list[Warned]:
    return [
        Warned(
            "near_duplicates",
            f"{names[i]} and {names[j]} are near duplicates: the cosine of their task vectors is {cosine[i, j]:.3f}, "
            "and the merge counts what they have in common twice",
            (names[i], names[j]),
        )
        for i, j in combinations(moved, 2)
        if cosine[i, j] > NEAR_DUPLICATES
    ]


def _much_larger(update: Floats, names: Sequence[str], moved: Sequence[int]) -> list[Warned]:
    found = []
    for place in moved:
        others = [float(update[other]) for other in moved if other != place]
        times = float(update[place] / np.median(others)) if others else 0.0
        if times >= MUCH_LARGER:
            median = "the others' median" if len(others) > 1 else "the other's"
            text = (
                f"{names[place]}'s update is {times:.0f}x larger than {median}: it decides most of the merge; "
                "a smaller weight would even this out"
            )
            found.append(Warned("large_update", text, (names[place],)))
    return found


def _overgrown(sums: Sums) -> list[Warned]:
    together = float(np.sqrt(np.square(sums.update).sum()))
    if sums.merged_update <= OVERGROWN * together:
        return []
    text = (
        f"the merge moved {sums.merged_update / together:.1f}x as far from the base as the sum of all updates would, "
        "were they orthogonal: the scale may be too large"
    )
    return [Warned("large_merge", text)]


def _mostly_averaged(tensors: Sequence[Tensor], method: str) -> list[Warned]:
    squares = {tensor.name: float(tensor.centred.trace()) for tensor in tensors}
    averaged = {tensor.name: squares[tensor.name] for tensor in tensors if tensor.role == "average"}
    total, outside = sum(squares.values()), sum(averaged.values())
    if not total or outside / total <= MOSTLY_AVERAGED:
        return []
    name = max(averaged, key=averaged.__getitem__)
    text = (
        f"{outside / total:.0%} of what the models differ by (squared length) lies in tensors that {method} only "
        f"averages, most of it in {name} ({averaged[name] / total:.0%}); --include adds matrices to decompose"
    )
    return [Warned("mostly_averaged", text)]


def _other_labels(plan: Plan) -> list[Warned]:
    """Find heads that fit each other's place but mean something else: a mix-up would raise no error."""
    alike: dict[tuple[object, ...], dict[str, list[str]]] = {}
    for model in plan.models:
        heads = plan.heads.get(model.name, ())
        shape = tuple(sorted((head.name, model.tensors[head.name].stored.shape) for head in heads))
        labels = model.config.get("id2label")
        if not shape or not isinstance(labels, dict) or are_generic(list(labels.values())):
            continue
        ordered = [str(labels[key]) for key in sorted(labels, key=lambda key: str(key).zfill(9))]
        alike.setdefault(shape, {})[model.name] = ordered
    return [warned for named in alike.values() for warned in _told_apart(named)]


def _told_apart(named: dict[str, list[str]]) -> list[Warned]:
    """Warn about heads of one shape.

    :param named: their labels, by model.
    """
    words = {name: tuple(plain(label) for label in labels) for name, labels in named.items()}
    if len(set(words.values())) < 2:
        return []
    swapped = [
        pair
        for pair in combinations(named, 2)
        if sorted(words[pair[0]]) == sorted(words[pair[1]]) and words[pair[0]] != words[pair[1]]
    ]
    if swapped:
        one, other = swapped[0]
        text = (
            f"the heads of {one} and {other} share their labels but not the order ({shorten(named[one])}; "
            f"{shorten(named[other])}): take each task's answers from its own head, by its own config.json"
        )
        return [Warned("label_order", text, swapped[0])]
    first, *others = named
    unlike = next(name for name in others if words[name] != words[first])
    shown = "; ".join(f"{name}: {shorten(named[name], 2)}" for name in (first, unlike))
    text = (
        f"the heads of {shorten(list(named))} share names and shapes but not labels ({shown} ...): each loads in "
        "another's place without an error, so take a task's from its own folder"
    )
    return [Warned("head_labels", text, tuple(named))]
