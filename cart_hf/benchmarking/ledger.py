"""What a benchmark has measured so far, on disk: a run that is killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cart_hf.errors import UserError
from cart_hf.evaluation.results import Results

LEDGER_FILE = "points.json"


class Ledger:
    """Results by what they are results of.

    :param folder: the benchmark's folder.
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

    def get(self, **point: Any) -> Results | None:
        """Return the results of a point, or None when it has not been measured."""
        stored = self._found.get(self._key(point))
        return None if stored is None else Results.from_dict(stored)

    def put(self, results: Results, **point: Any) -> None:
        """Keep the results of a point."""
        self._found[self._key(point)] = results.to_dict()
        beside = self._path.with_name(f".{LEDGER_FILE}.partial")
        try:
            beside.write_text(json.dumps(self._found) + "\n", encoding="utf-8")
            beside.replace(self._path)
        except OSError as failure:
            raise UserError(f"cannot write {self._path}: {failure.strerror or failure}") from failure

    def _key(self, point: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps([self._about, point], sort_keys=True).encode()).hexdigest()[:32]
