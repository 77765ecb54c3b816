"""The metrics equal scikit-learn's and SciPy's, whatever is predicted."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn

from cart_hf.errors import UserError
from cart_hf.evaluation.metrics import compute

pytestmark = pytest.mark.usefixtures("own_caches")


def pairs(values: st.SearchStrategy, smallest: int = 1) -> st.SearchStrategy:
    """Draw predictions and references of one length."""
    return st.lists(st.tuples(values, values), min_size=smallest, max_size=40).map(lambda drawn: np.array(drawn).T)


def one(name: str, predictions: np.ndarray, references: np.ndarray) -> float:
    return compute([name], predictions, references)[name]


def undefined_is_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


ORACLES = {
    "accuracy": lambda p, r: sklearn.accuracy_score(r, p),
    "f1_macro": lambda p, r: sklearn.f1_score(r, p, average="macro", zero_division=0),
    "matthews": lambda p, r: sklearn.matthews_corrcoef(r, p),
    "pearson": lambda p, r: stats.pearsonr(p, r)[0],
    "spearman": lambda p, r: stats.spearmanr(p, r)[0],
}


@pytest.mark.parametrize("name", ["accuracy", "f1_macro", "matthews"])
@settings(max_examples=60, deadline=None)
@given(drawn=pairs(st.integers(0, 4)))
@example(drawn=np.array([[3], [3]]))
@example(drawn=np.array([[0, 0, 0], [0, 1, 2]]))
@example(drawn=np.array([[0, 1, 2], [2, 2, 2]]))
@example(drawn=np.array([[1, 1], [1, 1]]))
def test_over_several_labels(name: str, drawn: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of a single label
        expected = ORACLES[name](*drawn)
    assert one(name, *drawn) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(drawn=pairs(st.integers(0, 1)))
@example(drawn=np.array([[0], [0]]))
@example(drawn=np.array([[1, 1], [0, 0]]))
@example(drawn=np.array([[0, 0], [1, 1]]))
def test_f1_of_two_labels(drawn: np.ndarray) -> None:
    expected = sklearn.f1_score(drawn[1], drawn[0], zero_division=0)
    assert one("f1", *drawn) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@settings(max_examples=60, deadline=None)
@given(drawn=pairs(st.integers(-500, 500).map(lambda hundredths: hundredths / 100), smallest=2))
@example(drawn=np.array([[1.5, 1.5], [0.0, 5.0]]))
@example(drawn=np.array([[0.0, 5.0], [2.5, 2.5]]))
@example(drawn=np.array([[1.0, 1.0, 2.0], [3.0, 3.0, 3.0]]))
def test_correlations(name: str, drawn: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of a constant side
        expected = undefined_is_zero(float(ORACLES[name](*drawn)))
    assert one(name, *drawn) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_single_example_has_no_correlation(name: str) -> None:
    assert one(name, np.array([2.0]), np.array([3.0])) == 0.0


def test_an_image_that_cannot_be_decoded_is_wrong_for_every_metric() -> None:
    references, predictions = np.array([0, 1, 1, 0]), np.array([0, 1, -1, -1])
    found = compute(["accuracy", "f1", "f1_macro", "matthews"], predictions, references)
    assert found["accuracy"] == 0.5
    assert found["f1"] == pytest.approx(2 / 3)  # one of two found, none found wrongly
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["f1_macro"] == pytest.approx(ORACLES["f1_macro"](predictions, references))
        assert found["matthews"] == pytest.approx(ORACLES["matthews"](predictions, references))


def test_several_metrics_stand_in_the_order_they_were_named() -> None:
    found = compute(["accuracy", "f1"], np.array([1, 0, 1]), np.array([1, 1, 1]))
    assert list(found) == ["accuracy", "f1"]
    assert found == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(0.8)}


def test_f1_is_for_two_labels() -> None:
    with pytest.raises(UserError, match="'f1' is for two labels; use f1_macro"):
        compute(["f1"], np.array([0, 1]), np.array([2, 1]))


def test_a_metric_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    with pytest.raises(UserError, match=r"metric 'acuracy': not built in \(accuracy, f1"):
        compute(["acuracy"], np.array([0]), np.array([0]))


SCRIPT = """
import datasets
import evaluate


class Misses(evaluate.Metric):
    def _info(self):
        kind = datasets.Value("int64")
        features = datasets.Features({"predictions": kind, "references": kind})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        misses = sum(p != r for p, r in zip(predictions, references))
        return {"misses": misses, "rate": misses / len(references), "list": [misses]}
"""


def test_a_metric_of_ones_own_is_loaded_by_evaluate(tmp_path) -> None:
    (tmp_path / "misses.py").write_text(SCRIPT)
    path = str(tmp_path / "misses.py")
    assert compute([path], np.array([0, 1, 2, 2]), np.array([0, 1, 1, 1])) == {"misses": 2.0, "rate": 0.5}
