"""The demo's road, with training cut short: every step real, only fewer of them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaForMaskedLM

from cart_hf import MultiTaskModel, UserError
from cart_hf.cli.demo import reading
from cart_hf.demo.comparison import Row, accuracy, edges, encode, individual_accuracy
from cart_hf.demo.data import TASKS, clinc150, intents
from cart_hf.demo.run import run_demo
from cart_hf.demo.table import markdown
from cart_hf.demo.training import Training

GRIDS = {"average": {}, "cart": {"rank_ratio": [0.1], "scale": [1.0, 2.0]}}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    steps: dict[str, int] = {}

    def count(step: str, advance: int, total: int) -> None:
        steps[step] = steps.get(step, 0) + advance

    training = Training(pretraining_steps=100, head_steps=100, encoder_steps=20)
    result = run_demo(folder, training=training, grids=GRIDS, progress=count)
    return folder, result, steps


def test_packed_sentences_are_clinc150():
    data = clinc150()
    assert len(data) == 10
    for domain, splits in data.items():
        assert [len(splits[s].labels) for s in ("train", "validation", "test")] == [1500, 300, 450], domain
        assert len(intents(domain)) == 15
        assert set(splits["test"].labels) == set(range(15))
    assert "translate" in intents("travel")


def test_everything_is_left_on_disk_and_loads(demo):
    folder, result, steps = demo
    assert steps["pretraining a tiny RoBERTa"] == 100
    assert steps["fine-tuning it for 8 domains"] == 8
    RobertaForMaskedLM.from_pretrained(folder / "base")
    model = MultiTaskModel.from_pretrained(folder / "merged")
    assert model.tasks == sorted(TASKS)
    assert model.labels("travel") == intents("travel")
    assert not (folder / "work").exists()
    saved = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in saved["rows"]] == ["pretrained", "individual", "average", "cart"]
    assert (folder / "results.md").read_text() == markdown(result.rows)


def test_numbers_are_those_of_a_plain_loop(demo):
    """One task, sentence by sentence, with nothing but transformers."""
    folder, result, _ = demo
    rows = {row.name: row for row in result.rows}
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    test = clinc150()["banking"]["test"]
    for path, options, expected in (
        (folder / "models" / "banking", {}, rows["individual"].scores["banking"]),
        (folder / "merged", {"subfolder": "tasks/banking"}, rows["cart"].scores["banking"]),
    ):
        model = AutoModelForSequenceClassification.from_pretrained(path, **options).eval()
        right = 0
        with torch.no_grad():
            for sentence, label in zip(test.sentences, test.labels, strict=True):
                right += (
                    int(model(**tokenizer(sentence, truncation=True, return_tensors="pt")).logits.argmax()) == label
                )
        assert 100 * right / 450 == pytest.approx(expected)


def test_training_learnt_something(demo):
    """A short training is far above chance (1 in 15)."""
    _, result, _ = demo
    assert next(row for row in result.rows if row.name == "individual").average > 20


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
        return Row(name, {}, {"a": score, "b": score})

    good = [row("pretrained", 50), row("individual", 90), row("average", 70), row("ties", 72), row("cart", 75)]
    assert "loses 20.0 points, and CART wins 5.0 of them back" in " ".join(reading(good))
    assert "CART is the best merge here, 3.0 points before TIES" in " ".join(reading(good))
    bad = [row("pretrained", 50), row("individual", 90), row("average", 70), row("ties", 72), row("cart", 69)]
    assert "CART loses 1.0 more" in " ".join(reading(bad))
    assert "The best merge here is TIES, 3.0 points before CART" in " ".join(reading(bad))


def test_edges_and_normalised():
    row = Row("cart", {"scale": 3.0, "rank_ratio": 0.1}, {"a": 45.0, "b": 80.0})
    assert edges(row, {"scale": [1.0, 2.0, 3.0], "rank_ratio": [0.1]}) == ["scale"]
    assert row.normalised(Row("individual", {}, {"a": 90.0, "b": 80.0})) == pytest.approx(75.0)


def test_batches_hold_every_example_once(demo):
    folder, _, _ = demo
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    batches = encode(tokenizer, [("a b", "c"), ("d", "e f g h"), ("i", "j")], [7, 8, 9], max_length=24, batch_size=2)
    assert sorted(label for _, labels in batches for label in labels.tolist()) == [7, 8, 9]
    model = MultiTaskModel.from_pretrained(folder / "merged", tasks=["meta"])
    test = clinc150()["meta"]["test"]
    one = encode(tokenizer, test.sentences, test.labels, max_length=24, batch_size=1000)
    many = encode(tokenizer, test.sentences, test.labels, max_length=24, batch_size=7)
    assert accuracy(model, {"meta": one}) == accuracy(model, {"meta": many})
    assert individual_accuracy(str(folder / "models" / "meta"), one) > 0
