"""Architectures, known without weights: what the tensors of a model class are.

File keys are not module names (CLIP's vision prefix, ViT, fused experts), and transformers reverses on saving whatever
renaming it did on loading. So file keys are mapped to module names by transformers' own rules, and two classes of one
family (RobertaForMaskedLM, RobertaForSequenceClassification) are aligned by the sub-models they share.

What transformers tells of an architecture is kept in our cache, so that a second merge need not import its modelling
code, which takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cart_hf.cache import cache_folder, keep, recall
from cart_hf.errors import UserError

NAMES_ONLY = ("_name_or_path", "finetuning_task", "transformers_version")


@dataclass(frozen=True)
class Block:
    """Where a tensor stands among the repeated blocks of its tower.

    :param path: the module list, such as ``encoder.layer``.
    :param index: the block's place in it, from 0.
    :param count: how many blocks it has.
    """

    path: str
    index: int
    count: int

    @property
    def position(self) -> float:
        """0 for the first block, 1 for the last (and for a single one), as mergekit's gradients count."""
        return self.index / (self.count - 1) if self.count > 1 else 1.0


@dataclass(frozen=True)
class Slot:
    """A tensor that an architecture has room for.

    :param shape: its shape.
    :param linear: whether it is the weight of a linear layer (nn.Linear or GPT-2's Conv1D).
    :param block: its block, or None outside the blocks.
    :param transposed: whether it is stored as (in, out), as a Conv1D's weight is.
    """

    shape: tuple[int, ...]
    linear: bool
    block: Block | None
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model class with a configuration.

    :param class_name: the class.
    :param shared_head: whether it has no head, or one over a shared vocabulary or space: not a task's own classifier.
    :param bare: whether it is what ``AutoModel`` builds: no head at all.
    :param slots: its tensors by name.
    :param tied: tensors that are others' copies -> those.
    :param submodels: class name of every sub-model by path; "" is the model itself.
    :param settings: what each sub-model computes with its tensors, as far as their shapes do not tell.
    :param structure, wanted: the configuration, and the class that was asked for.
    """

    class_name: str
    shared_head: bool
    bare: bool
    slots: Mapping[str, Slot]
    tied: Mapping[str, str]
    submodels: Mapping[str, str]
    settings: Mapping[str, Mapping[str, Any]]
    structure: str = field(repr=False)
    wanted: str = field(repr=False)

    def module_names(self, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Map a checkpoint's file keys to (module name, slot), see :func:`cart_hf.sources.modelling.module_names`."""
        keys = sorted(keys)
        known = _known(self.structure, self.wanted, keys)
        return {key: (name, slot) for key, (name, slot) in known.items()}

    def path_of(self, other: Architecture) -> dict[str, str]:
        """Say which sub-models of ``other`` are this architecture's: {path in other: path here}, outermost first.

        A path stands for everything below it. Sub-models match by class; among several of one class (T5's two
        stacks), by class and path.
        """
        found: dict[str, str] = {}
        for path, kind in other.submodels.items():
            if renamed(path, found) is not None:
                continue
            here = [p for p, k in self.submodels.items() if k == kind]
            if here:
                found[path] = path if path in here else here[0]
        return found


def describe(config: Mapping[str, Any], label: str, *, bare: bool = False) -> Architecture:
    """Describe the architecture of a ``config.json``: as our cache knows it, or as transformers builds it.

    :param config: the parsed ``config.json``.
    :param label: whose it is, for messages.
    :param bare: the model without any head (what ``AutoModel`` builds), whatever ``architectures`` says.
    :raises UserError: when transformers does not know it, or it needs remote code or is quantised.
    """
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{label}: config.json names no model_type; cart-hf merges transformers models")
    quantization = config.get("quantization_config")
    if quantization:
        kind = quantization.get("quant_method", "?") if isinstance(quantization, Mapping) else quantization
        raise UserError(f"{label} is quantised ({kind}); merge the full-precision weights")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{label}: architectures in config.json must be a list of class names, not {names!r}")
    # names of models and runs do not change the structure: leave them out of the cache's key
    structural = {key: value for key, value in config.items() if key not in NAMES_ONLY}
    try:
        return _described(json.dumps(structural, sort_keys=True, default=str), "" if bare or not names else names[0])
    except UserError as failure:
        raise UserError([f"{label}: {problem}" for problem in failure.problems]) from failure


def task_class(model_type: str, task_type: str) -> str | None:
    """Return the class that PEFT's task type (``SEQ_CLS``) means for a kind of model (``roberta``), if there is one."""
    place = _place(model_type, task_type, None)
    known = recall(place) if place else None
    if known is None:
        from cart_hf.sources import modelling

        known = {"class": modelling.task_class(model_type, task_type)}
        if place:
            keep(place, known)
    found: str | None = known["class"]
    return found


def renamed(name: str, paths: Mapping[str, str]) -> str | None:
    """Rename what lies at or under one of ``paths`` ({path: new path}, "" for the root); None for what does not."""
    for path, new in paths.items():
        if path == "" or name == path or name.startswith(f"{path}."):
            rest = name.removeprefix(path).removeprefix(".")
            return ".".join(part for part in (new, rest) if part)
    return None


@cache
def _described(structure: str, wanted: str) -> Architecture:
    data = _known(structure, wanted)
    slots = {
        name: Slot(
            tuple(slot["shape"]), slot["linear"], Block(**slot["block"]) if slot["block"] else None, slot["transposed"]
        )
        for name, slot in data["slots"].items()
    }
    return Architecture(**data | {"slots": slots}, structure=structure, wanted=wanted)


def _known(structure: str, wanted: str, keys: Sequence[str] | None = None) -> Any:
    """Return the description of a class, or with ``keys`` its names for them: from our cache, or from transformers."""
    place = _place(structure, wanted, keys)
    known = recall(place) if place else None
    if known is None:
        from cart_hf.sources import modelling

        model = modelling.build(structure, wanted)
        known = modelling.description(model) if keys is None else modelling.module_names(model, keys)
        if place and modelling.is_of_libraries(model):
            keep(place, known)
    return known


def _place(structure: str, wanted: str, keys: Sequence[str] | None) -> Path | None:
    """Return the file that keeps what is known of a class, or of its names for ``keys``; None where none may.

    Its name is a hash of all that the contents depend on.
    """
    about = _makers()
    if about is None:
        return None
    text = json.dumps([about, structure, wanted, keys])
    return cache_folder("architectures") / f"{sha256(text.encode()).hexdigest()[:40]}.json"


@cache
def _makers() -> str | None:
    """Return what tells one description from another's: versions, and our own code; None when versions do not."""
    try:
        versions = [version("transformers"), version("torch")]
        code = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("architecture.py", "modelling.py"))
    except (PackageNotFoundError, OSError):
        return None
    if any("dev" in one for one in versions):  # code that changes under one version
        return None
    return " ".join([*versions, sha256(code).hexdigest()])
