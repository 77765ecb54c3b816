"""One split of a task, read and checked: what the evaluators and the training scripts take."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cart_hf.errors import UserError, did_you_mean, shorten
from cart_hf.tasks.labels import contradict, plain, positions
from cart_hf.tasks.source import rows_of
from cart_hf.tasks.task import IMAGE, REGRESSION, Task

Keep = Callable[[np.ndarray], np.ndarray]
"""Takes the hashes of all inputs of a split, returns which of them are wanted: bool, of the same shape."""

_HASH_BYTES, _ROWS_AT_A_TIME = 8, 64


@dataclass(frozen=True)
class TaskData:
    """The examples of one split.

    :param task: whose they are.
    :param split: the logical name of the split.
    :param rows: a ``datasets.Dataset``; images stay encoded until :meth:`image` asks for one.
    :param labels: int64 (classification) or float64 (regression), shape (examples,); None when they are hidden.
    :param label_names: names in the order of the label ids; empty when nothing names them.
    :param source: where the rows came from, for people.
    """

    task: Task
    split: str
    rows: Any
    labels: np.ndarray | None
    label_names: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, indices: Sequence[int]) -> list[list[str]]:
        """Return the text columns (one or two) of some rows."""
        part = self.rows[list(indices)]
        return [part[column] for column in self.task.text]

    def image(self, index: int) -> Any:
        """Return one image as PIL, in RGB.

        :raises OSError: when it cannot be decoded.
        """
        import io

        from PIL import Image

        stored = _encoded(self.rows[index][self.task.image])
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as image:
            return image.convert("RGB")

    def input_hashes(self) -> np.ndarray:
        """Return a hash of each input: the same for the same texts or image file, whatever its row, file or label.

        :return: int64, shape (examples,).
        """
        return _input_hashes(self.task, self.rows)

    @property
    def fingerprint(self) -> str:
        """Return a name for exactly these examples: another file, row or label gives another."""
        labels = b"" if self.labels is None else self.labels.tobytes()
        parts = [str(self.rows._fingerprint).encode(), labels, "\n".join(self.label_names).encode()]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def load_split(
    task: Task,
    split: str | None = None,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    stream: bool = False,
    labelled: bool = True,
    keep: Keep | None = None,
) -> TaskData:
    """Read one split of a task.

    :param split: ``train``, ``validation``, ``test`` or a name of the dataset's own; default: the task's.
    :param data: folder that holds ``NAME/{split}.parquet`` (or CSV, TSV, JSON lines, or an image folder); default:
        the dataset that the task declares.
    :param limit: at most so many examples, spread evenly over the split, which is often ordered by class.
    :param stream: read the first ``limit`` rows of a Hub dataset over the network instead of all of it.
    :param labelled: refuse hidden labels.
    :param keep: which inputs to read, by their hashes (:meth:`TaskData.input_hashes`); ``limit`` spreads over these.
    :raises UserError: when the split, a column or a label is missing or wrong.
    """
    split = split or task.split
    if limit is not None and limit < 1:
        raise UserError(f"limit: must be at least 1, not {limit}")
    if stream and limit is None:
        raise UserError("--stream reads the first rows only: say how many with --limit")
    where = f"task '{task.name}'"
    rows, source = rows_of(task, split, data=Path(data) if data is not None else None, first=limit if stream else None)
    if len(rows) == 0:
        raise UserError(f"{where}: split '{split}' of {source} is empty")
    whole = rows = _declared_columns(task, rows)
    for column in task.text or (task.image,):
        _check_column(column, rows, where, source)
    if task.kind == IMAGE:
        rows = _keep_encoded(task, rows, where)
    if keep is not None:  # what has no text has no hash: all of the split is checked
        _check_texts(task, rows, where)
        rows = _kept(task, rows, keep, f"{where}: none of the {len(rows)} examples of split '{split}' of {source}")
    if limit is not None and limit < len(rows):
        rows = rows.select([i * len(rows) // limit for i in range(limit)])
    if keep is None:
        _check_texts(task, rows, where)
    labels, names = _labels(task, rows, whole, where, source, needed=labelled)
    if labels is None and labelled:
        raise UserError(
            f"{where}: the labels of split '{split}' are hidden; score another split (--split validation), "
            "or write the predictions for the leaderboard (--submission FILE.zip)"
        )
    return TaskData(task, split, rows, labels, names, source)


def _kept(task: Task, rows: Any, keep: Keep, none_of_them: str) -> Any:
    wanted = np.flatnonzero(keep(_input_hashes(task, rows)))
    if len(wanted) == 0:
        raise UserError(f"{none_of_them} is left to read")
    return rows if len(wanted) == len(rows) else rows.select(wanted.tolist())


def _input_hashes(task: Task, rows: Any) -> np.ndarray:
    """Return int64 hashes of inputs, shape (rows,); images are neither decoded nor held all at a time."""
    columns = list(task.text or (task.image,))
    batches = rows.select_columns(columns).iter(_ROWS_AT_A_TIME)
    parts = _images_of(batches, task.image) if task.kind == IMAGE else _texts_of(batches, columns)
    digests = (hashlib.blake2b(part, digest_size=_HASH_BYTES).digest() for part in parts)
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)


def _texts_of(batches: Iterator[Mapping[str, Any]], columns: Sequence[str]) -> Iterator[bytes]:
    """Yield each row's texts as bytes, each text after its length: ``a, bc`` is not ``ab, c``."""
    for batch in batches:
        for texts in zip(*(batch[column] for column in columns), strict=True):
            encoded = [text.encode() for text in texts]
            yield b"".join(len(text).to_bytes(8, "little") + text for text in encoded)


