"""What has been measured so far, on disk: a run that is killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cart_hf.errors import UserError
from cart_hf.evaluation.results import Results
from cart_hf.recipe import Evaluation, Recipe

LEDGER_FILE = "points.json"


@dataclass(frozen=True)
class Measured:
    """What is known of a model that was made and measured.

    :param results: every task's result.
    :param adapter_bytes: size of its adapters' files; 0 when it has none.
    """

    results: Results
    adapter_bytes: int = 0


def point_of(variant: Recipe, evaluation: Evaluation) -> dict[str, Any]:
    """Return what a measurement is known by: what was made, and the examples it was measured on."""
    return {"recipe": variant.to_yaml(), "split": evaluation.split, "limit": evaluation.limit}


class Ledger:
    """What was measured, by what it was measured of.

    :param folder: where it is kept.
    :param about: what all of them have in common (weights, tasks, data); another value makes the earlier ones void.
    :raises UserError: when the folder's ledger cannot be read.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._path = folder / LEDGER_FILE
        self._about = dict(about)
        self._found: dict[str, Any] = {}
        if self._path.is_file():
            try:
                self._found = dict(json.loads(self._path.read_text(encoding="utf-8")))
            except (OSError, ValueError) as failure:
                raise UserError(f"{self._path} cannot be read ({failure}); --overwrite starts again") from failure

    def get(self, **point: Any) -> Measured | None:
        """Return what is known of a point, or None when it has not been measured."""
        stored = self._found.get(self._key(point))
        if stored is None:
            return None
        results = {name: value for name, value in stored.items() if name != "adapter_bytes"}
        return Measured(Results.from_dict(results), stored.get("adapter_bytes", 0))

    def put(self, measured: Measured, **point: Any) -> None:
        """Keep what is known of a point."""
        of_adapters = {"adapter_bytes": measured.adapter_bytes} if measured.adapter_bytes else {}
        self._found[self._key(point)] = measured.results.to_dict() | of_adapters
        self.save()

    def save(self) -> None:
        """Write the file, so that it is whole at any moment."""
        beside = self._path.with_name(f".{LEDGER_FILE}.partial")
        try:
            beside.write_text(json.dumps(self._found) + "\n", encoding="utf-8")
            beside.replace(self._path)
        except OSError as failure:
            raise UserError(f"cannot write {self._path}: {failure.strerror or failure}") from failure

    def _key(self, point: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps([self._about, point], sort_keys=True).encode()).hexdigest()[:32]
