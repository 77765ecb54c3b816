"""PEFT adapters of several tasks on one model, one of them active at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cart_hf.errors import UserError, did_you_mean, shorten, telling
from cart_hf.output.record import ADAPTERS_FOLDER
from cart_hf.sources.layout import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS

_WRAPPED = ("base_layer", "original_module")
"""What PEFT calls a module that it has put a layer of its own around."""


class TaskAdapters:
    """The adapters of one model, which PEFT puts into its layers.

    :param model: gets the adapters, in its own type and on its device; its modules are called as in the class that the
        adapters were made for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._names: dict[str, str] = {}  # PEFT's names of the adapters: a task's may hold dots
        self._active: str | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks that have one."""
        return list(self._names)

    def attach(self, task: str, folder: Path, head: nn.Module | None = None) -> None:
        """Read an adapter and put it into the model's layers.

        :param head: the task's own part of its class, which gets what the adapter holds of it.
        :raises UserError: when a file is missing or broken, a tensor has no place, or a place has no tensor.
        """
        from peft.functional import inject_adapter_in_model, set_peft_model_state_dict

        config, tensors = _read(folder)
        in_head = {} if head is None else {name: t for name, t in head.state_dict().items() if name in tensors}
        body = {name: tensor for name, tensor in tensors.items() if name not in in_head}
        own = f"adapter_{len(self._names)}_"  # none is the beginning of another: PEFT looks for names in names
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT: that there are several adapters is what is wanted
            try:
                inject_adapter_in_model(config, self._model, own, low_cpu_mem_usage=True)
                self._names[task] = own
                places = self._tensors_of(own)
                _compare(tensors, places | in_head, folder)
                body = {name: self._fitting(value, places[name].device) for name, value in body.items()}
                found = set_peft_model_state_dict(self._model, body, own, low_cpu_mem_usage=True)
            except (ValueError, TypeError, KeyError, RuntimeError) as failure:
                raise UserError(f"{folder}: PEFT cannot add it to the model: {_line(failure)}") from failure
        lost = [*found.unexpected_keys, *(name for name in found.missing_keys if own in name.split("."))]
        if lost:
            raise UserError(f"{folder}: PEFT did not load {shorten(lost)}")
        for name, place in in_head.items():
            place.copy_(tensors[name])
        self._active = None

    def activate(self, task: str) -> None:
        """Have the model answer with a task's adapter, and no other.

        :raises UserError: when it has none.
        """
        from peft.functional import set_adapter

        if task not in self._names:
            raise UserError(f"no adapter '{task}'{did_you_mean(task, self._names)}")
        if self._active != task:
            set_adapter(self._model, [self._names[task]], inference_mode=True)
            self._active = task

    def tensors(self, task: str) -> dict[str, torch.Tensor]:
        """Return what the model answers with when a task's adapter is active.

        The model's own tensors have the names that they have without adapters, and come first.
        """
        own, others = self._names[task], set(self._names.values()) - {self._names[task]}
        mine: dict[str, torch.Tensor] = {}
        plain: dict[str, torch.Tensor] = {}
        for name, tensor in self._model.state_dict().items():
            parts = name.split(".")
            if own in parts:
                mine[".".join(part for part in parts if part != own)] = tensor
            elif others.isdisjoint(parts):
                plain[".".join(part for part in parts if part not in _WRAPPED)] = tensor
        return plain | mine | self._scales_of(own)

    def scales(self) -> dict[str, torch.Tensor]:
        """Return what each layer multiplies its adapters' outputs with; it is in no state dict."""
        return {f"{name}.{own}": scale for own in self._names.values() for name, scale in self._scales_of(own).items()}

    def _scales_of(self, own: str) -> dict[str, torch.Tensor]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = {name: module for name, module in self._model.named_modules() if isinstance(module, BaseTunerLayer)}
        return {
            f"{name}.scaling": torch.tensor(float(layer.scaling[own]))
            for name, layer in layers.items()
            if own in getattr(layer, "scaling", {})
        }

    def _fitting(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Bring a tensor to the model's type and device; PEFT itself moves those whose place is not filled yet."""
        return tensor.to(device if device.type != "meta" else None, self._dtype if tensor.is_floating_point() else None)

    def _tensors_of(self, own: str) -> dict[str, torch.Tensor]:
        """Return an adapter's tensors in the model, by the names that they have in its file."""
        found: dict[str, torch.Tensor] = {}
        for name, tensor in self._model.state_dict().items():
            before, mine, after = name.partition(f".{own}")
            if mine:
                found[before.removesuffix(".modules_to_save") + after] = tensor
        return found


def adapter_names(folder: Path) -> tuple[str, ...]:
    """Return the tasks that a folder holds adapters for, whether or not they are complete."""
    place = folder / ADAPTERS_FOLDER
    found = sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
    ours = any((path / ADAPTER_CONFIG).is_file() for path in found)  # and not just a folder of that name
    return tuple(path.name for path in found) if ours else ()


def attach_adapters(
    folder: Path, tasks: Iterable[str], model: nn.Module, heads: Mapping[str, nn.Module] | None = None
) -> TaskAdapters:
    """Put the adapters of some tasks into a model.

    :param folder: the merged folder that holds them.
    :param heads: models by task, that get what an adapter holds of their head; none for a CLIP.
    :raises UserError: as :meth:`TaskAdapters.attach` does, and when a task has no adapter.
    """
    known, found = adapter_names(folder), TaskAdapters(model)
    for task in tasks:
        if task not in known:
            raise UserError(f"{folder} has no {ADAPTERS_FOLDER}/{task}, only those of {shorten(known)}")
        found.attach(task, folder / ADAPTERS_FOLDER / task, heads[task] if heads else None)
    return found


def _read(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Read an adapter's configuration, and its tensors by the names that they have in the task's class."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: it is no PEFT adapter")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as failure:
        raise UserError(f"{folder / ADAPTER_CONFIG}: PEFT cannot read it: {_line(failure)}") from failure
    config.inference_mode = True
    with telling(f"cannot read {folder / ADAPTER_WEIGHTS}"):
        stored = load_file(folder / ADAPTER_WEIGHTS)
    return config, {name.removeprefix(ADAPTER_PREFIX): tensor for name, tensor in stored.items()}


def _compare(stored: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Refuse tensors that the model has no place for, which PEFT passes over, and places that none is for."""
    unknown, missing = sorted(stored.keys() - wanted.keys()), sorted(wanted.keys() - stored.keys())
    if unknown:
        raise UserError(f"{folder}: the model has no place for its {shorten(unknown)}")
    if missing:
        raise UserError(f"{folder}: its {ADAPTER_CONFIG} names layers whose tensors it lacks: {shorten(missing)}")
    for name, tensor in stored.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{folder}: tensor '{name}' has shape {list(tensor.shape)}, the model's is {list(wanted[name].shape)}"
            )


def _line(failure: Exception) -> str:
    return " ".join(str(failure).split())[:300]
