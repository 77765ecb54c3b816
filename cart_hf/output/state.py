"""What decides the bytes of a merge, and whether processes, or a merge and the one it continues, agree on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cart_hf import __version__
from cart_hf.errors import UserError
from cart_hf.output.record import identify, resolved_recipe, versions
from cart_hf.plan import Plan, Shard
from cart_hf.recipe.reading import parse_yaml

_NOT_OF_THE_BYTES = ("evaluation", "benchmark", "compress", "adapt", "tune")  # keys of a recipe
_ADVICE = "or leave out --resume to start afresh"


@dataclass(frozen=True)
class State:
    """What decides the bytes of a merge.

    :param target: the name of the output folder.
    :param settings: the recipe's, each by its key, and the versions and the kind of device that compute.
    :param sources: for each weight file, by model and name, what it is recognised by.
    :param plan: a digest of what happens to every tensor, and of its place.
    """

    target: str
    settings: Mapping[str, Any]
    sources: Mapping[str, Mapping[str, Any]]
    plan: str

    @classmethod
    def of(cls, plan: Plan, shards: Sequence[Shard], target: Path, execution: Mapping[str, Any]) -> State:
        """Describe a merge whose weight files are on this machine.

        :param execution: the kind of device that computes, and whatever else is no part of the recipe.
        """
        recipe = parse_yaml(resolved_recipe(plan).to_yaml())
        settings = dict(_flat({key: value for key, value in recipe.items() if key not in _NOT_OF_THE_BYTES}))
        packages = versions()
        settings |= {"cart-hf": __version__, "torch": packages.get("torch"), "scipy": packages.get("scipy")}
        sources: dict[str, dict[str, Any]] = {}
        for checkpoint in plan.checkpoints:
            for name, file in checkpoint.files.items():
                path = file.fetch()
                local = {} if checkpoint.owner_of(file).commit else {"modified": path.stat().st_mtime_ns}
                sources[f"{checkpoint.name}: {name}"] = identify(path) | local
        tensors = [asdict(tensor) for tensor in plan.tensors]
        files = [(shard.filename, hashlib.sha256(shard.header).hexdigest()) for shard in shards]
        # what an adapter adds: its settings say how much
        added = [(c.name, name, c.part(name).done) for c in plan.checkpoints if c.adapts for name in c.tensors]
        learnt = plan.coefficients and plan.coefficients.digest
        text = json.dumps([plan.method.name, tensors, added, files, learnt], sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(target.name, {**settings, **execution}, sources, digest)


def check_alike(states: Sequence[State]) -> None:
    """Refuse to merge where processes read different files, or would compute differently.

    :param states: each process's.
    :raises UserError: naming what differs.
    """
    first, *others = map(_without_times, states)
    for rank, other in enumerate(others, start=1):
        source = _changed_source(first, other)
        for key, one, two in _changed_settings(first, other):
            raise UserError(f"process 0 has {key} {one}, process {rank} has {two}: give every machine the same")
        if source is not None or first.plan != other.plan:
            what = source or "a model's config.json"
            raise UserError(f"{what} differs between processes 0 and {rank}: give every machine the same files")


def check_unchanged(before: State, now: State) -> None:
    """Refuse to go on with other settings or sources.

    :raises UserError: with all the settings that differ, or the source that does.
    """
    changes = [f"{key} was {was}, is {new}" for key, was, new in _changed_settings(before, now)]
    if changes:
        raise UserError(f"--resume: {', '.join(changes)}: give the same settings, {_ADVICE}")
    source = _changed_source(before, now)
    if source is not None:
        raise UserError(f"--resume: {source} has changed since the merge was interrupted: bring it back, {_ADVICE}")
    if before.plan != now.plan:
        raise UserError(f"--resume: a model's config.json has changed since: bring it back, {_ADVICE}")


def _changed_settings(before: State, now: State) -> list[tuple[str, str, str]]:
    """Return the key, the old value and the new one, as people read them."""

    def told(settings: Mapping[str, Any], key: str) -> str:
        return str(settings[key]) if settings.get(key) is not None else "not given"

    keys = dict.fromkeys((*before.settings, *now.settings))
    return [
        (key, told(before.settings, key), told(now.settings, key))
        for key in keys
        if before.settings.get(key) != now.settings.get(key)
    ]


def _changed_source(before: State, now: State) -> str | None:
    names = dict.fromkeys((*before.sources, *now.sources))
    return next((name for name in names if before.sources.get(name) != now.sources.get(name)), None)


def _without_times(state: State) -> State:
    """Return what must be the same on every machine: copies of a file are made at different times."""
    sources = {name: {k: v for k, v in known.items() if k != "modified"} for name, known in state.sources.items()}
    return replace(state, sources=sources)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings and of lists of them, each with its path."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{key}[{inner.get('name', place)}]")
    else:
        yield key, value
