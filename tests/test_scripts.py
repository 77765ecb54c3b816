"""The scripts, run as a user runs them: what they write is what `cart-hf evaluate` and `cart-hf merge` find."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import make_family
from commands import call, succeed
from safetensors.torch import load_file, save_file
from small_tasks import save_tokenizer, write_split, write_tasks
from transformers import AutoModelForSequenceClassification

SCRIPTS = Path(__file__).parents[1] / "scripts"
PAIRS = ["same", "other"]


def script_named(name: str) -> ModuleType:
    with mock.patch.object(sys, "path", [str(SCRIPTS), *sys.path]):
        return importlib.import_module(name)


def run(name: str, *arguments: object) -> None:
    """Run a script's ``main`` in this process."""
    script = script_named(name)
    with mock.patch.object(sys, "argv", [f"{name}.py", *map(str, arguments)]):
        script.main()


def finetune(folder: Path, *arguments: str) -> None:
    """Run `finetune_text.py` on tasks below ``folder``."""
    where = ["--data", folder / "data", "--tasks-file", folder / "tasks.yaml", "--output", folder / "models"]
    steps = ["--steps", 100, "--batch-size", 8, "--lr", "1e-2"]
    run("finetune_text", "--base", folder / "base", *where, *steps, "--tasks", *arguments)


def texts(count: int) -> tuple[list[str], list[str], list[int]]:
    """Return pairs of texts and their labels, which only the second text tells."""
    labels = [row % 3 % 2 for row in range(count)]
    return (
        ["ab ba" if row % 2 else "ba" for row in range(count)],
        ["bbb" if label else "aaa" for label in labels],
        labels,
    )


def evaluated(folder: Path, task: str, split: str, output: Path) -> dict:
    """Return the result of `cart-hf evaluate` for a checkpoint that the script wrote."""
    where = ["--tasks-file", folder / "tasks.yaml", "--data", folder / "data", "--output", output]
    succeed("evaluate", folder / "models" / task, "--tasks", task, "--split", split, *where)
    return json.loads(output.read_text())["tasks"][task]


