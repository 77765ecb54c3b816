"""Text models measured: what a plain loop finds, label by label, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from checkpoints import FAMILIES, copy_backbone, make_family, perturb, roberta_config, save
from commands import Answer, call, succeed
from plain_loops import forwards_of, outcomes, text_logits
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn import metrics as sklearn
from small_tasks import image_bytes, numbers, save_tokenizer, texts, write_split, write_tasks
from transformers import RobertaForMaskedLM, RobertaForSequenceClassification, RobertaModel

import cart_hf
from cart_hf.errors import UserError
from cart_hf.evaluation.results import Results
from cart_hf.recipe import Evaluation, Reference
from cart_hf.sources import fingerprint
from cart_hf.tasks import REGRESSION, TEXT, find_tasks

pytestmark = pytest.mark.usefixtures("own_caches")

COUNT = 11  # examples of each task: not a multiple of the batch
BATCH = 4
MOST = {"roberta": 18, "bert": 20, "gpt2": 20}  # tokens that the small checkpoints can read


@dataclass(frozen=True)
class World:
    """A base, three fine-tuned models, their merge, and a task for each."""

    folder: Path
    base: str
    models: list[str]
    merged: Path
    data: Path
    tasks_file: Path
    columns: Mapping[str, list[list[str]]]
    labels: Mapping[str, list[int]]

    def evaluation(self, *names: str, **changes: Any) -> Evaluation:
        given = {"tasks": names, "tasks_file": str(self.tasks_file), "data": str(self.data), "batch_size": BATCH}
        return Evaluation(**(given | changes))

    def arguments(self, *names: str) -> list[Any]:
        """Return the command line of an evaluation on some tasks."""
        return ["--tasks", *names, "--tasks-file", self.tasks_file, "--data", self.data, "--batch-size", BATCH]


LABELS = {
    "task0": ["roberta0-1", "roberta0-0"],  # the datasets' orders, which are not the heads'
    "task1": ["roberta1-2", "roberta1-0", "roberta1-1"],
    "task2": ["roberta2-0", "roberta2-1", "roberta2-2", "roberta2-3"],
}
HEAD_OF = {"task0": [1, 0], "task1": [2, 0, 1], "task2": [0, 1, 2, 3]}
"""For each label of a dataset the position of its logit."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base, models = make_family(folder, "roberta")
    save_tokenizer("roberta", base, *models)
    data, columns, labels = folder / "data", {}, {}
    for number, (name, names) in enumerate(LABELS.items()):
        columns[name] = [texts(COUNT, seed=10 * number + column, longest=6) for column in range(2 - number % 2)]
        centre(models[number], columns[name])
        labels[name] = numbers(COUNT, len(names), seed=number)
        rows = dict(zip(("first", "second"), columns[name], strict=False)) | {"label": labels[name]}
        write_split(data / name, "test", rows, label=names)
    tasks = {
        name: {"kind": TEXT, "text": ["first", "second"][: len(columns[name])], "metrics": ["accuracy", "f1_macro"]}
        for name in LABELS
    }
    tasks["task2"]["max_length"] = 7
    merged = folder / "merged"
    cart_hf.merge(base=base, models=models, output=merged, device="cpu", workers=1)
    tasks_file = write_tasks(folder / "mine.yaml", **tasks)
    return World(folder, base, models, merged, data, tasks_file, columns, labels)


def centre(folder: str, columns: list[list[str]]) -> None:
    """Make a small model call all its labels: without training it would say the same of every text."""
    model = RobertaForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.out_proj.bias -= torch.from_numpy(text_logits(folder, columns, 18).mean(0))
    save(model, Path(folder))


def expected(world: World, name: str, folder: Path | str, most: int = 18, **place: Any) -> np.ndarray:
    logits = text_logits(folder, world.columns[name], min(most, 7) if name == "task2" else most, **place)
    return logits[:, HEAD_OF[name]].argmax(axis=1)