def _images_of(batches: Iterator[Mapping[str, Any]], column: str) -> Iterator[bytes]:
    """Yield each row's image file; one that is not there is empty."""
    for batch in batches:
        for stored in batch[column]:
            try:
                file = _encoded(stored)
                yield file if isinstance(file, bytes) else file.read_bytes()
            except OSError:
                yield b""


def _encoded(stored: Mapping[str, Any] | None) -> bytes | Path:
    """Return an image file: what it holds, or where it is.

    :raises OSError: when there is none.
    """
    stored = stored or {}
    if stored.get("bytes"):
        return bytes(stored["bytes"])
    if stored.get("path") is None:
        raise OSError("no image")
    return Path(stored["path"])


def _declared_columns(task: Task, rows: Any) -> Any:
    """Name plain ``image`` and ``label`` columns as the task declares them: a local copy need not keep the Hub's."""
    plain = {"label": task.label} | ({"image": task.image} if task.kind == IMAGE else {})
    have = rows.column_names
    return rows.rename_columns({name: own for name, own in plain.items() if name in have and own not in have})


def _check_column(column: str, rows: Any, where: str, source: str) -> None:
    if column not in rows.column_names:
        raise UserError(f"{where}: {source} has no column '{column}'{did_you_mean(column, rows.column_names)}")


def _check_texts(task: Task, rows: Any, where: str) -> None:
    for column in task.text:
        for row, text in enumerate(rows[column]):
            if not isinstance(text, str):
                raise UserError(f"{where}: row {row} has no text in column '{column}' (found {text!r})")


def _keep_encoded(task: Task, rows: Any, where: str) -> Any:
    import datasets

    feature = rows.features[task.image]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(task.image, datasets.Image(decode=False))
    if isinstance(feature, dict) and "bytes" in feature:  # Parquet that was written without datasets' features
        return rows
    raise UserError(f"{where}: column '{task.image}' does not hold images")


def _labels(
    task: Task, rows: Any, whole: Any, where: str, source: str, *, needed: bool
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return the labels and their names, in the order that the task declares.

    :param whole: the split without a limit, whose words name the labels where nothing else does.
    """
    declared = task.labels or task.classes
    if task.label not in rows.column_names and not needed:
        return None, declared
    _check_column(task.label, rows, where, source)
    values = list(rows[task.label])
    missing = next((row for row, value in enumerate(values) if value is None or value != value), None)
    if missing is not None and not needed:
        return None, declared or tuple(getattr(rows.features[task.label], "names", None) or ())
    if missing is not None:
        raise UserError(f"{where}: row {missing} has no label in column '{task.label}'")
    if task.kind == REGRESSION:
        degrees = _numbers(values, where, task.label)
        return (None if (degrees == -1).all() else degrees), ()
    if isinstance(values[0], str):
        names = declared or tuple(sorted(set(whole[task.label]) - {None}))
        return _numbers_of_words(task, values, names, where), names
    numbers = _numbers(values, where, task.label)
    ids = numbers.astype(np.int64)
    if not np.array_equal(ids, numbers):
        raise UserError(f"{where}: column '{task.label}' holds fractions; a regression is kind: text-regression")
    given = tuple(getattr(rows.features[task.label], "names", None) or ())
    if (ids == -1).all():
        return None, declared or given
    names = given or declared
    bad = np.flatnonzero((ids < 0) | (ids >= len(names))) if names else np.flatnonzero(ids < 0)
    if len(bad):
        known = f"there are {len(names)} labels" if names else "labels are numbered from 0"
        raise UserError(f"{where}: row {bad[0]} has label {ids[bad[0]]}, but {known}")
    order = _declared_order(task, given, declared, where)
    return ids if order is None else np.asarray(order)[ids], declared or given


def _numbers_of_words(task: Task, words: Sequence[str], names: Sequence[str], where: str) -> np.ndarray:
    """Return the number of each label that is written as a word: its name, its alias, or its class in a prompt."""
    spelled = [(name, *task.aliases.get(name, ()), *task.classes[i : i + 1]) for i, name in enumerate(names)]
    exact = {word: number for number, spellings in enumerate(spelled) for word in spellings}
    loose = {plain(word): number for word, number in exact.items()}
    if any(loose[plain(word)] != number for word, number in exact.items()):
        loose = {}  # labels that differ in case or punctuation only
    numbers = {word: exact.get(word, loose.get(plain(word))) for word in dict.fromkeys(words)}
    for word, number in numbers.items():
        if number is None:
            raise UserError(
                f"{where}: label '{word}' of row {words.index(word)} is none of the task's: {shorten(list(names))}"
            )
    return np.asarray([numbers[word] for word in words], dtype=np.int64)


def _declared_order(task: Task, given: tuple[str, ...], declared: tuple[str, ...], where: str) -> list[int] | None:
    """Return for each label id of the data the declared one, None when they are the same.

    Prompts spell class names in their own way, so names need not match; but they must not match crosswise.
    """
    if not given or not declared or given == declared:
        return None
    for names in filter(None, (task.labels, task.classes)):
        order = positions(given, names) or positions(names, given, task.aliases)
        if order is not None:
            return positions(given, names) or [order.index(i) for i in range(len(order))]
    if len(given) != len(declared):
        raise UserError(f"{where}: the data has {len(given)} labels, the task declares {len(declared)}")
    if contradict(given, declared):
        raise UserError(f"{where}: the data's labels are {list(given)[:4]} ..., the task's {list(declared)[:4]} ...")
    return None


def _numbers(values: list[Any], where: str, column: str) -> np.ndarray:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or numbers.ndim != 1:
        raise UserError(f"{where}: column '{column}' does not hold numbers or names")
    return numbers
