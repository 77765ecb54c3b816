"""The demo's road, with a smaller model and training cut short: every step real, only fewer of them."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from commands import succeed
from merge_children import CHILDREN
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaForMaskedLM

from cart_hf import MultiTaskModel, Recipe, Results, UserError
from cart_hf.benchmarking.rows import Row
from cart_hf.cli.demo import reading
from cart_hf.demo.data import TASKS, clinc150, intents
from cart_hf.demo.run import run_demo
from cart_hf.demo.training import SHAPE, Training
from cart_hf.evaluation.results import TaskResult

DOMAINS = TASKS[:4]
STEPS = 140
TEST_ROWS = 90
METHODS = ("average", {"method": "cart", "parameters": {"rank_ratio": 0.1}, "grid": {"scale": [1.0, 2.0]}})


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    steps: dict[str, int] = {}

    def count(step: str, advance: int, total: int) -> None:
        steps[step] = steps.get(step, 0) + advance

    training = Training(pretraining_steps=STEPS, head_steps=100, encoder_steps=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CART_HF_CACHE", str(folder.parent / "cache"))
        patch.setitem(sys.modules, "matplotlib", None)  # test_benchmark.py looks at the figures
        patch.setattr("cart_hf.demo.training.SHAPE", SHAPE | {"num_hidden_layers": 1})
        for place in ("data", "run"):
            patch.setattr(f"cart_hf.demo.{place}.TASKS", DOMAINS)
        patch.setattr("cart_hf.demo.run.TEST_ROWS", TEST_ROWS)
        patch.setattr("cart_hf.demo.run.VALIDATION_ROWS", 30)
        patch.setattr("cart_hf.demo.run.cores", lambda: 1)  # the other one is another test's
        # its processes are forked from one that has imported everything, where it would start each afresh
        patch.setattr("cart_hf.demo.run.multiprocessing", SimpleNamespace(get_context=lambda _: CHILDREN))
        result = run_demo(folder, training=training, methods=METHODS, progress=count)
    return folder, {row.name: row for row in result.benchmark.rows}, steps


def test_packed_sentences_are_clinc150():
    data = clinc150()
    assert len(data) == 10
    assert len(TASKS) == 8
    assert set(TASKS) < set(data)
    for domain, splits in data.items():
        assert [len(splits[s].labels) for s in ("train", "validation", "test")] == [1500, 300, 450], domain
        assert len(intents(domain)) == 15
        assert set(splits["test"].labels) == set(range(15))
    assert "translate" in intents("travel")


def test_everything_is_left_on_disk_and_loads(demo):
    folder, rows, steps = demo
    assert steps["pretraining a tiny RoBERTa"] == STEPS
    assert steps["fine-tuning it for 8 domains"] == len(DOMAINS)
    assert steps["choosing: CART"] == 2
    RobertaForMaskedLM.from_pretrained(folder / "base")
    model = MultiTaskModel.from_pretrained(folder / "merged")
    assert model.tasks == sorted(DOMAINS)
    assert model.labels("home") == intents("home")
    saved = json.loads((folder / "benchmark" / "benchmark.json").read_text())
    assert [row["name"] for row in saved["rows"]] == list(rows)
    assert list(rows) == ["pretrained", "individual", "weight average", "CART"]
    assert Recipe.load(folder / "recipe.yaml").benchmark is not None


def test_numbers_are_those_of_a_plain_loop(demo):
    """One task, sentence by sentence, with nothing but transformers."""
    folder, rows, _ = demo
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    test = clinc150()["banking"]["test"]
    every = len(test.labels) // TEST_ROWS  # rows are spread evenly
    for path, options, row in (
        (folder / "models" / "banking", {}, "individual"),
        (folder / "merged", {"subfolder": "tasks/banking"}, "CART"),
    ):
        model = AutoModelForSequenceClassification.from_pretrained(path, **options).eval()
        right = 0
        with torch.no_grad():
            for sentence, label in zip(test.sentences[::every], test.labels[::every], strict=True):
                right += (
                    int(model(**tokenizer(sentence, truncation=True, return_tensors="pt")).logits.argmax()) == label
                )
        assert rows[row].results.tasks["banking"].score == pytest.approx(right / TEST_ROWS)


def test_training_learnt_something(demo):
    """A short training is far above chance (1 in 15)."""
    assert demo[1]["individual"].results.average > 0.2


def test_what_the_demo_proposes_next(demo, monkeypatch):
    """The merged folder knows its tasks and data: evaluating it needs no flags."""
    folder, rows, _ = demo
    monkeypatch.setenv("CART_HF_CACHE", str(folder.parent / "cache"))
    answer = succeed("evaluate", folder / "merged", "--normalize", "--format", "json")
    found = Results.from_dict(json.loads(answer.out))
    assert found.average == rows["CART"].results.average
    assert found.normalized == pytest.approx(rows["CART"].results.normalized)


def test_adapters_bring_the_average_back_to_the_models(demo, tmp_path):
    folder, rows, _ = demo
    succeed("compress", folder / "recipe.yaml", tmp_path / "small")
    answer = succeed("evaluate", tmp_path / "small", "--format", "json")
    small = Results.from_dict(json.loads(answer.out))
    average, individual = (rows[name].results.average for name in ("weight average", "individual"))
    assert average < small.average
    assert individual - small.average < (individual - average) / 2


def test_an_existing_folder_is_not_overwritten(demo, tmp_path):
    folder, _, _ = demo
    with pytest.raises(UserError, match="exists"):
        run_demo(folder)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    with pytest.raises(UserError, match="not a finished demo"):
        run_demo(tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "file").exists()


def test_what_is_said_follows_the_numbers():
    def row(name: str, score: float) -> Row:
        result = TaskResult({"accuracy": score}, score, "accuracy", 100, 1.0)
        method = None if name in ("pretrained", "individual") else name
        title = {"cart": "CART", "ties": "TIES"}.get(name, name)
        return Row(title, method, {}, (), Results(name, None, None, None, {"a": result, "b": result}))

    start = [("pretrained", 0.5), ("individual", 0.9), ("average", 0.7), ("ties", 0.72)]
    good = " ".join(reading([row(*pair) for pair in [*start, ("cart", 0.75)]]))
    assert "loses 20.0 points, and CART wins 5.0 of them back" in good
    assert "CART is the best merge here, 3.0 points before TIES" in good
    bad = " ".join(reading([row(*pair) for pair in [*start, ("cart", 0.69)]]))
    assert "CART loses 1.0 more" in bad
    assert "The best merge here is TIES, 3.0 points before CART" in bad
