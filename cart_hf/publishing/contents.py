"""What lies in a merged folder, and what of it others may see."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cart_hf.errors import UserError
from cart_hf.evaluation.results import Results
from cart_hf.output.origin import Origin
from cart_hf.output.record import MERGE_FILE, RECIPE_FILE

RESULTS_FILE, CARD_FILE = "results.json", "README.md"
_LOCAL_KEYS = ("data", "tasks_file")  # folders and files of the machine, in a recipe's `evaluation:`


@dataclass(frozen=True)
class Source:
    """The base or a fine-tuned model, as ``merge.json`` records it.

    :param name: the task's name, or ``base``.
    :param reference: where it came from.
    :param hub_id: its repository; None for a local folder, and for a source that is not named.
    :param commit: its Hub commit.
    :param class_name: its class.
    :param origin: its licence and what else its card says.
    """

    name: str
    reference: str
    hub_id: str | None
    commit: str | None
    class_name: str
    origin: Origin


@dataclass(frozen=True)
class Contents:
    """A merged folder.

    :param folder: where it lies.
    :param record: ``merge.json``.
    :param recipe: ``cart_hf.yaml``.
    :param results: ``results.json``, if there is one.
    """

    folder: Path
    record: Mapping[str, Any]
    recipe: Mapping[str, Any]
    results: Results | None

    @property
    def base(self) -> Source | None:
        """The pretrained model, if the recipe named one."""
        return _source(self.record["base"]) if self.record["base"] else None

    @property
    def models(self) -> list[Source]:
        """The fine-tuned models."""
        return [_source(model) for model in self.record["models"]]

    @property
    def sources(self) -> list[Source]:
        """The base, if there is one, and the models."""
        return [*([self.base] if self.base else []), *self.models]

    @property
    def tasks(self) -> dict[str, str]:
        """The classes of the tasks that have a head of their own, by name."""
        return {m.name: m.class_name for m in self.models if (self.folder / "tasks" / m.name).is_dir()}

    def files(self) -> dict[str, bytes]:
        """Return the three files that are written from here and not sent as they lie in the folder."""
        files = {MERGE_FILE: _json(self.record), RECIPE_FILE: recipe_text(self.recipe).encode()}
        return files if self.results is None else files | {RESULTS_FILE: _json(self.results.to_dict())}

    def with_origins(self, origins: Mapping[str, Origin]) -> Contents:
        """Return it with what is known of its sources now, by name; where nothing is, what was known before stays."""
        record = copy.deepcopy(dict(self.record))
        for entry in _entries(record):
            if entry["name"] in origins:
                new = origins[entry["name"]]
                old = Origin.from_dict(entry["origin"])
                entry["origin"] = (new if new.private is not None else replace(old, private=None)).to_dict()
        return replace(self, record=record)

    def public(self, title: str, hidden: Collection[str] = ()) -> Contents:
        """Return it without the paths of the machine it was made on, and without naming some of its sources.

        :param title: what the model is called from now on.
        :param hidden: Hub ids that are not to be named.
        """
        record, recipe = copy.deepcopy(dict(self.record)), copy.deepcopy(dict(self.recipe))
        names: dict[str, str] = {}
        for source, (entry, key) in zip(_entries(record), _recipe_entries(recipe), strict=True):
            if source["hub_id"] is None or source["hub_id"] in hidden:
                written = {_text(entry[key]), source["reference"], source["hub_id"] or source["reference"]}
                entry[key] = _unname(source, _text(entry[key]))
                names |= dict.fromkeys(written, entry[key])
        record["warnings"] = [_renamed(warning, names) for warning in record["warnings"]]
        if recipe.get("tokenizer_source") in names:
            recipe["tokenizer_source"] = names[recipe["tokenizer_source"]]
        if recipe.get("evaluation"):
            recipe["evaluation"] = {k: v for k, v in recipe["evaluation"].items() if k not in _LOCAL_KEYS}
        results = self.results
        if results is not None:
            results = replace(
                results,
                model=title,
                revision=None,
                tasks={name: replace(task, settings=_public(task.settings)) for name, task in results.tasks.items()},
                errors=dict.fromkeys(results.errors, "not measured"),
            )
        return replace(self, record=record, recipe=recipe, results=results)


def read_contents(folder: Path) -> Contents:
    """Read what a card needs.

    :raises UserError: when the folder is not an output of ``cart-hf merge``, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    missing = [name for name in (MERGE_FILE, RECIPE_FILE, "config.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is not a merged model (no {missing[0]}): push a folder that cart-hf merge wrote")
    record = _read(folder / MERGE_FILE)
    if not {"method", "loader", "base", "models", "warnings"} <= set(record):
        raise UserError(f"{folder / MERGE_FILE} is not what this version of cart-hf writes; merge again")
    results = folder / RESULTS_FILE
    return Contents(folder, record, _read(folder / RECIPE_FILE), Results.load(results) if results.is_file() else None)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}") from failure
    except (ValueError, yaml.YAMLError) as failure:
        raise UserError(f"{path} is damaged: {' '.join(str(failure).split())}") from failure
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged: it holds no mapping")
    return data


def _source(entry: Mapping[str, Any]) -> Source:
    origin = Origin.from_dict(entry["origin"])
    return Source(entry["name"], entry["reference"], entry["hub_id"], entry["commit"], entry["class"], origin)


def _entries(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*([record["base"]] if record["base"] else []), *record["models"]]


def _recipe_entries(recipe: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where the recipe names the base and the models."""
    if recipe.get("base_model"):
        yield recipe, "base_model"
    for entry in recipe["models"]:
        yield entry, "model"


def _text(reference: str | Mapping[str, str]) -> str:
    if isinstance(reference, str):
        return reference
    return f"{reference['path']}/{reference['subfolder']}"


def _unname(source: dict[str, Any], written: str) -> str:
    """Take a local or private source's reference out of the record; return what the recipe calls it from now on."""
    name: str = source["name"]
    if source["hub_id"] is None:
        name = Path(written).name or name
        source["reference"] = f"{name} (local folder)"
    else:
        source["reference"] = "a private model"
        source["origin"] = {key: value for key, value in source["origin"].items() if key.startswith("license")}
    source |= {"hub_id": None, "commit": None}
    return name


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for written, name in names.items():
        if "/" in written:
            text = text.replace(written, name)
    return text


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keep of a result's settings what says which task it was; the others name files of this machine."""
    return {key: value for key, value in settings.items() if key in ("task", "split", "limit")}


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