def assert_scored(result: Any, predictions: np.ndarray, labels: list[int]) -> None:
    """Assert that a result holds scikit-learn's numbers."""
    assert result.metrics["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, predictions))
    assert result.metrics["f1_macro"] == pytest.approx(sklearn.f1_score(labels, predictions, average="macro"))
    assert result.metrics["mean"] == pytest.approx((result.metrics["accuracy"] + result.metrics["f1_macro"]) / 2)
    assert (result.score, result.metric) == (result.metrics["accuracy"], "accuracy")
    assert result.examples == len(labels)


# --- equal to a plain loop


@pytest.mark.parametrize("name", LABELS)
def test_a_plain_checkpoint_answers_as_in_a_plain_loop(world: World, name: str) -> None:
    model = world.models[int(name[-1])]
    found = outcomes(model, world.evaluation(name))[name]
    predictions = expected(world, name, model)
    assert found.predictions.tolist() == predictions.tolist()
    assert len(set(predictions)) > 1, "a test that any constant passes"
    assert_scored(found.result, predictions, world.labels[name])


def test_a_merged_folder_answers_as_each_of_its_task_folders(world: World) -> None:
    found = outcomes(world.merged, world.evaluation(*LABELS))
    assert list(found) == list(LABELS)
    for name, outcome in found.items():
        predictions = expected(world, name, world.merged, head=name, tokenizer=world.merged)
        assert outcome.predictions.tolist() == predictions.tolist(), name
        assert_scored(outcome.result, predictions, world.labels[name])
        alone = outcomes(world.merged / "tasks" / name, world.evaluation(name), base=world.base)
        assert alone[name].predictions.tolist() == predictions.tolist()


def test_a_checkpoint_without_a_tokenizer_borrows_the_bases(world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.models[0], model, ignore=shutil.ignore_patterns("tokenizer*"))
    found = outcomes(model, world.evaluation("task0"), base=world.base)["task0"]
    assert found.predictions.tolist() == expected(world, "task0", world.models[0]).tolist()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_other_families(tmp_path: Path, world: World, family: str) -> None:
    """BERT tells the two texts of a pair apart by token types; GPT-2's tokenizer has no padding token."""
    _, (model,) = make_family(tmp_path, family, tasks=1)
    save_tokenizer(family, model)
    labels = [f"{family}0-1", f"{family}0-0"]
    rows = {"first": world.columns["task0"][0], "second": world.columns["task0"][1], "label": world.labels["task0"]}
    write_split(tmp_path / "data" / "pair", "test", rows, label=labels)
    write_split(tmp_path / "data" / "single", "test", rows, label=labels)
    tasks_file = write_tasks(
        tmp_path / "mine.yaml",
        pair={"kind": TEXT, "text": ["first", "second"]},
        single={"kind": TEXT, "text": "first"},
    )
    asked = Evaluation(tasks_file=str(tasks_file), data=str(tmp_path / "data"), batch_size=BATCH)
    found = outcomes(model, asked)
    for name, columns in (("pair", world.columns["task0"]), ("single", world.columns["task0"][:1])):
        logits = text_logits(model, columns, MOST[family])
        assert found[name].error is None
        assert found[name].predictions.tolist() == logits[:, [1, 0]].argmax(axis=1).tolist()


def test_a_regression_equals_scipy(world: World, regression: Path) -> None:
    columns = world.columns["task0"]
    degrees = [float(i % 6) for i in range(COUNT)]
    write_split(world.data / "degree", "test", {"first": columns[0], "second": columns[1], "label": degrees})
    declared = {"kind": REGRESSION, "text": ["first", "second"], "metrics": ["pearson", "spearman"], "score": "mean"}
    tasks_file = write_tasks(world.folder / "degree.yaml", degree=declared)
    found = outcomes(regression, world.evaluation("degree", tasks_file=str(tasks_file)))["degree"]
    values = text_logits(regression, columns, 18)[:, 0]
    np.testing.assert_allclose(found.predictions, values, atol=1e-5)
    metrics = {"pearson": stats.pearsonr(values, degrees)[0], "spearman": stats.spearmanr(values, degrees)[0]}
    metrics["mean"] = sum(metrics.values()) / 2
    assert found.result.metrics == pytest.approx(metrics, abs=1e-5)
    assert (found.result.metric, found.result.score) == ("mean of pearson and spearman", found.result.metrics["mean"])


@pytest.fixture(scope="module")
def regression(world: World) -> Path:
    torch.manual_seed(3)
    config = roberta_config(num_labels=1, problem_type="regression")
    model = RobertaForSequenceClassification(config)
    perturb(model, 5, size=0.2)
    save(model, world.folder / "regression")
    save_tokenizer("roberta", world.folder / "regression")
    return world.folder / "regression"


def test_long_texts_are_cut_where_the_task_says(world: World) -> None:
    model = world.models[2]
    uncut = text_logits(model, world.columns["task2"], 18)
    cut = text_logits(model, world.columns["task2"], 7)
    assert not np.allclose(uncut, cut, atol=1e-3), "no text is long enough"
    lengths = {}
    with forwards_of(RobertaModel) as seen:
        for most in (None, 7, 100):
            name = f"until_{most}"
            declared = {"kind": TEXT, "text": "first", "max_length": most, "folders": ["task2"]}
            tasks_file = write_tasks(world.folder / "cut.yaml", **{name: declared})
            seen.clear()
            outcome = outcomes(model, world.evaluation(name, tasks_file=str(tasks_file)))[name]
            assert outcome.error is None
            lengths[most] = max(inputs["input_ids"].shape[1] for inputs in seen)
    # 128 (the default), none and 100 are more than the model can read
    assert lengths == {None: 18, 7: 7, 100: 18}


def test_the_backbone_reads_a_text_once_for_all_heads(world: World) -> None:
    rows = {"first": world.columns["task2"][0], "a": [0, 1] * 5 + [0], "b": [0, 1, 2] * 3 + [0, 1]}
    write_split(world.folder / "shared", "test", rows)
    shared = {"kind": TEXT, "text": "first", "dataset": "shared", "label_mapping": "index"}
    tasks_file = write_tasks(
        world.folder / "shared.yaml",
        task0=shared | {"label": "a"},
        task1=shared | {"label": "b"},
        other=shared | {"label": "b", "head": "task1", "max_length": 5},
    )
    asked = world.evaluation("task0", "task1", tasks_file=str(tasks_file), data=None)
    with forwards_of(RobertaModel) as seen:
        together = outcomes(world.merged, asked)
        assert len(seen) == 3  # 11 examples, 4 at a time
        seen.clear()
        outcomes(world.merged, asked.model_copy(update={"tasks": ("task0", "other")}))
        assert len(seen) == 6  # other texts: cut differently
    for name, column in (("task0", "a"), ("task1", "b")):
        logits = text_logits(world.merged, [rows["first"]], 18, head=name, tokenizer=world.merged)
        assert together[name].predictions.tolist() == logits.argmax(axis=1).tolist()
        assert together[name].result.metrics["accuracy"] == np.mean(logits.argmax(axis=1) == rows[column])


def test_bfloat16_runs_under_autocast(world: World) -> None:
    exact = outcomes(world.merged, world.evaluation("task0"))["task0"]
    rough = outcomes(world.merged, world.evaluation("task0", dtype="bfloat16"))["task0"]
    assert rough.error is None
    assert rough.result.settings != exact.result.settings
    assert np.mean(rough.predictions == exact.predictions) > 0.7


# --- labels


def labelled(world: World, folder: Path, names: list[str] | None, **declared: Any) -> Evaluation:
    """Return an evaluation of a three-way task whose data names its labels so."""
    rows = {"first": world.columns["task1"][0], "label": [i % 3 for i in range(COUNT)]}
    write_split(folder / "way", "test", rows, **({"label": names} if names else {}))
    tasks_file = write_tasks(folder / "way.yaml", way={"kind": TEXT, "text": "first", **declared})
    return world.evaluation("way", tasks_file=str(tasks_file), data=str(folder))


ORDERS = [["e", "n", "c"], ["c", "e", "n"], ["c", "n", "e"]]


@pytest.mark.parametrize("order", ORDERS)
def test_labels_are_matched_by_name(world: World, tmp_path: Path, order: list[str]) -> None:
    """MNLI's three labels stand in another order in every other checkpoint."""
    model = renamed(
        world.models[1],
        tmp_path / "model",
        [{"e": "ENTAILMENT", "n": "Neutral", "c": "contradiction"}[o] for o in order],
    )
    asked = labelled(world, tmp_path, ["entailment", "neutral", "contradiction"])
    found = outcomes(model, asked)["way"]
    words = np.array(order)[text_logits(model, world.columns["task1"], 18).argmax(axis=1)]
    assert [("e", "n", "c")[label] for label in found.predictions] == words.tolist()
    trusting = outcomes(model, asked.model_copy(update={"label_mapping": "index"}))["way"]
    assert [order[label] for label in trusting.predictions] == words.tolist()


def renamed(model: str, folder: Path, labels: list[str]) -> Path:
    """Return a copy of a model with other label names."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(enumerate(labels))
    config["label2id"] = {label: i for i, label in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_aliases_are_other_words_for_a_label(world: World, tmp_path: Path) -> None:
    model = renamed(world.models[1], tmp_path / "model", ["no", "yes", "maybe"])
    aliases = {"entailment": ["yes"], "neutral": ["maybe"], "contradiction": ["no", "never"]}
    found = outcomes(model, labelled(world, tmp_path, None, labels=list(aliases), aliases=aliases))["way"]
    logits = text_logits(model, world.columns["task1"], 18)[:, [1, 2, 0]]
    assert found.predictions.tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize(
    ("head", "names", "declared", "message"),
    [
        (["a", "b", "c"], ["x", "y", "z"], {}, "the head's labels (a, b, c) are not the data's (x, y, z)"),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["x", "y", "z"], {}, "the head's labels are only numbered (LABEL_0, LABEL_1, LABEL_2 ...)"),
        (["a", "b", "c"], None, {}, "nothing names the data's labels: add `labels: [...]` to the task"),
        (["a", "b", "c"], ["a", "b", "c", "d"], {}, "the head's labels (a, b, c) are not the data's (a, b, c, d)"),
        (["a", "b", "c"], ["a", "b", "c", "d"], {"label_mapping": "index"}, "the data has 4 labels, the head 3"),
        (["a", "a", "b"], ["a", "b", "c"], {}, "the head's labels (a, a, b) are not"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_matched_stop_the_task(
    world: World, tmp_path: Path, head: list[str], names: list[str] | None, declared: dict[str, Any], message: str
) -> None:
    model = renamed(world.models[1], tmp_path / "model", head)
    error = outcomes(model, labelled(world, tmp_path, names, **declared))["way"].error
    assert error.startswith(f"task 'way': {message}")
    assert "--label-mapping index" in error or "index" in declared.values()


# --- results


def test_the_results_file(world: World, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "results.json"
    answer = succeed(
        "evaluate", world.merged, *world.arguments("task0", "task1"), "--output", target, "--format", "json"
    )
    written = json.loads(target.read_text())
    assert json.loads(answer.out) == written
    assert written["model"] == str(world.merged)
    assert (written["revision"], written["suite"], written["split"], written["normalized"]) == (None, None, None, None)
    assert list(written["tasks"]) == ["task0", "task1"]
    for task in written["tasks"].values():
        assert set(task) == {"metrics", "score", "metric", "examples", "seconds", "settings"}
        assert 0 < task["seconds"] < 60
    scores = [task["score"] for task in written["tasks"].values()]
    assert written["average"] == pytest.approx(sum(scores) / 2)
    environment = written["environment"]
    assert (environment["device"], environment["processes"], environment["batch_size"]) == ("cpu", 1, BATCH)
    assert {"torch", "transformers"} <= set(environment["versions"])
    assert Results.load(target).to_dict() == written
    assert not list(target.parent.glob(".*"))


def test_both_conventions_are_stated_where_papers_differ(world: World, tmp_path: Path) -> None:
    declared = {"kind": TEXT, "text": ["first", "second"], "metrics": ["accuracy", "f1"], "score": "mean"}
    tasks_file = write_tasks(tmp_path / "mine.yaml", task0=declared)
    arguments = ["evaluate", world.merged, "--tasks-file", tasks_file, "--data", world.data, "--device", "cpu"]
    result = cart_hf.evaluate(
        world.merged, tasks=["task0"], tasks_file=str(tasks_file), data=str(world.data), device="cpu"
    )
    accuracy, f1 = result.tasks["task0"].metrics["accuracy"], result.tasks["task0"].metrics["f1"]
    assert (result.average, result.first_metric_average) == (pytest.approx((accuracy + f1) / 2), accuracy)
    lines = succeed(*arguments).out.splitlines()
    assert f"accuracy {100 * accuracy:.1f}, f1 {100 * f1:.1f}, mean {50 * (accuracy + f1):.1f}" in lines[1]
    assert lines[-1] == (
        f"average {50 * (accuracy + f1):.1f} takes the mean of a task's metrics; "
        f"with each task's first metric it is {100 * accuracy:.1f}"
    )


def test_tables_for_papers(world: World) -> None:
    def printed(format: str) -> str:
        return succeed("evaluate", world.merged, *world.arguments("task0", "task2"), "--format", format).out

    rows = list(csv.reader(io.StringIO(printed("csv"))))
    assert rows[0] == ["task", "score", "examples", "seconds", "metrics"]
    assert [row[0] for row in rows[1:]] == ["task0", "task2", "average"]
    scores = [float(row[1]) for row in rows[1:]]
    assert scores[2] == pytest.approx((scores[0] + scores[1]) / 2, abs=0.11)
    markdown = printed("markdown").splitlines()
    assert markdown[1] == "|---|---:|---:|---:|---|"
    assert markdown[2].startswith(f"| task0 | {scores[0]} | {COUNT} | ")
    latex = printed("latex").splitlines()
    assert latex[0] == r"\begin{tabular}{lrrrl}"
    assert latex[4].startswith(f"task0 & {scores[0]} & {COUNT} & ")
    assert r"f1\_macro" in latex[4]
    assert latex[-1] == r"\end{tabular}"
    assert printed("human").split()[:5] == rows[0]


def test_a_model_is_measured_on_the_tasks_its_heads_are_called_after(world: World) -> None:
    answer = succeed(
        "evaluate", world.merged, "--tasks-file", world.tasks_file, "--data", world.data, "--format", "csv"
    )
    assert [line.split(",")[0] for line in answer.out.splitlines()] == ["task", *LABELS, "average"]


# --- resuming


def test_finished_tasks_are_not_run_again(world: World, tmp_path: Path) -> None:
    model, target = tmp_path / "model", tmp_path / "results.json"
    shutil.copytree(world.models[0], model)
    shutil.copytree(world.data, tmp_path / "data")

    def evaluated(*more: object) -> int:
        """Evaluate and return how often the model was run."""
        arguments = ["--tasks", "task0", "--tasks-file", world.tasks_file, "--data", tmp_path / "data"]
        with forwards_of(RobertaModel) as seen:
            succeed("evaluate", model, *arguments, "--output", target, *more)
        return len(seen)

    assert evaluated() == 1
    first = Results.load(target).tasks["task0"]
    assert evaluated("--resume") == 0
    assert Results.load(target).tasks["task0"] == first
    assert evaluated("--resume", "--batch-size", 5) == 0  # changes nothing but the time it takes
    for changed in (["--limit", 7], ["--dtype", "bfloat16"], ["--label-mapping", "index"]):
        assert evaluated("--resume", *changed) == 1, changed
        assert evaluated("--resume", *changed) == 0, changed
    assert evaluated("--resume") == 1
    write_split(
        tmp_path / "data" / "task0", "test", {"first": ["ab"], "second": ["c"], "label": [1]}, label=LABELS["task0"]
    )
    assert evaluated("--resume") == 1
    assert Results.load(target).tasks["task0"].examples == 1
    state = load_file(model / "model.safetensors")
    save_file({key: tensor * 1.01 for key, tensor in state.items()}, model / "model.safetensors", {"format": "pt"})
    assert evaluated("--resume") == 1
    assert evaluated("--overwrite") == 1


def test_an_unfinished_task_is_run_when_resuming(world: World, tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    shutil.copytree(world.data, tmp_path / "data")
    (tmp_path / "data" / "task1" / "test.parquet").rename(tmp_path / "aside")
    arguments = [
        "evaluate",
        world.merged,
        "--tasks",
        *LABELS,
        "--tasks-file",
        world.tasks_file,
        "--data",
        tmp_path / "data",
    ]
    answer = call(*arguments, "--output", target)
    assert answer.code == 2
    assert (list(Results.load(target).tasks), list(Results.load(target).errors)) == (["task0", "task2"], ["task1"])
    (tmp_path / "aside").rename(tmp_path / "data" / "task1" / "test.parquet")
    with forwards_of(RobertaModel) as seen:
        succeed(*arguments, "--output", target, "--resume")
    assert len(seen) == 1
    assert (list(Results.load(target).tasks), Results.load(target).errors) == (list(LABELS), {})


# --- the individual models


def test_scores_are_normalised_by_the_individual_models(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for name in ("base", *LABELS):
        shutil.copytree(world.folder / name, folder / name)
    merged = tmp_path / "merged"
    models = [str(folder / name) for name in LABELS]
    cart_hf.merge(base=str(folder / "base"), models=models, output=merged, device="cpu", workers=1)
    # a private cache: other tests measure the same weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CART_HF_CACHE", str(tmp_path / "cache"))

        def evaluated() -> tuple[Results, int]:
            with forwards_of(RobertaModel) as seen:
                result = cart_hf.evaluate(merged, world.evaluation(*LABELS), normalize=True, device="cpu")
            return result, len(seen)

        batches = 3 * 3
        result, runs = evaluated()
        assert runs == 2 * batches
        alone = {name: outcomes(folder / name, world.evaluation(name))[name].result.score for name in LABELS}
        assert result.individual == alone
        ratios = [result.tasks[name].score / alone[name] for name in LABELS]
        assert result.normalized == pytest.approx(sum(ratios) / 3)
        again, runs = evaluated()
        assert runs == batches
        assert (again.individual, again.normalized) == (alone, result.normalized)
        state = load_file(folder / "task1" / "model.safetensors")
        save_file(
            {key: tensor + 0.01 for key, tensor in state.items()},
            folder / "task1" / "model.safetensors",
            {"format": "pt"},
        )
        _, runs = evaluated()
        assert runs == batches + 3
        for stored in (tmp_path / "cache" / "scores").iterdir():
            stored.write_text('{"metr')  # a disk that was full
        again, runs = evaluated()
        assert (runs, set(again.individual)) == (2 * batches, set(LABELS))
        shutil.rmtree(folder / "task2")
        missing = cart_hf.evaluate(merged, world.evaluation(*LABELS), normalize=True, device="cpu")
    assert (set(missing.tasks), set(missing.individual), missing.normalized) == (set(LABELS), {"task0", "task1"}, None)
    assert list(missing.errors) == ["task2"]
    assert str(folder / "task2") in missing.errors["task2"]


def test_normalised_scores_in_the_table(world: World) -> None:
    answer = succeed("evaluate", world.merged, *world.arguments(*LABELS), "--normalize", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(answer.out)))
    assert list(rows[0])[:4] == ["task", "score", "individual", "normalised"]
    for row in rows[:3]:
        assert float(row["normalised"]) == pytest.approx(100 * float(row["score"]) / float(row["individual"]), abs=0.2)
    mean = sum(float(row["normalised"]) for row in rows[:3]) / 3
    assert float(rows[3]["normalised"]) == pytest.approx(mean, abs=0.11)


def test_only_a_merge_can_be_normalised(world: World) -> None:
    with forwards_of(RobertaModel) as seen:
        answer = call("evaluate", world.models[0], *world.arguments("task0"), "--normalize")
    assert answer.code == 2
    assert answer.errors == [f"--normalize: {world.models[0]} is not a merge (no cart_hf.yaml names its models)"]
    assert not seen, "refused after the work was done"


def test_a_merge_can_be_measured_when_its_models_are_gone(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for name in ("base", "task0", "task1"):
        shutil.copytree(world.folder / name, folder / name)
    cart_hf.merge(
        base=str(folder / "base"),
        models=[str(folder / name) for name in ("task0", "task1")],
        output=tmp_path / "merged",
        device="cpu",
        workers=1,
    )
    shutil.rmtree(folder)
    succeed("evaluate", tmp_path / "merged", *world.arguments("task0"))


# --- bad input


def failing(*arguments: object, good: str = "task2") -> Answer:
    """Evaluate a task that works beside one that does not: exit 2, one message, and the good one's result."""
    answer = call("evaluate", *arguments, "--format", "csv")
    assert answer.code == 2, answer
    assert len(answer.errors) == 1, answer
    assert all(line.startswith("error: ") for line in answer.err.splitlines()), answer.err
    assert [line.split(",")[0] for line in answer.out.splitlines()] == ["task", good, "average"], answer
    return answer


BAD: dict[str, tuple[dict[str, Any] | None, dict[str, Any], str]] = {
    # what is wrong with the task, or with its rows, and what is said
    "no head": ({"kind": TEXT, "text": "first"}, {}, "task 'bad': {model} has no head 'bad'"),
    "no column": ({"kind": TEXT, "text": "frist", "head": "task0"}, {}, "has no column 'frist' - did you mean 'first'?"),
    "no labels": ({"kind": TEXT, "text": "first", "label": "intent", "head": "task0"}, {"label": None}, "has no column 'intent'"),
    "no split": ({"kind": TEXT, "text": "first", "split": "train", "head": "task0"}, {}, "has no split 'train'"),
    "empty": ({"kind": TEXT, "text": "first", "head": "task0"}, {"first": [], "label": []}, "the split is empty"),
    "hidden": ({"kind": TEXT, "text": "first", "head": "task0"}, {"label": [-1] * COUNT}, "the labels of split 'test' are hidden"),
    "labels": ({"kind": TEXT, "text": "first", "labels": ["x", "y"], "head": "task0"}, {}, "are not the data's (x, y)"),
    "regression task": ({"kind": REGRESSION, "text": "first", "head": "task0"}, {}, "a regression needs a head with one output, this one has 2 labels"),
    "image task": ({"kind": "image-classification", "head": "task0"}, {"image": True}, "its examples are images, the model reads texts"),
    "metric": ({"kind": TEXT, "text": "first", "labels": ["roberta0-0", "roberta0-1"], "metrics": ["acuracy"], "head": "task0"}, {}, "metric 'acuracy': not built in (accuracy, "),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_task_that_fails_does_not_stop_the_others(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    declared, changes, message = BAD[case]
    rows: dict[str, Any] = {"first": world.columns["task0"][0], "label": world.labels["task0"]} | changes
    rows = {column: values for column, values in rows.items() if values is not None}
    if case == "image task":
        rows |= {"image": [{"bytes": image_bytes(1), "path": None}] * COUNT}
    write_split(tmp_path / "bad", "test", rows)
    shutil.copytree(world.data / "task2", tmp_path / "task2")
    good = {"kind": TEXT, "text": "first"}
    tasks_file = write_tasks(tmp_path / "mine.yaml", bad=declared, task2=good)
    target = tmp_path / "results.json"
    options = ["--tasks", "bad", "task2", "--tasks-file", tasks_file, "--data", tmp_path, "--output", target]
    with forwards_of(RobertaModel) as seen:
        answer = failing(world.merged, *options)
    assert len(seen) == 1, "the model was run before the mistake was told"
    assert message.format(model=world.merged) in answer.errors[0]
    assert "'bad'" in answer.errors[0]
    written = Results.load(target)
    assert list(written.errors) == ["bad"]
    assert written.tasks["task2"].examples == COUNT


def test_a_regression_head_on_a_classification_task(world: World, regression: Path) -> None:
    answer = call("evaluate", regression, *world.arguments("task0"))
    assert answer.code == 2
    assert answer.errors == ["task 'task0': the head is a regression (one output), the task has classes"]


def test_a_head_of_another_name(world: World) -> None:
    tasks_file = write_tasks(
        world.folder / "other.yaml", mine={"kind": TEXT, "text": ["first", "second"], "folders": ["task0"]}
    )
    asked = ["evaluate", world.merged, "--tasks", "mine", "--tasks-file", tasks_file, "--data", world.data]
    answer = call(*asked)
    assert (
        "has no head 'mine' (known: task0, task1, task2); a head of another name is given with --heads mine=HEAD"
        in answer.errors[0]
    )
    succeed(*asked, "--heads", "mine=task0")
    assert "did you mean 'task0'" in call(*asked, "--heads", "mine=task00").errors[0]
    assert call(*asked, "--heads", "mine").errors == ["--heads mine: expected TASK=HEAD"]
    assert call(*asked, "--heads", "mien=task0").errors == ["--heads mien: no such task here - did you mean 'mine'?"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(world: World, tmp_path: Path, value: float) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(world.merged, merged)
    broken = next(
        path
        for path in (merged / "tasks" / "task0").glob("*.safetensors")
        if "classifier.out_proj.weight" in load_file(path)
    )
    state = load_file(broken)
    state["classifier.out_proj.weight"][1, 3] = value
    save_file(state, broken, {"format": "pt"})
    answer = failing(merged, *world.arguments("task0", "task2"))
    assert f"task 'task0': the model's output is not finite for {COUNT} of {COUNT} examples" in answer.errors[0]


MODELS = {
    "nowhere": (lambda w, t: t / "nowhere", "model: folder not found: "),
    "empty folder": (lambda w, t: t, "has no config.json"),
    "base": (lambda w, t: w.base, "is a RobertaForMaskedLM: it has no head to answer a task with"),
    "no tokenizer": (lambda w, t: w.folder / "bare", "has no usable tokenizer"),
    "no weights": (lambda w, t: w.folder / "weightless", "holds no weights"),
    "head is missing": (lambda w, t: w.folder / "headless", "lacks the tensors classifier.dense.bias"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_measured(world: World, tmp_path: Path, case: str) -> None:
    model = RobertaForSequenceClassification.from_pretrained(world.models[0])
    save(model, world.folder / "bare")
    shutil.copytree(world.models[0], world.folder / "weightless", dirs_exist_ok=True)
    (world.folder / "weightless" / "model.safetensors").unlink(missing_ok=True)
    shutil.copytree(world.models[0], world.folder / "headless", dirs_exist_ok=True)
    state = load_file(world.folder / "headless" / "model.safetensors")
    kept = {key: tensor for key, tensor in state.items() if "classifier" not in key}
    save_file(kept, world.folder / "headless" / "model.safetensors", {"format": "pt"})
    make, message = MODELS[case]
    answer = call("evaluate", make(world, tmp_path), *world.arguments("task0"), "--output", tmp_path / "results.json")
    assert answer.code == 2, answer
    assert len(answer.errors) == 1
    assert message in answer.errors[0]
    assert len(answer.err.splitlines()) == 1, answer.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "task9"], "no task 'task9' - did you mean 'task"),
        (["--suite", "gleu"], "no suite 'gleu' - did you mean 'glue'?"),
        (["--suite", "glue", "--tasks", "sst2"], "suite and tasks: give one of the two"),
        (["--tasks", "task0", "--resume"], "--resume goes on with the file of --output: name it"),
        (["--tasks", "task0", "--stream"], "stream: it reads the first rows only; say how many with limit"),
        (["--tasks", "task0", "--device", "cuda:7"], "cuda:7"),
        (["--tasks", "task0", "--submission", "glue.csv"], "--submission glue.csv: the leaderboard takes a .zip file"),
        (["--tasks", "task0", "--limit", "0"], "limit"),
        (["--tasks", "task0", "--normalise"], "--normalise"),
    ],
)
def test_mistakes_on_the_command_line(world: World, arguments: list[str], message: str) -> None:
    answer = call("evaluate", world.merged, "--tasks-file", world.tasks_file, "--data", world.data, *arguments)
    assert answer.code == 2, answer
    assert len(answer.errors) == 1
    assert message in answer.errors[0]
    assert answer.out == ""


def test_which_tasks_has_to_be_said(world: World) -> None:
    answer = call("evaluate", world.models[0])
    assert answer.errors == ["which tasks? give --suite or --tasks (`cart-hf tasks` lists them), or a --tasks-file"]


def test_results_are_not_replaced_by_accident(world: World, tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    arguments = ["evaluate", world.merged, *world.arguments("task0"), "--output", target]
    succeed(*arguments)
    assert call(*arguments).errors == [f"{target} exists; --resume goes on with it, --overwrite replaces it"]
    target.write_text("{}")
    for option in ("--resume", "--overwrite"):
        assert call(*arguments, option).errors == [f"{target} is not a results file of cart-hf"]
    assert target.read_text() == "{}"


def test_an_error_of_ours_is_not_the_users(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("cart_hf.evaluation.run.predict", explode)
    answer = call("evaluate", world.merged, *world.arguments("task0"))
    assert answer.code == 1
    assert answer.errors == ["task 'task0': internal error: ZeroDivisionError: oops"]


# --- the API


def test_arguments_of_the_api(world: World) -> None:
    flags = {"tasks": ["task0"], "tasks_file": str(world.tasks_file), "data": str(world.data)}
    by_flags = cart_hf.evaluate(world.merged, device="cpu", batch_size=BATCH, **flags)
    whole = cart_hf.evaluate(world.merged, world.evaluation("task0"), device="cpu")
    assert by_flags.tasks["task0"].metrics == whole.tasks["task0"].metrics
    with pytest.raises(UserError, match="give an Evaluation or its fields, not both"):
        cart_hf.evaluate(world.merged, world.evaluation("task0"), limit=3)
    with pytest.raises(UserError, match="--taks: unknown - did you mean 'tasks'"):
        cart_hf.evaluate(world.merged, taks=["task0"])


def test_progress_is_reported(world: World) -> None:
    seen: list[tuple[str, int, int]] = []
    cart_hf.evaluate(
        world.merged, world.evaluation("task0", "task2"), device="cpu", progress=lambda *step: seen.append(step)
    )
    assert seen == [("evaluating task0", 1, 3)] * 3 + [("evaluating task2", 1, 3)] * 3


# --- the leaderboard

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
ROWS = 5
HEADS = {"mnli": ["contradiction", "entailment", "neutral"], "rte": ["not_entailment", "entailment"]}


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of eight models called like GLUE's tasks, and test splits whose labels are hidden."""
    folder = tmp_path_factory.mktemp("glue")
    torch.manual_seed(0)
    base = RobertaForMaskedLM(FAMILIES["roberta"][0]())
    save(base, folder / "base")
    for seed, task in enumerate(find_tasks(GLUE)):
        labels = HEADS.get(task.name, list(task.labels)) or ["degree"]
        config = roberta_config(num_labels=len(labels), id2label=dict(enumerate(labels)))
        model = RobertaForSequenceClassification(config)
        copy_backbone(model, base)
        perturb(model, seed, size=0.3)
        save(model, folder / task.name)
    save_tokenizer("roberta", folder / "base")
    models = [str(folder / name) for name in GLUE]
    cart_hf.merge(base=str(folder / "base"), models=models, output=folder / "merged", device="cpu", workers=1)
    for seed, task in enumerate(find_tasks(suite="glue-submission")):
        rows: dict[str, Any] = {column: texts(ROWS, seed * 2 + i) for i, column in enumerate(task.text)}
        hidden = [-1.0] * ROWS if task.kind == REGRESSION else [-1] * ROWS
        write_split(folder / "data" / task.name, task.splits.get("test", "test"), rows | {"label": hidden})
    return folder


def test_a_submission_to_the_glue_leaderboard(glue: Path, tmp_path: Path) -> None:
    target = tmp_path / "glue.zip"
    answer = succeed("evaluate", glue / "merged", "--data", glue / "data", "--submission", target)
    assert answer.out.splitlines()[-1] == f"wrote {target}: upload it at https://gluebenchmark.com/submit"
    assert answer.err == ""
    sheets = sheets_of(target)
    assert set(sheets) == {
        *("CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "STS-B.tsv", "QQP.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "QNLI.tsv"),
        *("RTE.tsv", "WNLI.tsv", "AX.tsv"),
    }
    for name, rows in sheets.items():
        assert rows[0] == ["index", "prediction"], name
        assert [row[0] for row in rows[1:]] == [str(i) for i in range(146 if name == "WNLI.tsv" else ROWS)]
    assert {row[1] for row in sheets["WNLI.tsv"][1:]} == {"0"}
    for task in find_tasks(suite="glue-submission"):
        split = task.splits.get("test", "test")
        columns = columns_of(glue / "data" / task.name / f"{split}.parquet", task.text)
        logits = text_logits(glue / "merged", columns, 18, head=task.head, tokenizer=glue / "merged")
        got = [row[1] for row in sheets[task.submission.file][1:]]
        if task.kind == REGRESSION:
            assert got == [f"{min(5.0, max(0.0, value)):.3f}" for value in logits[:, 0]]
            continue
        names = HEADS.get(task.head, list(task.labels))
        words = [names[position] for position in logits.argmax(axis=1)]
        written = task.name in ("mnli", "mnli_mismatched", "ax", "qnli", "rte")
        assert got == (words if written else [str(task.labels.index(word)) for word in words]), task.name


def columns_of(path: Path, names: tuple[str, ...]) -> list[list[str]]:
    table = pandas.read_parquet(path)
    return [list(table[name]) for name in names]


def sheets_of(path: Path) -> dict[str, list[list[str]]]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {
            name: [line.split("\t") for line in archive.read(name).decode().splitlines()] for name in archive.namelist()
        }


def test_degrees_of_a_submission_are_within_range(glue: Path, tmp_path: Path) -> None:
    for shift, bound in ((100.0, "5.000"), (-100.0, "0.000")):
        model = RobertaForSequenceClassification.from_pretrained(glue / "stsb")
        with torch.no_grad():
            model.classifier.out_proj.bias += shift
        save(model, tmp_path / "model")
        save_tokenizer("roberta", tmp_path / "model")
        target = tmp_path / f"{bound}.zip"
        answer = succeed(
            "evaluate", tmp_path / "model", "--tasks", "stsb", "--data", glue / "data", "--submission", target
        )
        assert {row[1] for row in sheets_of(target)["STS-B.tsv"][1:]} == {bound}
        assert "the leaderboard also wants CoLA.tsv" in answer.err


def test_a_submission_that_cannot_be(glue: Path, world: World, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        answer = call("evaluate", glue / "merged", "--data", glue / "data", *arguments)
        assert answer.code == 2
        assert len(answer.errors) == 1, answer
        return answer.errors[0]

    target = tmp_path / "glue.zip"
    message = refused("--submission", target, "--limit", 3)
    assert message == "--submission: the leaderboard wants every example; leave --limit out"
    assert "the labels of split 'test' are hidden" in refused("--tasks", "sst2", "--split", "test")
    assert not target.exists()
    target.write_bytes(b"something else")
    assert refused("--submission", target) == f"{target} exists; choose another name, or --overwrite to replace it"
    assert target.read_bytes() == b"something else"
    answer = call("evaluate", world.merged, *world.arguments("task0"), "--submission", tmp_path / "mine.zip")
    assert answer.errors == ["--submission: task 'task0' is not on the GLUE leaderboard"]
    assert not (tmp_path / "mine.zip").exists()


def test_a_loaded_model_is_measured_as_its_folder_is(world: World) -> None:
    """And its weights are what counts, not the folder they came from."""
    model = cart_hf.MultiTaskModel.from_pretrained(world.merged)
    of_folder, of_object = (cart_hf.evaluate(it, world.evaluation(*LABELS)) for it in (world.merged, model))
    assert [r.metrics for r in of_object.tasks.values()] == [r.metrics for r in of_folder.tasks.values()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3)
    changed = cart_hf.evaluate(model, world.evaluation(*LABELS))
    assert changed.tasks["task0"].settings["model"] != of_object.tasks["task0"].settings["model"]
    assert changed.average != of_object.average
    with pytest.raises(UserError, match="load it with from_pretrained"):
        cart_hf.evaluate(cart_hf.MultiTaskModel(model.backbone, {}), world.evaluation("task0"))


def test_a_killed_run_loses_nothing_that_was_finished(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier results of tasks that the new run has not reached stay in the file."""
    file = tmp_path / "results.json"
    cart_hf.evaluate(world.merged, world.evaluation("task1", "task2"), output=file)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cart_hf.evaluation.run.predict", killed)  # task0 is new and comes first
    with pytest.raises(KeyboardInterrupt):
        cart_hf.evaluate(world.merged, world.evaluation("task0", "task1", "task2"), output=file, resume=True)
    assert list(Results.load(file).tasks) == ["task1", "task2"]


def test_fingerprint_of_a_folder(world: World, tmp_path: Path) -> None:
    """Weights and tokenizer count, whatever folder they lie in; results and cards beside them do not."""

    def of(folder: Path) -> str:
        return fingerprint(Reference(str(folder)), None, folder)

    copy = Path(shutil.copytree(world.merged, tmp_path / "copy"))
    first = of(copy)
    assert first == of(world.merged)
    (copy / "README.md").write_text("other words")
    (copy / "results.json").write_text("{}")
    assert of(copy) == first
    for name in ("tokenizer.json", "tasks/task1/head.safetensors", "config.json"):
        before = of(copy)
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
        assert of(copy) != before, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(world: World, dtype: str) -> None:
    """The same answers as on the CPU; half precision may move those that are close calls."""
    on_cpu = cart_hf.evaluate(world.merged, world.evaluation(*LABELS), device="cpu")
    on_gpu = cart_hf.evaluate(world.merged, world.evaluation(*LABELS, dtype=dtype), device="cuda")
    for name, result in on_gpu.tasks.items():
        wrong = 0 if dtype == "float32" else 2 / COUNT
        assert result.metrics["accuracy"] == pytest.approx(on_cpu.tasks[name].metrics["accuracy"], abs=wrong)
    assert "cuda" not in on_cpu.environment["device"]


def test_half_precision_on_the_cpu(world: World) -> None:
    found = cart_hf.evaluate(world.merged, world.evaluation(*LABELS, dtype="bfloat16"), device="cpu")
    exact = cart_hf.evaluate(world.merged, world.evaluation(*LABELS), device="cpu")
    for name, result in found.tasks.items():
        assert result.metrics["accuracy"] == pytest.approx(exact.tasks[name].metrics["accuracy"], abs=2 / COUNT)
        assert result.settings["dtype"] == "bfloat16"