def test_finetune_text(tmp_path: Path, own_caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_family(tmp_path, "roberta", tasks=0)
    save_tokenizer("roberta", tmp_path / "base")
    for split, count in (("train", 96), ("validation", 30), ("test", 21)):
        left, right, labels = texts(count)
        hidden = [-1] * count if split == "test" else labels
        write_split(tmp_path / "data" / "pairs", split, {"one": left, "two": right, "label": hidden}, label=PAIRS)
        degrees = [5.0 * label + 0.1 * (row % 3) for row, label in enumerate(labels)]
        write_split(tmp_path / "data" / "degrees", split, {"text": right, "label": degrees})
    pairs = {"kind": "text-classification", "text": ["one", "two"], "max_length": 16}
    degrees = {"kind": "text-regression", "text": "text", "metrics": ["pearson", "spearman"], "score": "mean"}
    write_tasks(tmp_path / "tasks.yaml", pairs=pairs, degrees={**degrees, "max_length": 16})

    finetune(tmp_path, "pairs")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["pairs"]
    made = (tmp_path / "models" / "pairs" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    finetune(tmp_path, "pairs", "degrees")  # takes up where the first one stopped
    assert "pairs: finished already, skipped" in capsys.readouterr().out
    assert (tmp_path / "models" / "pairs" / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(SystemExit) as exit_:
        finetune(tmp_path, "pairs", "--seed", "1")
    assert exit_.value.code == 2
    assert "was made with seed 0, not 1" in capsys.readouterr().err

    record = json.loads((tmp_path / "models" / "pairs" / "training.json").read_text())
    assert "test" not in record  # its labels are hidden
    assert (record["validation"]["constant"], record["validation"]["score"]) == (20 / 30, 1.0)
    config = json.loads((tmp_path / "models" / "pairs" / "config.json").read_text())
    assert (config["id2label"], config["problem_type"]) == ({"0": "same", "1": "other"}, "single_label_classification")
    result = evaluated(tmp_path, "pairs", "validation", tmp_path / "pairs.json")
    assert (result["score"], result["metrics"]) == (1.0, record["validation"]["metrics"])

    record = json.loads((tmp_path / "models" / "degrees" / "training.json").read_text())
    config = json.loads((tmp_path / "models" / "degrees" / "config.json").read_text())
    assert (len(config["id2label"]), config["problem_type"]) == (1, "regression")
    assert record["test"]["score"] > 0.8 > record["test"]["constant"] == 0
    result = evaluated(tmp_path, "degrees", "test", tmp_path / "degrees.json")
    assert result["metrics"] == pytest.approx(record["test"]["metrics"])
    assert result["score"] == pytest.approx(record["test"]["score"])


def test_benchmark_multitask(tmp_path: Path, own_caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, models = make_family(tmp_path, "roberta")
    save_tokenizer("roberta", base)
    merged = tmp_path / "merged"
    succeed("merge", "--base", base, "--models", *models, "--method", "average", "--output", merged)
    write_split(tmp_path / "data" / "spoken", "test", {"text": [*texts(5)[1], "a b c d"]})
    write_tasks(tmp_path / "tasks.yaml", spoken={"kind": "text-classification", "text": "text"})
    small = ("--rounds", "3", "--batch-size", "4", "--output", tmp_path / "out.json")

    run(
        "benchmark_multitask",
        merged,
        "--tasks",
        "spoken",
        "--tasks-file",
        tmp_path / "tasks.yaml",
        "--data",
        tmp_path / "data",
        *small,
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["tasks"], found["texts"]) == (["task0", "task1", "task2"], 6)
    assert found["ratio"] == median(found["seconds"]["one_by_one"]) / median(found["seconds"]["together"])
    assert found["ratio_lowest"] <= found["ratio_highest"]
    heads = [(merged / "tasks" / f"task{task}" / "head.safetensors").stat().st_size for task in range(3)]
    alone, together = (found["parameter_bytes"][way] for way in ("one_by_one", "together"))
    backbone = (alone - together) / 2  # two of the three copies are saved, the heads are needed either way
    assert 0 < together - backbone < sum(heads)
    assert f"| ratio | {found['ratio']:.2f} x" in capsys.readouterr().out

    run("benchmark_multitask", merged, "--limit", "10", "--length", "7", *small)
    assert json.loads((tmp_path / "out.json").read_text())["tokens"] == 70


def test_compare_methods_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, merged in enumerate((0.6, 0.7, 0.8)):
        rows = {"individual": (0.5, 1.0, {}), "CART": (merged, merged, {"scale": 2.5}), "other": (0.1, 0.1, {})}
        written = [
            {"name": name, "parameters": told, "tasks": {"a": {"score": a}, "b": {"score": b}}}
            for name, (a, b, told) in rows.items()
            if seed or name != "other"
        ]
        (tmp_path / f"{seed}.json").write_text(json.dumps({"rows": written}))
    run("compare_methods", "scores", *sorted(tmp_path.glob("*.json")))
    _, _, first, second, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("| individual | 75.0 ± 0.0 | 100.0 ± 0.0 |")
    assert second.split(" | ")[:3] == ["| CART", "70.0 ± 10.0", "105.0 ± 15.0"]  # of m / 0.5 and m
    assert not any(rest)  # a row that one of the tables lacks is left out


def test_the_benchmark_compares_equals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, models = make_family(tmp_path, "roberta", tasks=2)
    merged = tmp_path / "merged"
    succeed("merge", "--base", base, "--models", *models, "--method", "average", "--output", merged)
    capsys.readouterr()
    file = merged / "tasks" / "task1" / "backbone.safetensors"
    tensors = {name: tensor + 0.1 for name, tensor in load_file(file).items()}
    file.unlink()  # it is a link to the shared backbone
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SystemExit) as exit_:
        run(
            "benchmark_multitask",
            merged,
            "--device",
            "cpu",
            "--limit",
            "4",
            "--length",
            "5",
            "--output",
            tmp_path / "out.json",
        )
    assert exit_.value.code == 2
    assert "the logits of the two differ" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def rates_once(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    """Measure the machine's products once where the script takes the best of ten, a third of a minute of both cores."""
    threads = torch.get_num_threads()
    with mock.patch.object(script_named("merge_peers"), "range", lambda _: [0], create=True):
        run("merge_peers", "products")
    torch.set_num_threads(threads)
    rates: dict[str, float] = json.loads(capsys.readouterr().out)
    return rates


class Here:
    """In place of `subprocess`: the dry run, which nobody measures, is called in this process."""

    @staticmethod
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "--dry-run" not in command:
            return subprocess.run(command, **options)
        answer = call(*command[command.index("cart_hf") + 1 :])
        return subprocess.CompletedProcess(command, answer.code, answer.out, answer.err)


def test_benchmark_merge(tmp_path: Path, own_caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--work", tmp_path, "--shape", "encoder", "--models", "3", "--layers", "1"]
    rows = ["--rounds", "1", "--rows", "cart", "official", "copy-models"]
    with (
        mock.patch.object(script_named("benchmark_merge"), "product_rates", lambda: rates_once(capsys)),
        mock.patch.object(script_named("merge_commands"), "subprocess", Here),
    ):
        run("benchmark_merge", "run", *small, *rows, "--output", tmp_path / "run.json")
    found = json.loads((tmp_path / "run.json").read_text())
    assert [rates.keys() for rates in found["products"]] == [{"float32", "float64"}]
    assert min(found["products"][0].values()) > 0
    assert [row["name"] for row in found["rows"]] == ["cart", "official", "copy-models"]
    assert all(row["seconds"][0] > 0 and row["peak_bytes"][0] > 5e6 for row in found["rows"])
    assert found["agreement"]["official"] < 1e-4  # the same merge: an update of 2 %, within 1e-3 of the truth
    n, m, k = 256, 1024, 20  # four square matrices and two of the MLP, for each of three models
    square = n * n * n + 4 / 3 * n**3 + 2 * n * n * k + 4 * n * n * k
    wide = n * n * m + 4 / 3 * n**3 + 2 * n * n * k + 4 * n * m * k
    assert found["cart_flops"] == pytest.approx(3 * (4 * square + 2 * wide))
    assert "| CART | the authors' procedure, rebuilt |" in capsys.readouterr().out


def test_checkpoints_of_real_shape(tmp_path: Path) -> None:
    checkpoints = script_named("merge_checkpoints")
    with mock.patch.object(checkpoints, "MAX_SHARD", 3_000_000):
        _, models = checkpoints.build(tmp_path, "encoder", 2, layers=1)
        empty = checkpoints.build(tmp_path, "encoder", 1, layers=1, empty=True)[1][0]
    assert len(list(models[0].glob("*.safetensors"))) > 1
    loaded, info = AutoModelForSequenceClassification.from_pretrained(models[0], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    update = checkpoints.read(checkpoints.open_weights(models[1]), "roberta.encoder.layer.0.output.dense.weight")
    weight = loaded.state_dict()["roberta.encoder.layer.0.output.dense.weight"]
    assert 0.01 < float((update - weight).std() / weight.std()) < 0.05
    sizes = {path.name: path.stat().st_size for path in models[0].glob("*.safetensors")}
    assert {path.name: path.stat().st_size for path in empty.glob("*.safetensors")} == sizes


def test_adapt_step(tmp_path: Path, own_caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = ["plain", "disk", "each-step", "each-forward"]
    small = ["--shape", "encoder", "--counts", 2, "--steps", 1, "--rounds", 1, "--batch-size", 2, "--length", 4]
    which = ["--methods", "cart", "--ways", *ways, "--threads", 1, "--output", tmp_path / "steps.json"]
    threads = torch.get_num_threads()
    with mock.patch.object(script_named("adapt_step"), "alone", lambda words: run("adapt_step", *words)):
        run("adapt_step", "run", "--work", tmp_path, *small, *which)  # in this process, which has imported everything
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ways
    for row in rows:
        (measured,) = row["runs"]
        assert len(measured["seconds"]) == len(measured["cpu_seconds"]) == 1
        assert measured["peak_bytes"] >= measured["step_bytes"]
        assert row["apart"] is None if row["way"] == "plain" else row["apart"] < 1e-4  # two steps of Adam are 2e-3
    assert "| cart | 2 | formed in the graph, each forward |" in capsys.readouterr().out
