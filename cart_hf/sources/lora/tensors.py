"""What the tensors of a LoRA adapter's file do to which tensors of a model: by the names that PEFT gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cart_hf.errors import UserError
from cart_hf.sources.layout import ADAPTER_PREFIX
from cart_hf.sources.lora.settings import LoraSettings
from cart_hf.sources.weights import StoredTensor

_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_TABLE = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.[^.]+)?")
_BIAS = re.compile(r"(.+)\.lora_B(?:\.[^.]+)?\.bias")
_WRAPPED = re.compile(r"(.+)\.(?:base_layer|modules_to_save\.[^.]+)\.(.+)")
_SET_ASIDE = re.compile(r".+\.original_module\..+")  # another took its place


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor.

    :param replaced: key of the tensor that takes its place.
    :param a, b: keys of the factors of what is added to it.
    :param table: whether they are an embedding's.
    :param added: key of the vector that is added to it, a bias.
    :param scaling: factor of what is added.
    """

    replaced: str | None = None
    a: str | None = None
    b: str | None = None
    table: bool = False
    added: str | None = None
    scaling: float = 1.0

    @property
    def keys(self) -> list[str]:
        """The keys of the adapter's file that it is made of."""
        return [key for key in (self.replaced, self.a, self.b, self.added) if key is not None]

    def shapes(self, stored: Mapping[str, StoredTensor], *, transposed: bool) -> dict[str, tuple[int, ...]]:
        """Return the shape of what it changes, as each of its keys tells it.

        :param stored: the adapter's header.
        :param transposed: whether what it changes is a weight stored inputs first (Conv1D).
        """
        found = {key: stored[key].shape for key in (self.replaced, self.added) if key is not None}
        if self.a is not None and self.b is not None:
            shape = (stored[self.b].shape[0], *stored[self.a].shape[1:])
            found[self.b] = shape[::-1] if transposed or self.table else shape
        return found


def changes_of(label: str, stored: Mapping[str, StoredTensor], settings: LoraSettings) -> dict[str, Change]:
    """Return what an adapter changes, by the tensors' names where it was trained.

    :param label: the adapter, for messages.
    :param stored: the header of its file.
    :raises UserError: when there is nothing, a factor is missing, or its rank is not what the settings say.
    """
    if not stored:
        raise UserError(f"{label} holds no tensors; save it again")
    changes: dict[str, Change] = {}
    replaced: dict[str, str] = {}
    for key in stored:
        name = key.removeprefix(ADAPTER_PREFIX)
        if found := _FACTOR.fullmatch(name) or _TABLE.fullmatch(name):
            module, side = found.groups()
            new = Change(table=found.re is _TABLE, scaling=settings.scaling(module), **{side.lower(): key})
            _note(label, changes, f"{module}.weight", new)
        elif found := _BIAS.fullmatch(name):
            _note(label, changes, f"{found[1]}.bias", Change(added=key, scaling=settings.scaling(found[1])))
        elif found := _WRAPPED.fullmatch(name):
            replaced.setdefault(f"{found[1]}.{found[2]}", key)  # a bias may be there under its plain name, too
        elif not _SET_ASIDE.fullmatch(name):
            replaced[name] = key
    for name, change in changes.items():
        _check(label, name, change, stored, settings.rank(name.rpartition(".")[0]))
    return changes | {name: replace(changes.get(name, Change()), replaced=key) for name, key in replaced.items()}


def _note(label: str, changes: dict[str, Change], name: str, new: Change) -> None:
    """Add a factor, or a vector, to what is known of a tensor's change."""
    old = changes.get(name, new)
    if old is not new and (new.added or (new.a and old.a) or (new.b and old.b)):
        raise UserError(f"{label} holds two adapters for '{name}'; save one of them alone")
    changes[name] = replace(new, a=new.a or old.a, b=new.b or old.b)


def _check(label: str, name: str, change: Change, stored: Mapping[str, StoredTensor], rank: int) -> None:
    """Refuse an update of which only a part is there, or whose factors do not belong together."""
    if change.added is not None:
        return
    if change.a is None or change.b is None:
        raise UserError(f"{label}: lora_{'A' if change.a is None else 'B'} of '{name}' is missing; save it again")
    a, b = stored[change.a].shape, stored[change.b].shape
    if len(a) < 2 or len(b) < 2 or any(size != 1 for size in b[2:]):
        raise UserError(
            f"{label}: tensors '{change.a}' {list(a)} and '{change.b}' {list(b)} are no factors of a matrix"
        )
    if a[0] != b[1]:
        raise UserError(
            f"{label}: tensors '{change.a}' {list(a)} and '{change.b}' {list(b)} do not belong together: the first has "
            f"{a[0]} rows, the second {b[1]} columns"
        )
    if a[0] != rank:
        raise UserError(
            f"{label}: tensor '{change.a}' has shape {list(a)}, of rank {a[0]}, but adapter_config.json says r = "
            f"{rank} for it: is the file its own?"
        )
