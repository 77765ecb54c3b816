"""Scores and searches that are shown beside an analysis: read from what the other commands write, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from analysis_documents import tuning

from cart_hf.analysis.results import read_results, read_tuning
from cart_hf.benchmarking.report import as_json
from cart_hf.benchmarking.rows import COMPRESS, Row
from cart_hf.benchmarking.run import BenchmarkResult
from cart_hf.errors import UserError
from cart_hf.evaluation.results import Results, TaskResult
from cart_hf.recipe import Evaluation

ALONE = {"sst2": 0.8, "rte": 0.5}


def results(scores: dict[str, float], *, individual: dict[str, float] = ALONE, **errors: str) -> Results:
    tasks = {task: TaskResult({"accuracy": score}, score, "accuracy", 8, 0.1) for task, score in scores.items()}
    return Results("/home/someone/merged", None, None, None, tasks, errors, individual)


def write_benchmark(folder: Path) -> Path:
    rows = [
        Row("individual", None, {}, (), results(ALONE)),
        Row("CART", "cart", {"rank_ratio": 0.08, "scale": 1.5}, (), results({"sst2": 0.6, "rte": 0.5}), nbytes=90),
        Row("TIES", "ties", {}, (), results({"sst2": 0.4}, rte="no labels")),
        Row("CART-Indexing 8 %", COMPRESS, {"rank_ratio": 0.08}, (), results({"sst2": float("nan"), "rte": 0.5})),
    ]
    told = as_json(BenchmarkResult(folder, rows, Evaluation(tasks=["sst2", "rte"]), None))
    (folder / "benchmark.json").write_text(json.dumps(told))
    return folder


def test_a_benchmark(tmp_path: Path) -> None:
    found = read_results(write_benchmark(tmp_path))
    assert (found["source"], found["tasks"]) == ("benchmark", ["sst2", "rte"])
    individual, cart, ties, indexing = found["rows"]
    assert individual == {
        **{"name": "individual", "method": None, "settings": "", "scores": ALONE, "average": 0.65},
        **{"normalized": 1.0, "nbytes": None},
    }
    assert (cart["name"], cart["method"], cart["settings"]) == ("CART", "cart", "rank_ratio 0.08, scale 1.5")
    assert (cart["average"], cart["normalized"], cart["nbytes"]) == (0.55, 0.875, 90)
    assert ties["scores"] == {"sst2": 0.4, "rte": None}
    assert (ties["average"], ties["normalized"]) == (None, None)  # of the other tasks alone it would mislead
    assert (indexing["scores"], indexing["average"]) == ({"sst2": None, "rte": 0.5}, None)
    assert read_results(tmp_path / "benchmark.json") == found
    json.dumps(found, allow_nan=False)


def test_an_evaluation(tmp_path: Path) -> None:
    results({"sst2": 0.6, "rte": 0.5}).save(tmp_path / "results.json")
    found = read_results(tmp_path)
    assert (found["source"], found["tasks"]) == ("evaluation", ["sst2", "rte"])
    merged, individual = found["rows"]
    assert merged == {
        **{"name": "merged model", "method": None, "settings": "", "scores": {"sst2": 0.6, "rte": 0.5}},
        **{"average": 0.55, "normalized": 0.875, "nbytes": None},
    }
    assert (individual["name"], individual["scores"], individual["average"]) == ("individual", ALONE, 0.65)
    results({"sst2": 0.6, "rte": 0.5}, individual={"sst2": 0.8}).save(tmp_path / "some.json")
    merged, individual = read_results(tmp_path / "some.json")["rows"]
    assert (merged["normalized"], individual["average"], individual["normalized"]) == (None, None, None)
    assert individual["scores"] == {"sst2": 0.8, "rte": None}
    results({"sst2": 0.6}, individual={}).save(tmp_path / "none.json")
    assert [row["name"] for row in read_results(tmp_path / "none.json")["rows"]] == ["merged model"]
    write_benchmark(tmp_path)
    assert read_results(tmp_path)["source"] == "benchmark"  # the larger one


def test_a_search(tmp_path: Path) -> None:
    told = tuning()
    (tmp_path / "tuning.json").write_text(json.dumps({"format": "cart-hf tuning 1", **told, "seconds": {}}))
    assert read_tuning(tmp_path) == told
    assert read_tuning(tmp_path / "tuning.json") == told


@pytest.mark.parametrize(
    ("reader", "file", "text", "message"),
    [
        (read_results, "a.json", None, "cannot read .*a.json: No such file.*expected a benchmark"),
        (
            read_results,
            "benchmark.json",
            "{",
            r"benchmark.json is not JSON: expected a benchmark \(benchmark.json\) or",
        ),
        (read_results, "a.json", "[]", "a.json holds no JSON object"),
        (read_results, "a.json", "{}", "a.json is neither what cart-hf benchmark writes nor what cart-hf evaluate"),
        (read_results, "a.json", '{"rows": [{"name": "x"}]}', "is neither what cart-hf benchmark writes"),
        (read_results, "a.json", '{"rows": 3}', "is neither what cart-hf benchmark writes"),
        (read_results, "a.json", '{"tasks": {"sst2": 0.5}}', "is neither what cart-hf benchmark writes"),
        (read_tuning, "a.json", None, r"cannot read .*a.json: No such file.*expected a search \(tuning.json\)"),
        (read_tuning, "a.json", "{}", "names no format; expected 'cart-hf tuning 1'"),
        (read_tuning, "a.json", '{"format": "cart-hf analysis 1"}', "its format is 'cart-hf analysis 1'; expected"),
        (read_tuning, "tuning.json", '{"format": "cart-hf tuning 1"}', "'points' is missing"),
        (read_tuning, "a.json", '{"format": "cart-hf tuning 1", "points": [3]}', "not what cart-hf tune writes"),
    ],
)
def test_what_is_neither_is_refused(tmp_path: Path, reader: Any, file: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message) as found:
        reader(tmp_path / file)
    assert len(found.value.problems) == 1


def test_a_folder_without_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("has no benchmark.json or results.json: expected the folder of a")):
        read_results(tmp_path)
    with pytest.raises(UserError, match=re.escape("has no tuning.json: expected the folder of a search")):
        read_tuning(tmp_path)
