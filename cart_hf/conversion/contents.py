"""What a file holds: the tensors of the one open_clip model in it, wherever in the pickled tree that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cart_hf.conversion.archive import Archive
from cart_hf.conversion.unpickle import PickledTensor, Shell
from cart_hf.errors import UserError, shorten

_ANCHOR = "visual.class_embedding"  # every open_clip vision transformer has it, its ResNets do not
_BUFFERS = ("attn_mask",)  # the causal mask, which transformers computes


@dataclass(frozen=True)
class Contents:
    """An open_clip model in a file.

    :param archive: the open file.
    :param kind: what was pickled: the module's class, or ``state dict``.
    :param prefix: what stands before the model's own names, such as ``model.``.
    :param tensors: its tensors by open_clip's names.
    :param shells: its modules by open_clip's names; empty for a state dict.
    :param outside: names of the tensors that are not the model's, such as a classifier's.
    """

    archive: Archive
    kind: str
    prefix: str
    tensors: Mapping[str, PickledTensor]
    shells: Mapping[str, Shell]
    outside: tuple[str, ...]

    @property
    def has_text_tower(self) -> bool:
        """Whether the text tower is whole: the papers' image encoders keep its embeddings only."""
        return any(name.startswith("transformer.resblocks.") for name in self.tensors)

    def blocks(self, tower: str) -> int:
        """Count the blocks of a tower: ``visual.``, or the text's, which has no name of its own ("")."""
        start = f"{tower}transformer.resblocks."
        return len({name.removeprefix(start).split(".")[0] for name in self.tensors if name.startswith(start)})

    @property
    def activation(self) -> str | None:
        """The blocks' activation as transformers calls it, if the file says: a state dict does not."""
        shell = self.shells.get("visual.transformer.resblocks.0.mlp.gelu")
        if shell is None:
            return None
        return {"QuickGELU": "quick_gelu", "GELU": "gelu"}.get(shell.path.rpartition(".")[2])

    def heads(self, tower: str) -> int | None:
        """Return a tower's number of attention heads, if the file says: a state dict does not."""
        shell = self.shells.get(f"{tower}transformer.resblocks.0.attn")
        number = shell.state.get("num_heads") if shell is not None else None
        return number if isinstance(number, int) else None


def find_model(archive: Archive) -> Contents:
    """Find the open_clip model in a file.

    :raises UserError: when there is none, or more than one, or its bytes are not all there.
    """
    tensors, shells = _walk(archive.root)
    found = [name.removesuffix(_ANCHOR) for name in tensors if name == _ANCHOR or name.endswith(f".{_ANCHOR}")]
    if not found:
        what = f"it has {shorten(sorted(tensors))}" if tensors else "it has no tensors"
        raise UserError(f"{archive.path} holds no open_clip vision transformer ('{_ANCHOR}'): {what}")
    if len(found) > 1:
        raise UserError(
            f"{archive.path} holds {len(found)} open_clip models ({shorten([f'{p}visual' for p in found])}); "
            "save each one in a file of its own"
        )
    prefix = found[0]
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    # open_clip's CustomTextCLIP, the same model, keeps its text tower under a name of its own
    own = {name.removeprefix("text."): t for name, t in own.items() if name.rpartition(".")[2] not in _BUFFERS}
    for tensor in own.values():
        archive.check(tensor)
    modules = {
        name.removeprefix(prefix).removeprefix("text."): shell
        for name, shell in shells.items()
        if name.startswith(prefix)
    }
    kind = archive.root.path if isinstance(archive.root, Shell) else "state dict"
    outside = tuple(name for name in tensors if not name.startswith(prefix))
    return Contents(archive, kind, prefix, own, modules, outside)


def _walk(root: Any) -> tuple[dict[str, PickledTensor], dict[str, Shell]]:
    """Name every tensor and every module as ``state_dict()`` would; an object met twice is named once."""
    tensors: dict[str, PickledTensor] = {}
    shells: dict[str, Shell] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", root)]
    while waiting:
        name, node = waiting.pop()
        if isinstance(node, PickledTensor):
            tensors[name] = node
            continue
        if not isinstance(node, Shell | dict) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Shell):
            shells[name] = node
        children = _children(node.state) if isinstance(node, Shell) else node
        named = [(f"{name}.{key}" if name else key, child) for key, child in children.items() if isinstance(key, str)]
        waiting += reversed(named)
    return tensors, shells


def _children(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return what a module's names lead to; an object that is no module leads to its attributes."""
    parts = [state.get(key) for key in ("_parameters", "_buffers", "_modules")]
    if not any(isinstance(part, dict) for part in parts):
        return dict(state)
    return {key: child for part in parts if isinstance(part, dict) for key, child in part.items()}
