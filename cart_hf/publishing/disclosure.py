"""What the records and the recipe tell others of the sources: no path of this machine, no private model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cart_hf.output.record import ADAPTATION_FOLDER, COEFFICIENTS_FILE
from cart_hf.publishing.adaptation import public

# folders and files of the machine, and a model that may be one or private, in a recipe's `evaluation:` and `adapt:`
_LOCAL_KEYS = ("data", "tasks_file", "unseen_by")


def without_names(
    records: Mapping[str, Mapping[str, Any]], recipe: Mapping[str, Any], hidden: Collection[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return records and their recipe without local paths, and without naming some of the sources.

    :param records: by file name; they have the same sources.
    :param hidden: Hub ids that are not to be named.
    """
    told = {name: copy.deepcopy(dict(record)) for name, record in records.items()}
    written = copy.deepcopy(dict(recipe))
    secret = set(hidden)
    names: dict[str, str] = {}
    sources = [_entries(record) for record in told.values()]
    for (entry, key), *same in zip(_recipe_entries(written), *sources, strict=True):
        source = same[0]
        if source["hub_id"] is not None and secret.isdisjoint(_ids_of(source)):
            continue
        name = _name(source, entry[key])
        texts = (reference_text(entry[key]), source["reference"], *_local_parts(entry[key]), *secret & _ids_of(source))
        names |= dict.fromkeys(texts, name)
        entry[key] = name
        for one in same:
            _unname(one, name)
    for record in told.values():
        if "warnings" in record:
            record["warnings"] = [_renamed(warning, names) for warning in record["warnings"]]
        if record.get("adaptation"):
            record["adaptation"] = public(record["adaptation"])
    if written.get("tokenizer_source") in names:
        written["tokenizer_source"] = names[written["tokenizer_source"]]
    _leave_out_places(written)
    return told, written


def places_of(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Return what a record says of each source, and of the model that it is an adapter of: Hub id, commit, origin."""
    return (place for entry in _entries(record) for place in _places(entry))


def _leave_out_places(recipe: dict[str, Any]) -> None:
    """Take the places of data out of a recipe; coefficients that lie elsewhere keep their file's name alone."""
    for part in ("evaluation", "adapt"):
        if recipe.get(part):
            recipe[part] = {key: value for key, value in recipe[part].items() if key not in _LOCAL_KEYS}
    if recipe.get("coefficients") not in (None, f"{ADAPTATION_FOLDER}/{COEFFICIENTS_FILE}"):
        recipe["coefficients"] = Path(recipe["coefficients"]).name


def _ids_of(source: Mapping[str, Any]) -> set[str]:
    """Return the Hub ids that a record's entry names."""
    return {place["hub_id"] for place in _places(source) if place["hub_id"] is not None}


def _places(entry: Mapping[str, Any]) -> list[Any]:
    return [entry, entry["adapts"]] if "adapts" in entry else [entry]


def _entries(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*([record["base"]] if record["base"] else []), *record["models"]]


def _recipe_entries(recipe: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where the recipe names the base and the models."""
    if recipe.get("base_model"):
        yield recipe, "base_model"
    for entry in recipe["models"]:
        yield entry, "model"


def reference_text(reference: Any) -> str:
    """Return a recipe's reference as one text, whichever way it is written."""
    if not isinstance(reference, Mapping):
        return str(reference)
    if "lora" in reference:
        return f"{reference_text(reference['model'])}+{reference_text(reference['lora'])}"
    return "/".join(str(reference[key]) for key in ("path", "subfolder") if reference.get(key))


def _local_parts(reference: Any) -> list[str]:
    """Return the folders that a recipe's reference names: it has them with their whole paths."""
    return [part for part in reference_text(reference).split("+") if Path(part).is_absolute()]


def _name(source: Mapping[str, Any], reference: Any) -> str:
    """Return what a source that is not named is called."""
    name: str = source["name"]
    return name if source["hub_id"] is not None else Path(reference_text(reference)).name or name


def _unname(source: dict[str, Any], name: str) -> None:
    """Take a local or private source's reference out of a record."""
    is_local = source["hub_id"] is None
    source["reference"] = f"{name} (local folder)" if is_local else "a private model"
    for place in _places(source):
        place |= {"hub_id": None, "commit": None}
        if not is_local:
            place["origin"] = {key: value for key, value in place["origin"].items() if key.startswith("license")}


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for written in sorted(names, key=len, reverse=True):  # base+adapter before base
        if "/" in written:
            text = text.replace(written, names[written])
    return text
