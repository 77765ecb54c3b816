"""Predictions as the GLUE leaderboard wants them: one zip of TSV files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from cart_hf.errors import UserError
from cart_hf.tasks import REGRESSION, TaskData, find_tasks

GLUE_SUITE = "glue-submission"
# The leaderboard refuses a zip without WNLI, which most models leave out: the majority class of its training set
# stands in, as in BERT's submission (Devlin et al., 2019, section 4.1).
_WNLI_FILE, _WNLI_ROWS, _WNLI_MAJORITY = "WNLI.tsv", 146, "0"
_STSB_RANGE = (0.0, 5.0)


class Submission:
    """Collects the predictions of an evaluation.

    :param path: the zip file to write.
    :raises UserError: when it exists and may not be replaced.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        if path.suffix != ".zip":
            raise UserError(f"--submission {path}: the leaderboard takes a .zip file")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; choose another name, or --overwrite to replace it")
        self._path = path
        self._sheets: dict[str, str] = {}

    def add(self, data: TaskData, predictions: np.ndarray) -> None:
        """Add one task's predictions, a label id or a value for each example of the split, in its order.

        :param data: examples of a task of the leaderboard.
        """
        form = data.task.submission
        assert form is not None
        if data.task.kind == REGRESSION:
            words = [f"{value:.3f}" for value in np.clip(predictions, *_STSB_RANGE)]
        else:
            words = [form.labels[label] if form.labels else str(label) for label in predictions]
        self._sheets[form.file] = _sheet(words)

    def write(self) -> None:
        """Write the zip.

        :raises UserError: when there is nothing to write, or the file cannot be written.
        """
        if not self._sheets:
            return
        sheets = {_WNLI_FILE: _sheet([_WNLI_MAJORITY] * _WNLI_ROWS)} | self._sheets
        partial = self._path.with_name(f".{self._path.name}.partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, text in sheets.items():
                    archive.writestr(name, text)
            partial.replace(self._path)
        except OSError as failure:
            raise UserError(f"cannot write {self._path}: {failure.strerror or failure}") from failure


def missing_files(path: Path) -> list[str]:
    """Return the files that the leaderboard expects and a submission does not hold."""
    with zipfile.ZipFile(path) as archive:
        present = set(archive.namelist())
    forms = [task.submission for task in find_tasks(suite=GLUE_SUITE)]
    return [form.file for form in forms if form is not None and form.file not in present]


def _sheet(words: list[str]) -> str:
    return "".join(f"{index}\t{word}\n" for index, word in [("index", "prediction"), *enumerate(words)])
