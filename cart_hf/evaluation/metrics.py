"""Metrics as `evaluate.Metric` classes that need no network, and the fall-through to `evaluate.load`.

``evaluate.load("glue")`` downloads a script; these compute the same numbers from the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats

from cart_hf.errors import UserError

_CITATION = "cart-hf; the definitions are scikit-learn's and SciPy's"


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the share of equal labels."""
    return float(np.mean(predictions == references))


def f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the F1 of label 1 among labels 0 and 1, as GLUE scores MRPC and QQP."""
    if references.max(initial=0) > 1:
        raise UserError("metric 'f1' is for two labels; use f1_macro for more")
    return _f1_of(1, predictions, references)


def f1_macro(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the mean F1 over the labels that occur."""
    occurring = np.union1d(predictions, references)
    return float(np.mean([_f1_of(label, predictions, references) for label in occurring]))


def matthews(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return Matthews' correlation, over any number of labels (Gorodkin, 2004); 0 when one side is constant."""
    labels = np.union1d(predictions, references)
    truth, guess = (references[:, None] == labels).astype(float), (predictions[:, None] == labels).astype(float)

    def covariance(left: np.ndarray, right: np.ndarray) -> float:
        return float(np.sum((left - left.mean(0)) * (right - right.mean(0))))

    spread = covariance(truth, truth) * covariance(guess, guess)
    return covariance(truth, guess) / np.sqrt(spread) if spread > 0 else 0.0


def pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return Pearson's correlation; 0 when one side is constant."""
    return _correlation(stats.pearsonr, predictions, references)


def spearman(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return Spearman's rank correlation; 0 when one side is constant."""
    return _correlation(stats.spearmanr, predictions, references)


def _correlation(measure: Callable[..., Any], predictions: np.ndarray, references: np.ndarray) -> float:
    if len(references) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(measure(predictions, references)[0])


def _f1_of(label: int, predictions: np.ndarray, references: np.ndarray) -> float:
    found, true = predictions == label, references == label
    both = np.sum(found & true)
    return float(2 * both / max(1, np.sum(found) + np.sum(true)))


_CLASSIFICATION = {function.__name__: function for function in (accuracy, f1, f1_macro, matthews)}
_REGRESSION = {function.__name__: function for function in (pearson, spearman)}


class Metric(evaluate.Metric):  # type: ignore[misc]
    """One of the functions above as a metric of the `evaluate` library; ``config_name`` says which."""

    def _info(self) -> evaluate.MetricInfo:
        kind = "int64" if self.config_name in _CLASSIFICATION else "float64"
        features = datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)})
        function = _function(self.config_name)
        return evaluate.MetricInfo(
            description=str(function.__doc__), citation=_CITATION, features=features, inputs_description=""
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return {self.config_name: _function(self.config_name)(np.asarray(predictions), np.asarray(references))}


def check(names: Sequence[str]) -> None:
    """Refuse metrics that there are not, before a model is run for them.

    :raises UserError: for a metric that is not built in and that `evaluate` cannot load.
    """
    for name in names:
        _load(name)


def compute(names: Sequence[str], predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Return every metric by name.

    :param predictions, references: labels (int64) or values (float64), shape (examples,).
    :raises UserError: as :func:`check`, and for ``f1`` of more than two labels.
    """
    found: dict[str, float] = {}
    for name in names:
        values = _load(name).compute(predictions=predictions, references=references)
        numbers = {key: float(value) for key, value in values.items() if np.ndim(value) == 0}
        found |= {name: next(iter(numbers.values()))} if len(numbers) == 1 else numbers
    return found


def _function(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    return (_CLASSIFICATION | _REGRESSION)[name]


def _load(name: str) -> Any:
    if name in _CLASSIFICATION or name in _REGRESSION:
        return Metric(config_name=name, keep_in_memory=True)
    try:
        return evaluate.load(name, keep_in_memory=True)
    except Exception as failure:  # the library raises what its downloads raise
        known = ", ".join([*_CLASSIFICATION, *_REGRESSION])
        raise UserError(
            f"metric '{name}': not built in ({known}), and `evaluate` cannot load it: "
            f"{(str(failure).splitlines() or [''])[0][:200]}"
        ) from failure
