"""CLINC150 by domain: 10 domains x 15 intents, packed with the package (see CLINC150.txt for its licence)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

INTENTS = 15
TASKS = ("auto_and_commute", "banking", "credit_cards", "home", "kitchen_and_dining", "meta", "small_talk", "travel")
"""The domains that become tasks; the other two are seen in pretraining only."""


@dataclass(frozen=True)
class Split:
    """Sentences of one domain and split, and the number of each one's intent."""

    sentences: list[str]
    labels: list[int]


@cache
def _table() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_parquet(str(Path(__file__).with_name("clinc150.parquet")), keep_in_memory=True)


@cache
def clinc150() -> dict[str, dict[str, Split]]:
    """Return {domain: {train | validation | test: Split}}, domains in alphabetical order."""
    domains = sorted(set(_table()["domain"][:]))
    found = {domain: {split: Split([], []) for split in ("train", "validation", "test")} for domain in domains}
    numbers = {domain: {name: i for i, name in enumerate(intents(domain))} for domain in domains}
    columns = (_table()[column][:] for column in ("domain", "split", "intent", "sentence"))
    for domain, split, intent, sentence in zip(*columns, strict=True):
        found[domain][split].sentences.append(sentence)
        found[domain][split].labels.append(numbers[domain][intent])
    return found


def intents(domain: str) -> list[str]:
    """Return a domain's intents, in the order of their labels."""
    return _intents()[domain]


@cache
def _intents() -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for domain, intent in zip(_table()["domain"][:], _table()["intent"][:], strict=True):
        found.setdefault(domain, set()).add(intent)
    return {domain: sorted(names) for domain, names in found.items()}


def write_data(folder: Path, limits: dict[str, int]) -> None:
    """Write ``NAME/{split}.parquet`` for every task, as `cart-hf evaluate --data` reads it.

    :param limits: for each split to write the most rows; spread evenly, for the rows are ordered by intent.
    """
    import datasets

    for task in TASKS:
        features = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=intents(task))}
        )
        for name, most in limits.items():
            split = clinc150()[task][name]
            rows = {"sentence": split.sentences, "label": split.labels}
            dataset = datasets.Dataset.from_dict(rows, features=features)
            count = min(most, len(dataset))
            (folder / task).mkdir(parents=True, exist_ok=True)
            dataset.select([i * len(dataset) // count for i in range(count)]).to_parquet(
                folder / task / f"{name}.parquet"
            )
