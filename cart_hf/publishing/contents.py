"""What lies in an output folder, and what of it others may see."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cart_hf.errors import UserError
from cart_hf.evaluation.results import Results
from cart_hf.output.origin import Origin
from cart_hf.output.record import (
    ADAPTATION_FOLDER,
    ADAPTERS_FOLDER,
    COEFFICIENTS_FILE,
    COMPRESS_FILE,
    MERGE_FILE,
    RECIPE_FILE,
)
from cart_hf.publishing.adaptation import public_coefficients
from cart_hf.publishing.disclosure import places_of, without_names
from cart_hf.sources.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

RESULTS_FILE, CARD_FILE = "results.json", "README.md"
_WRITTEN = {  # what each record must hold
    MERGE_FILE: {"method", "loader", "base", "models", "warnings"},
    COMPRESS_FILE: {"centre", "base", "models", "settings", "bytes", "tasks"},
}


@dataclass(frozen=True)
class Source:
    """The base or a fine-tuned model, as the records describe it.

    :param name: the task's name, or ``base``.
    :param reference: where it came from.
    :param hub_id: its repository; None for a local folder, and for a source that is not named.
    :param commit: its Hub commit.
    :param class_name: its class.
    :param origin: its licence and what else its card says.
    :param adapts: the model that it is an adapter of, if it is one.
    """

    name: str
    reference: str
    hub_id: str | None
    commit: str | None
    class_name: str
    origin: Origin
    adapts: Source | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Source:
        """Read a record's entry."""
        adapts = entry.get("adapts")
        below = {"name": entry["name"], "reference": adapts["hub_id"] or "a local folder"} if adapts else {}
        return cls(
            entry["name"],
            entry["reference"],
            entry["hub_id"],
            entry["commit"],
            entry["class"],
            Origin.from_dict(entry["origin"]),
            cls.of({**adapts, **below}) if adapts else None,
        )


