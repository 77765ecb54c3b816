"""Finding models and their files, local or on the Hub, weight files unopened; and the bases of adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cart_hf.errors import UserError
from cart_hf.recipe.reference import Reference, exists, looks_local
from cart_hf.sources.layout import ADAPTER_CONFIG, ADAPTER_LAYOUTS, LAYOUTS, local_weight_files
from cart_hf.sources.weights import WeightFile

if TYPE_CHECKING:
    from cart_hf.sources.download import RemoteFile

Result = TypeVar("Result")

CONFIG = "config.json"


@dataclass(frozen=True)
class Located:
    """A model whose weight files were not opened yet.

    :param config: its ``config.json``, or an adapter's ``adapter_config.json``.
    :param open_files: opens the headers of its weight files.
    :param pickles: those that must be downloaded to be opened.
    :param base: what it is an adapter of.
    """

    name: str
    reference: Reference
    commit: str | None
    folder: Path
    config: dict[str, Any]
    open_files: Callable[[], dict[str, WeightFile]]
    pickles: Sequence[RemoteFile]
    base: Reference | None

    @property
    def label(self) -> str:
        """What to call it in messages."""
        return f"{self.name} ({self.reference})"


def locate(name: str, reference: Reference) -> Located:
    """Find a model's files, or an adapter's, and read its configuration.

    :raises UserError: when there is no such model, or its configuration is wrong.
    """
    place = reference.adapter or reference
    if not place.is_local:
        from cart_hf.sources.hub import open_repository

        repository = open_repository(name, place)
        is_adapter = reference.adapter is not None or _is_adapter(repository.files)
        repository = replace(repository, layouts=ADAPTER_LAYOUTS if is_adapter else LAYOUTS)
        folder, commit = repository.folder, repository.commit
    else:
        folder, commit = Path(place.path).expanduser().resolve(), None
        folder = folder / place.subfolder if place.subfolder else folder
        if not folder.is_dir():
            raise UserError(f"{name}: {folder} is not a folder")
        is_adapter = reference.adapter is not None or _is_adapter({path.name for path in folder.iterdir()})
    label = str(folder) if place.is_local else str(place)
    config = read_config(name, folder, label, ADAPTER_CONFIG if is_adapter else CONFIG)
    base = _base_of(name, reference, config, folder) if is_adapter else None
    if commit is not None:
        pickles = repository.missing_pickles()
        return Located(name, reference, commit, folder, config, repository.weight_files, pickles, base)
    layouts = ADAPTER_LAYOUTS if is_adapter else LAYOUTS
    return Located(name, reference, None, folder, config, lambda: local_weight_files(folder, layouts), (), base)


def _is_adapter(files: Collection[str]) -> bool:
    """Whether the files of a folder are a PEFT adapter's, and not those of a model."""
    return ADAPTER_CONFIG in files and not any(layout in files for layout in LAYOUTS)


def _base_of(name: str, reference: Reference, settings: Mapping[str, Any], folder: Path) -> Reference:
    """Return the base of an adapter: the one beside it in its reference, else the one that its settings name.

    :raises UserError: when there is none, or it is a folder that is gone.
    """
    if reference.adapter is not None:
        return reference.without_adapter
    written, advice = settings.get("base_model_name_or_path"), f"name it: BASE+{reference}"
    if not isinstance(written, str) or not written:
        raise UserError(f"{name}: the {ADAPTER_CONFIG} of {reference} names no base model; {advice}")
    if looks_local(written) and exists(str(folder / written)):  # an adapter that lies beside its base
        return Reference(str((folder / written).resolve()))
    if exists(written):
        return Reference(written)
    revision = settings.get("revision")
    try:
        base = Reference.parse(written)
    except ValueError as failure:
        raise UserError(
            f"{name}: the base of {reference} is not on this machine ({ADAPTER_CONFIG} says {written}); {advice}"
        ) from failure
    return replace(base, revision=base.revision or (revision if isinstance(revision, str) and revision else None))


def _locate_base(reference: Reference, adapter: Located) -> Located | UserError:
    """Find the base of an adapter; what is wrong with it is said of the adapter."""
    found = attempt(locate, f"the base of {adapter.name}", reference)
    if isinstance(found, Located) and found.base is not None:
        found = UserError(f"{found.name}: {reference} is an adapter itself; merge it into its base first")
    if isinstance(found, UserError) and adapter.reference.adapter is None:
        advice = (
            f"(it is what the {ADAPTER_CONFIG} of {adapter.reference} names; for another, BASE+{adapter.reference})"
        )
        return UserError([f"{problem} {advice}" for problem in found.problems])
    return found


def with_bases(
    pool: ThreadPoolExecutor, located: Sequence[Located | UserError]
) -> tuple[list[Located | UserError], dict[int, int]]:
    """Locate the bases of adapters, each once, and not again where a model is the same.

    :return: the models and their bases; and for each adapter the place of its base among them.
    """
    everyone = list(located)
    plain = {i: one for i, one in enumerate(located) if isinstance(one, Located) and one.base is None}
    places = {one.reference: i for i, one in plain.items()}
    folders = {one.folder: i for i, one in plain.items()}
    adapters = {i: (one.base, one) for i, one in enumerate(located) if isinstance(one, Located) and one.base}
    missing = {wanted: one for wanted, one in reversed(adapters.values()) if wanted not in places}
    for wanted, base in zip(missing, pool.map(_locate_base, missing, missing.values()), strict=True):
        if isinstance(base, Located) and base.folder in folders:
            places[wanted] = folders[base.folder]
            continue
        places[wanted] = len(everyone)
        everyone.append(base)
        if isinstance(base, Located):
            folders[base.folder] = places[wanted]
    return everyone, {i: places[wanted] for i, (wanted, _) in adapters.items()}


def read_config(name: str, folder: Path, label: str, file: str) -> dict[str, Any]:
    """Read a configuration of a model's, or an adapter's, folder.

    :raises UserError: when it is missing, or no JSON object.
    """
    path = folder / file
    if not path.is_file():
        adapters = sorted(found.parent for found in folder.glob(f"*/*/{ADAPTER_CONFIG}"))
        what = "is it a model folder (save_pretrained)?" if file == CONFIG else "is it a PEFT adapter?"
        raise UserError(
            f"{name}: {label} has no {file}; " + (f"name an adapter in it: {adapters[0]}" if adapters else what)
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as failure:
        raise UserError(f"{name}: {file} of {label} is not valid JSON ({failure})") from failure
    if not isinstance(config, dict):
        raise UserError(f"{name}: {file} of {label} is not a JSON object")
    return config


def attempt(work: Callable[..., Result], *arguments: Any) -> Result | UserError:
    """Return what ``work`` returns, or the error it raises about the user's input."""
    try:
        return work(*arguments)
    except UserError as failure:
        return failure
