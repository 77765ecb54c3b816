"""Models and data sets on the Hub, measured by the unmodified clients from a server on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import yaml
from checkpoints import make_clip, make_family
from commands import Answer, run_cli
from hub_server import Hub, serving
from plain_loops import text_logits
from small_tasks import images, numbers, save_processor, save_tokenizer, texts, write_split, write_tasks

import cart_hf
from cart_hf.tasks import IMAGE, TEXT

ROWS = {"train": 3, "validation": 11, "test": 4}
NAMES = ["roberta0-1", "roberta0-0"]


def write_glue_like(folder: Path) -> None:
    """Write a data set with two configurations, as nyu-mll/glue has them."""
    for config in ("mnli", "sst2"):
        for split, count in ROWS.items():
            labels = numbers(count, 2, seed=4) if split != "test" else [-1] * count
            rows = {"sentence": texts(count, seed=count), "label": labels}
            path = write_split(folder / config, f"{split}-00000-of-00001", rows, label=NAMES)
            assert path.is_file()
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in ROWS],
        }
        for name in ("mnli", "sst2")
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\nLike GLUE.\n")


TASK = {"kind": TEXT, "text": "sentence", "split": "validation", "head": "task0", "metrics": ["accuracy"]}
TASKS = {
    "task0": TASK | {"dataset": {"path": "org/glue-like", "name": "sst2"}},
    "pinned": TASK | {"dataset": {"path": "org/glue-like", "name": "sst2", "revision": "v1"}},
    "hidden": TASK | {"dataset": {"path": "org/glue-like", "name": "sst2"}, "split": "test"},
    "no_config": TASK | {"dataset": {"path": "org/glue-like", "name": "sst3"}},
    "no_split": TASK | {"dataset": {"path": "org/glue-like", "name": "sst2"}, "split": "dev"},
    "no_set": TASK | {"dataset": "org/nowhere"},
    "gone": TASK | {"dataset": {"path": "org/down", "name": "sst2"}},
    "uncached": TASK | {"dataset": {"path": "org/uncached", "name": "sst2"}},
    "streamed": TASK | {"dataset": {"path": "org/streamed", "name": "sst2"}},
    "pictures": {"kind": IMAGE, "dataset": "org/pictures", "classes": ["cat", "dog"], "templates": ["a {}"]},
}


@dataclass
class Online:
    hub: Hub
    folder: Path
    outcomes: dict[str, Answer]


def evaluate(model: str, *names: str, output: Path, more: tuple[object, ...] = ()) -> list[str]:
    options = ["--tasks-file", output.parent / "mine.yaml", "--batch-size", 4, "--device", "cpu", "--output", output]
    return ["evaluate", model, "--tasks", *names, *map(str, (*options, *more))]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Online]:
    folder = tmp_path_factory.mktemp("hub")
    base, models = make_family(folder, "roberta", tasks=2)
    save_tokenizer("roberta", base, *models)
    cart_hf.merge(base=base, models=models, output=folder / "merged", device="cpu", workers=1)
    clip, _ = make_clip(folder / "clip", tasks=0)
    save_tokenizer("clip", clip)
    save_processor("clip", clip)
    write_glue_like(folder / "glue")
    rows = {"image": images(6, 1, broken=[1, 5]), "label": [0, 1] * 3}
    write_split(folder / "pictures" / "data", "test-00000-of-00001", rows, image=datasets.Image())
    write_tasks(folder / "mine.yaml", **TASKS)
    with serving() as hub:
        hub.add("org/merged", folder / "merged", tag="v1")
        hub.add("org/merged", folder / "task0")  # the branch has moved on
        hub.add("org/plain", folder / "task0")
        hub.add("org/unfinished", folder / "glue")
        hub.add("org/clip", clip)
        hub.add("datasets/org/pictures", folder / "pictures")
        for name in ("glue-like", "down", "uncached", "streamed"):
            hub.add(f"datasets/org/{name}", folder / "glue", tag="v1")
        hub.drop(lambda request: "/org/down" in request.path)
        commands = {
            "merged": evaluate("org/merged@v1", "task0", "pinned", output=folder / "merged.json"),
            "plain": evaluate("org/plain", "task0", output=folder / "plain.json"),
            "bad": evaluate(
                "org/plain", "hidden", "no_config", "no_split", "no_set", "gone", "task0", output=folder / "bad.json"
            ),
            "streamed": evaluate(
                "org/plain", "streamed", output=folder / "streamed.json", more=("--stream", "--limit", 3)
            ),
            "pictures": evaluate(
                "org/clip", "pictures", output=folder / "pictures.json", more=("--stream", "--limit", 5)
            ),
            "no model": evaluate("org/nobody", "task0", output=folder / "none.json"),
            "no revision": evaluate("org/plain@v9", "task0", output=folder / "none.json"),
            "no classifier": evaluate("org/unfinished", "task0", output=folder / "none.json"),
        }
        outcomes = dict(zip(commands, run_cli(list(commands.values()), hub.url, folder / "home"), strict=True))
        asked = len(hub.log)
        offline = {
            "offline": evaluate("org/merged@v1", "task0", output=folder / "offline.json"),
            "offline, no data": evaluate("org/plain", "uncached", "task0", output=folder / "offline2.json"),
            "offline, no model": evaluate("org/other", "task0", output=folder / "none.json"),
        }
        outcomes |= dict(
            zip(offline, run_cli(list(offline.values()), hub.url, folder / "home", HF_HUB_OFFLINE="1"), strict=True)
        )
        assert len(hub.log) == asked, "the hub was asked although it must not be"
        yield Online(hub, folder, outcomes)


def results(online: Online, name: str) -> dict[str, Any]:
    found = json.loads((online.folder / f"{name}.json").read_text())
    assert isinstance(found, dict)
    return found


def accuracy(online: Online, model: str, head: str = "", rows: int = ROWS["validation"]) -> float:
    stored = pandas.read_parquet(online.folder / "glue" / "sst2" / "validation-00000-of-00001.parquet")[:rows]
    place = online.folder / model
    logits = text_logits(place, [list(stored["sentence"])], 18, head=head, tokenizer=place)
    return float(np.mean(logits[:, [1, 0]].argmax(axis=1) == np.array(stored["label"])))


def test_a_merged_model_on_the_hub(online: Online) -> None:
    assert online.outcomes["merged"].code == 0, online.outcomes["merged"].err
    found = results(online, "merged")
    assert found["model"] == "org/merged@v1"
    assert found["revision"] == online.hub.repositories["org/merged"].refs["v1"]
    assert found["tasks"]["task0"]["examples"] == ROWS["validation"]
    expected = accuracy(online, "merged", head="task0")
    assert [found["tasks"][name]["score"] for name in ("task0", "pinned")] == [expected, expected]


def test_a_plain_checkpoint_on_the_hub(online: Online) -> None:
    assert online.outcomes["plain"].code == 0, online.outcomes["plain"].err
    found = results(online, "plain")
    assert found["revision"] == online.hub.repositories["org/plain"].refs["main"]
    assert found["tasks"]["task0"]["score"] == accuracy(online, "task0")


def test_a_stream_reads_the_first_rows_only(online: Online) -> None:
    assert online.outcomes["streamed"].code == 0, online.outcomes["streamed"].err
    task = results(online, "streamed")["tasks"]["streamed"]
    assert (task["examples"], task["score"]) == (3, accuracy(online, "task0", rows=3))
    read = [r for r in online.hub.log if r.path.startswith("/cdn/datasets/org/streamed/")]
    assert read
    assert all(request.range for request in read), "a whole file was downloaded"


def test_a_stream_of_images_names_those_that_cannot_be_decoded(online: Online) -> None:
    assert online.outcomes["pictures"].code == 0, online.outcomes["pictures"].err
    task = results(online, "pictures")["tasks"]["pictures"]
    assert (task["examples"], list(task["broken_images"])) == (5, ["1"])


def test_what_is_missing_on_the_hub_stops_only_its_task(online: Online) -> None:
    answer = online.outcomes["bad"]
    assert answer.code == 2
    assert "Traceback" not in answer.err
    found = results(online, "bad")
    assert found["tasks"]["task0"]["score"] == accuracy(online, "task0")
    expected = {
        "hidden": "the labels of split 'test' are hidden; score another split (--split validation)",
        "no_config": "dataset org/glue-like (sst3), split 'validation': BuilderConfig 'sst3' not found",
        "no_split": "dataset org/glue-like (sst2), split 'dev': Unknown split",
        "no_set": "dataset org/nowhere: not found on the Hub, or private or gated without a token",
        "gone": "dataset org/down (sst2): the Hub cannot be reached and the data is not cached",
    }
    assert set(found["errors"]) == set(expected)
    assert len(answer.errors) == len(expected)
    for name, message in expected.items():
        assert message in found["errors"][name]
        assert any(message in error and f"'{name}'" in error for error in answer.errors), name


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no model", "model: org/nobody: no such folder here and no such repository on the Hub"),
        ("no revision", "model: org/plain@v9: the repository has no such branch, tag or commit"),
        ("no classifier", "model: org/unfinished has no config.json"),
        ("offline, no model", "model: org/other: not in the local cache, and HF_HUB_OFFLINE forbids downloading it"),
    ],
)
def test_a_model_that_the_hub_does_not_have(online: Online, case: str, message: str) -> None:
    answer = online.outcomes[case]
    assert answer.code == 2, answer
    assert len(answer.errors) == 1, answer
    assert message in answer.errors[0]
    assert not (online.folder / "none.json").exists()


def test_what_is_cached_can_be_measured_offline(online: Online) -> None:
    assert online.outcomes["offline"].code == 0, online.outcomes["offline"].err
    ours, theirs = results(online, "offline"), results(online, "merged")
    assert ours["revision"] == theirs["revision"]
    assert ours["tasks"]["task0"]["metrics"] == theirs["tasks"]["task0"]["metrics"]
    answer = online.outcomes["offline, no data"]
    assert answer.code == 2
    assert answer.errors == [
        "task 'uncached': dataset org/uncached (sst2): the Hub cannot be reached and the data is not cached; "
        "connect and try again, or give --data DIR with local copies"
    ]
    assert list(results(online, "offline2")["tasks"]) == ["task0"]