@dataclass(frozen=True)
class Contents:
    """A folder that ``cart-hf merge`` or ``cart-hf compress`` wrote.

    :param folder: where it lies.
    :param records: ``merge.json`` and ``compress.json``, those that are there: a single adapter has no ``merge.json``.
    :param recipe: ``cart_hf.yaml``.
    :param results: ``results.json``, if there is one.
    """

    folder: Path
    records: Mapping[str, Mapping[str, Any]]
    recipe: Mapping[str, Any]
    results: Results | None

    @property
    def record(self) -> Mapping[str, Any]:
        """``merge.json``; of an adapter ``compress.json``, which names the sources in the same way."""
        return self.records[COMPRESS_FILE if self.is_adapter else MERGE_FILE]

    @property
    def compression(self) -> Mapping[str, Any] | None:
        """``compress.json``, if there is one."""
        return self.records.get(COMPRESS_FILE)

    @property
    def adaptation(self) -> Mapping[str, Any] | None:
        """How the coefficients were learnt, if they were."""
        return self.record.get("adaptation")

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, and no model."""
        return MERGE_FILE not in self.records

    @property
    def base(self) -> Source | None:
        """The pretrained model, if the recipe named one."""
        return Source.of(self.record["base"]) if self.record["base"] else None

    @property
    def models(self) -> list[Source]:
        """The fine-tuned models."""
        return [Source.of(model) for model in self.record["models"]]

    @property
    def sources(self) -> list[Source]:
        """The base, if there is one, and the models."""
        return [*([self.base] if self.base else []), *self.models]

    @property
    def ingredients(self) -> list[Source]:
        """The sources, and the models that some of them are adapters of."""
        return [*self.sources, *(source.adapts for source in self.sources if source.adapts)]

    @property
    def tasks(self) -> dict[str, str]:
        """The classes of the tasks that have a head of their own, by name."""
        return {m.name: m.class_name for m in self.models if (self.folder / "tasks" / m.name).is_dir()}

    @property
    def adapters(self) -> dict[str, Contents]:
        """Each adapter as a folder of its own, by task; none in a plain merge."""
        compression = self.compression
        if compression is None:
            return {}
        if self.is_adapter:
            return dict.fromkeys(compression["tasks"], self)
        found = {}
        for task, told in compression["tasks"].items():
            results = self.results
            if results is not None:
                mine = {name: result for name, result in results.tasks.items() if name == task}
                results = replace(results, tasks=mine, errors={}) if mine else None
            records = {COMPRESS_FILE: {**compression, "tasks": {task: told}}}
            found[task] = Contents(self.folder / ADAPTERS_FOLDER / task, records, self.recipe, results)
        return found

    def files(self) -> dict[str, bytes]:
        """Return the files that are written from here and not sent as they lie in the folder."""
        files = {name: _json(record) for name, record in self.records.items()}
        files[RECIPE_FILE] = recipe_text(self.recipe).encode()
        coefficients = self.folder / ADAPTATION_FOLDER / COEFFICIENTS_FILE
        if self.adaptation and coefficients.is_file():  # it has the record, too
            name = coefficients.relative_to(self.folder).as_posix()
            files[name] = public_coefficients(coefficients.read_bytes(), self.adaptation)
        return files if self.results is None else files | {RESULTS_FILE: _json(self.results.to_dict())}

    def with_origins(self, origins: Mapping[tuple[str, str | None], Origin]) -> Contents:
        """Return it with what is known of its sources now; where nothing is, what was known before stays.

        :param origins: by Hub id and commit.
        """
        records = copy.deepcopy(dict(self.records))
        for place in (place for record in records.values() for place in places_of(record)):
            new = origins.get((place["hub_id"], place["commit"]))
            if new is not None:
                old = Origin.from_dict(place["origin"])
                place["origin"] = (new if new.private is not None else replace(old, private=None)).to_dict()
        return replace(self, records=records)

    def public(self, title: str, hidden: Collection[str] = ()) -> Contents:
        """Return it without the paths of the machine it was made on, and without naming some of its sources.

        :param title: what the model is called from now on.
        :param hidden: Hub ids that are not to be named.
        """
        records, recipe = without_names(self.records, self.recipe, hidden)
        results = self.results
        if results is not None:
            results = replace(
                results,
                model=title,
                revision=None,
                tasks={name: replace(task, settings=_public(task.settings)) for name, task in results.tasks.items()},
                errors=dict.fromkeys(results.errors, "not measured"),
            )
        return replace(self, records=records, recipe=recipe, results=results)


def read_contents(folder: Path) -> Contents:
    """Read what a card needs.

    :raises UserError: when the folder is no output of ``cart-hf merge`` or ``cart-hf compress``, or one of its files is
        damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    records = {name: _record(folder / name) for name in _WRITTEN if (folder / name).is_file()}
    if records.get(COMPRESS_FILE, {}).get("form") == "emr":
        raise UserError(f"{folder} holds masks, which no library loads: `cart-hf restore` makes a task's model of them")
    missing = [name for name in _needed(records) if not (folder / name).is_file()]
    if missing and (folder / ADAPTERS_FOLDER).is_dir() and records.get(COMPRESS_FILE, {}).get("centre") == "base":
        raise UserError(f"{folder} holds adapters of the base: push each of {folder / ADAPTERS_FOLDER}/NAME by itself")
    if missing:
        raise UserError(
            f"{folder} is not a merged model (no {missing[0]}): push a folder that cart-hf merge or compress wrote"
        )
    results = folder / RESULTS_FILE
    return Contents(folder, records, _read(folder / RECIPE_FILE), Results.load(results) if results.is_file() else None)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _needed(records: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Return the files without which a folder is not whole."""
    compression = records.get(COMPRESS_FILE, {})
    adapter = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    if compression.get("centre") == "base":
        return (RECIPE_FILE, *adapter)
    adapters = [f"{ADAPTERS_FOLDER}/{task}/{name}" for task in compression.get("tasks", ()) for name in adapter]
    return (MERGE_FILE, RECIPE_FILE, "config.json", *adapters)


def _record(path: Path) -> dict[str, Any]:
    record = _read(path)
    if not _WRITTEN[path.name] <= set(record):
        verb = path.stem
        raise UserError(f"{path} is not what this version of cart-hf writes; {verb} again")
    return record


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


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keep of a result's settings what says which task it was; the others name files of this machine."""
    return {key: value for key, value in settings.items() if key in ("task", "split", "limit")}


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
