"""Aligning checkpoints: which tensor of each model is which tensor of the merged one, and which are its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cart_hf.errors import shorten
from cart_hf.sources import Architecture, Checkpoint, StoredTensor, describe, renamed


@dataclass(frozen=True)
class Aligned:
    """A checkpoint seen from the merged model.

    :param checkpoint: the checkpoint.
    :param backbone: canonical name -> the tensor's name in the checkpoint.
    :param slots: canonical name -> the merged architecture's slot it fills (the same name, but for fused experts).
    :param head: names of the tensors of its own head.
    :param missing: slots that its class has and its files do not fill.
    :param prefix: what its file keys put before the merged model's names (``roberta.``), if it wraps that model.
    """

    checkpoint: Checkpoint
    backbone: Mapping[str, str]
    slots: Mapping[str, str]
    head: tuple[str, ...]
    missing: frozenset[str]
    prefix: str

    def stored(self, name: str) -> StoredTensor:
        """Return the header entry of the tensor with canonical name ``name``."""
        return self.checkpoint.tensors[self.backbone[name]].stored

    def key(self, name: str) -> str:
        """Return the file key of the tensor with canonical name ``name``."""
        return self.checkpoint.tensors[self.backbone[name]].key


def reference_architecture(base: Checkpoint | None, models: Sequence[Checkpoint]) -> Architecture:
    """Return the architecture of the merged model.

    When base and models are all of one class whose output layer means the same in each (a language model's, CLIP's
    projections), that class is merged whole. Otherwise heads are task-private and the bare model is merged.
    """
    anchor = base or models[0]
    classes = {c.architecture.class_name for c in (anchor, *models)}
    if len(classes) == 1 and anchor.architecture.shared_head:
        return anchor.architecture
    return describe(anchor.config, str(anchor.reference), bare=True)


def align(checkpoint: Checkpoint, reference: Architecture, anchor: str, problems: list[str]) -> Aligned:
    """Align one checkpoint with the merged model's architecture.

    :param anchor: the name of the model whose architecture that is: the base, or the first model.
    :param problems: receives a line for each thing that does not fit.
    """
    mine = checkpoint.architecture
    paths = reference.path_of(mine)
    who = f"{checkpoint.name} ({mine.class_name})"
    if not paths:
        problems.append(
            f"{who} is another architecture than {anchor} ({reference.class_name}); "
            "cart-hf merges fine-tunes of one pretrained model"
        )

    def canonical(name: str) -> str:
        """Rename the sub-models that both share; return "" for what the merged model has no room for."""
        here = renamed(name, paths)
        if here is not None:
            return here
        return name if name in reference.slots else ""

    backbone: dict[str, str] = {}
    slots: dict[str, str] = {}
    outside: list[str] = []
    surplus: list[str] = []
    for name, tensor in checkpoint.tensors.items():
        slot, here = canonical(tensor.slot), canonical(name)
        if here and slot in reference.slots:
            backbone[here], slots[here] = name, slot
        elif here or mine.bare:  # a tensor of the shared part itself, such as another layer's
            surplus.append(name)
        else:
            outside.append(name)
    differing = _differing_settings(mine, reference, paths)
    for key, ours, theirs in differing:
        problems.append(f"{who} has {key} {ours!r} where {anchor} has {theirs!r}: another architecture")
    if surplus and paths and not differing:  # else the surplus only follows
        problems.append(
            f"{who} has {len(surplus)} tensor{'s' * (len(surplus) > 1)} that {anchor} ({reference.class_name}) lacks: "
            f"{shorten(surplus)}; are they fine-tunes of one model, and is the base the whole of it?"
        )
    expected = {canonical(slot) for slot in mine.slots if slot not in mine.tied} & set(reference.slots)
    # its class may do without a pooler, but not without a block
    shared = {here: here for here in paths.values()}
    blocks = {name for name, slot in reference.slots.items() if slot.block and renamed(name, shared) is not None}
    expected |= blocks - set(reference.tied)
    missing = frozenset(expected - set(slots.values()))
    prefix = next((f"{path}." for path, here in paths.items() if path and not here), "")
    return Aligned(checkpoint, backbone, slots, tuple(outside), missing, prefix)


def _differing_settings(
    mine: Architecture, reference: Architecture, paths: Mapping[str, str]
) -> list[tuple[str, object, object]]:
    """Compare what the shared sub-models compute, as far as shapes do not tell: heads, activations, norms."""
    differences: list[tuple[str, object, object]] = []
    for path, settings in mine.settings.items():
        here = renamed(path, paths)
        theirs = {} if here is None else reference.settings.get(here, {})
        differences += [(key, value, theirs[key]) for key, value in settings.items() if theirs.get(key, value) != value]
    return [difference for i, difference in enumerate(differences) if difference not in differences[:i]]
