"""The model card: metadata that the Hub's own classes read, and nothing that is not meant for others."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from adapted_folder import pretend_adapted
from checkpoints import make_clip, make_family
from hub_uploads import wrong_metadata
from huggingface_hub import ModelCard

import cart_hf
from cart_hf.evaluation.results import Results, TaskResult
from cart_hf.output.origin import Origin
from cart_hf.plan.coefficients import Coefficients
from cart_hf.publishing.card import is_ours, render
from cart_hf.publishing.contents import Contents, read_contents
from cart_hf.tasks import find_tasks


def write_card(folder: Path | str, **metadata: Any) -> None:
    (Path(folder) / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# a model\n")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged RoBERTa whose sources have cards."""
    folder = tmp_path_factory.mktemp("card")
    base, models = make_family(folder, "roberta")
    for place in (base, *models):
        write_card(place, license="mit", language="en", datasets=["nyu-mll/glue", "./my data"])
    models = [f"{name}={place}" for name, place in zip(("sst2", "mrpc", "own"), models, strict=True)]
    return cart_hf.merge(base=base, models=models, output=folder / "merged", rank_ratio=0.3).output


def as_from_the_hub(contents: Contents, **origin: Any) -> Contents:
    """Return the contents as they would be had every source come from the Hub."""
    record, recipe = json.loads(json.dumps(contents.record)), json.loads(json.dumps(contents.recipe))
    entries = [record["base"], *record["models"]]
    recipe["base_model"] = "org/base@" + "a" * 40
    for entry, model in zip(entries[1:], recipe["models"], strict=True):
        model["model"] = f"org/{entry['name']}@" + "b" * 40
    for entry in entries:
        entry |= {"hub_id": f"org/{entry['name']}", "reference": f"org/{entry['name']}@main", "commit": "b" * 40}
    found = Contents(contents.folder, {"merge.json": record}, recipe, contents.results)
    return found.with_origins({(s.hub_id, s.commit): Origin(private=False, **origin) for s in found.sources})


def results(*names: str, limit: int | None = None, individual: bool = False) -> Results:
    """Return results as `cart-hf evaluate` would write them on a machine with folders."""
    tasks = {}
    for name in names:
        settings = {"split": "validation", "source": "/home/someone/data", "model": "/home/someone", "task": "0" * 16}
        if name != "own":
            settings["task"] = hashlib.sha256(find_tasks([name])[0].model_dump_json().encode()).hexdigest()[:16]
        metrics = {"accuracy": 0.75, "f1": 0.5, "mean": 0.625} if name == "mrpc" else {"accuracy": 0.75}
        words = "mean of accuracy and f1" if name == "mrpc" else "accuracy"
        tasks[name] = TaskResult(metrics, metrics.get("mean", 0.75), words, 8, 0.5, settings=settings)
    alone = dict.fromkeys(names, 0.8) if individual else {}
    errors = {"cola": "cannot read /home/someone/data/cola"}
    return Results("/home/someone/merged", None, None, None, tasks, errors, alone, {"limit": limit})


def test_a_merge_writes_a_card_of_ours(merged: Path) -> None:
    text = (merged / "README.md").read_text()
    assert is_ours(text)
    assert is_ours(text.replace("\n", "\r\n"))  # as git on Windows hands it out
    for edited in (
        text.replace("fine-tuned", "finetuned"),
        text + "\nMy own words.\n",
        text.replace("license: mit", "license: other"),
    ):
        assert not is_ours(edited)
    assert not is_ours("---\nlicense: mit\n---\n# my model\n")


def test_local_sources_are_told_without_their_paths(merged: Path) -> None:
    card = ModelCard.load(merged / "README.md")
    assert card.data.base_model is None
    assert "Not on the Hub, or not named here: base, sst2, mrpc, own" in card.text
    assert str(merged.parent) not in str(card)
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", ["en"], ["nyu-mll/glue"])
    assert {"merge", "cart", "cart-hf"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")
    assert 'subfolder="tasks/sst2"' in card.text


def test_hub_sources_are_named_with_their_commits(merged: Path) -> None:
    contents = as_from_the_hub(read_contents(merged), license="mit", language=("en",), datasets=("nyu-mll/glue",))
    card = ModelCard(render(contents.public("org/merged"), "org/merged"))
    assert card.data.base_model == ["org/base", "org/sst2", "org/mrpc", "org/own"]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert (card.data.language, card.data.datasets) == (["en"], ["nyu-mll/glue"])
    assert f"(https://huggingface.co/org/sst2/tree/{'b' * 40})" in card.text
    assert f"org/sst2@{'b' * 40}" in card.text  # the recipe
    assert "model-index" not in card.data.to_dict()
    assert "It has not been measured yet." in card.text
    assert not wrong_metadata(card.data.to_dict())


def test_results_become_a_table_and_a_model_index(merged: Path) -> None:
    found = results("sst2", "mrpc", "own", limit=100, individual=True)
    contents = read_contents(merged)
    contents = replace(contents, results=found).public("org/merged")
    card = ModelCard(render(contents, "org/merged"))
    assert card.data.model_name == "merged"
    metrics = {(r.dataset_type, r.dataset_config, r.metric_type): r for r in card.data.eval_results}
    assert set(metrics) == {
        ("nyu-mll/glue", "sst2", "accuracy"),
        *(("nyu-mll/glue", "mrpc", name) for name in ("accuracy", "f1", "mean")),
        ("own", None, "accuracy"),  # the user's own task: no data set is made up for it
    }
    assert {(r.dataset_split, r.source_name) for r in metrics.values()} == {
        ("validation", f"cart-hf {cart_hf.__version__}")
    }
    assert metrics["nyu-mll/glue", "mrpc", "f1"].metric_value == 0.5
    assert not wrong_metadata(card.data.to_dict())
    assert re.search(r"\| sst2 \| 75\.0 \| 80\.0 \| 93\.8 \|", card.text)
    assert "on: validation (at most 100 examples of each task)." in card.text
    assert "Not measured: cola." in card.text
    assert "optimistic" in card.text
    assert "/home/someone" not in str(card) + "".join(data.decode() for data in contents.files().values())


def test_a_task_of_ones_own_is_not_taken_for_the_built_in_one(merged: Path) -> None:
    found = results("own")
    found = Results(**{**found.__dict__, "tasks": {"sst2": found.tasks["own"]}})
    contents = read_contents(merged)
    card = ModelCard(render(replace(contents, results=found), "merged"))
    assert [result.dataset_type for result in card.data.eval_results] == ["sst2"]


@pytest.mark.parametrize(
    ("licences", "told", "expected"),
    [
        (["mit", "mit", "mit", "mit"], None, {"license": "mit"}),
        (["mit", "mit", "mit", "apache-2.0"], None, {"license": "other", "license_name": "those-of-the-merged-models"}),
        (["mit", "mit", "mit", None], None, {"license": "other", "license_name": "those-of-the-merged-models"}),
        (["mit", "mit", "mit", None], "cc-by-4.0", {"license": "cc-by-4.0"}),
        ([None] * 4, None, {}),
        (["other:llama:https://l"] * 4, None, {"license": "other", "license_name": "llama", "license_link": "https://l"}),
    ],
)  # fmt: skip
def test_the_licence_is_what_all_sources_share(
    merged: Path, licences: list[str | None], told: str | None, expected: dict[str, str]
) -> None:
    contents = as_from_the_hub(read_contents(merged))
    origins = {}
    for source, licence in zip(contents.sources, licences, strict=True):
        words = [*licence.split(":", 2), None, None][:3] if licence else [None, None, None]
        origins[source.hub_id, source.commit] = Origin(False, *words)
    card = ModelCard(render(contents.with_origins(origins), "org/merged", told))
    data = card.data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected
    last = (licences[-1] or "unknown").replace("other:llama:https://l", "llama")
    assert re.search(rf"\| own \| .* \| {re.escape(last)} \|\n", card.text)


def test_hidden_sources_are_named_nowhere(merged: Path) -> None:
    contents = as_from_the_hub(read_contents(merged), datasets=("org/mrpc-data",), license="mit")
    record = dict(contents.record) | {"warnings": ["org/mrpc@main: its head was cut"]}
    recipe = dict(contents.recipe) | {"tokenizer_source": "org/mrpc@" + "b" * 40}
    recipe["evaluation"] = {"tasks": ["sst2"], "data": "/home/someone", "tasks_file": "/home/someone/mine.yaml"}
    contents = Contents(contents.folder, {"merge.json": record}, recipe, None).public("org/merged", {"org/mrpc"})
    published = render(contents, "org/merged") + "".join(data.decode() for data in contents.files().values())
    assert "org/mrpc@" not in published
    assert '"org/mrpc"' not in published
    assert "/home/someone" not in published
    card = ModelCard(render(contents, "org/merged"))
    assert card.data.base_model == ["org/base", "org/sst2", "org/own"]
    assert card.data.license == "mit"
    assert "| mrpc | a private model |" in card.text
    written = yaml.safe_load(contents.files()["cart_hf.yaml"])
    assert (written["tokenizer_source"], written["evaluation"]) == ("mrpc", {"tasks": ["sst2"]})


ADAPTS = {
    "hub_id": "org/big",
    "commit": "c" * 40,
    "class": "RobertaForMaskedLM",
    "origin": {"private": True, "license": "mit"},
}
LORA = {"model": {"path": "org/big", "revision": "c" * 40}, "lora": "org/sst2@" + "b" * 40}


def test_sources_that_are_adapters_themselves(merged: Path) -> None:
    contents = as_from_the_hub(read_contents(merged), license="mit")
    contents.record["models"][0]["adapts"] = ADAPTS
    contents.recipe["models"][0]["model"] = LORA
    assert [source.hub_id for source in contents.ingredients][-1] == "org/big"
    told = render(contents.public("org/merged"), "org/merged")
    assert "[org/sst2](https://huggingface.co/org/sst2) at" in told
    assert f"on [org/big](https://huggingface.co/org/big) at [`{'c' * 8}`]" in told
    public = contents.public("org/merged", {"org/big"})
    published = render(public, "org/merged") + "".join(data.decode() for data in public.files().values())
    assert "org/big" not in published
    assert "| sst2 | a private model |" in published
    assert yaml.safe_load(public.files()["cart_hf.yaml"])["models"][0]["model"] == "sst2"


@pytest.mark.parametrize(
    "reference", ["/home/a/base+/home/a/tuned", {"model": "/home/a/base", "lora": {"path": "/home/a/tuned"}}]
)
def test_local_adapters_as_sources_are_told_without_their_paths(merged: Path, reference: Any) -> None:
    contents = as_from_the_hub(read_contents(merged))
    contents.record["models"][0] |= {
        "hub_id": None,
        "reference": "/home/a/base+/home/a/tuned",
        "adapts": ADAPTS | {"hub_id": None},
    }
    contents.record["warnings"].append("/home/a/base: its head was cut; /home/a/base+/home/a/tuned is small")
    contents.recipe["models"][0]["model"] = reference
    public = contents.public("org/merged")
    published = render(public, "org/merged") + "".join(data.decode() for data in public.files().values())
    assert "/home" not in published
    assert "- Tuned: its head was cut; tuned is small." in published
    assert "| sst2 | tuned (local folder) |" in published


SOURCES = {"sst2": "nyu-mll/glue (sst2)", "mrpc": "/home/someone/glue/mrpc", "own": "someone/secret-data"}


def test_an_adapted_merge_says_what_it_saw(merged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "adapted"))
    pretend_adapted(folder, SOURCES)
    contents = read_contents(folder).public("org/adapted")
    card = ModelCard(render(contents, "org/adapted"))
    assert "no training and no data" not in card.text
    assert "with coefficients that were learnt on unlabelled inputs" in card.text
    assert "500 steps of Adam (learning rate\n0.001, 16 inputs of each task a step) minimised the entropy" in card.text
    assert "There is a coefficient for each task and tensor." in card.text
    assert "| sst2 | 8 | test | `nyu-mll/glue (sst2)` |\n| mrpc | 8 | test | not named here |" in card.text
    assert "](adaptation/coefficients.png)" in card.text and "](adaptation/curves.png)" in card.text
    assert "on this recipe, with `adaptation/coefficients.safetensors` beside it, gives the same weights" in card.text
    assert "scores on these same inputs are transductive" in card.text
    assert "test-time-adaptation" in card.data.tags
    assert not wrong_metadata(card.data.to_dict())


def test_an_adapted_merge_does_not_say_where_its_inputs_lie(merged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "adapted"))
    pretend_adapted(folder, SOURCES)
    contents = read_contents(folder).public("org/adapted")
    files = contents.files()
    assert not [name for name, data in files.items() if b"/home/someone" in data or b"someone/secret-data" in data]
    assert yaml.safe_load(files["cart_hf.yaml"])["adapt"] == {"steps": 500}
    written = tmp_path / "written.safetensors"
    written.write_bytes(files["adaptation/coefficients.safetensors"])
    new, old = Coefficients.load(written), Coefficients.load(folder / "adaptation" / "coefficients.safetensors")
    assert (new.digest, new.tasks, new.record) == (old.digest, old.tasks, contents.adaptation)
    elsewhere = replace(contents, recipe=dict(contents.recipe) | {"coefficients": "someone/c.safetensors"})
    assert yaml.safe_load(elsewhere.public("x").files()["cart_hf.yaml"])["coefficients"] == "c.safetensors"


def test_what_an_adapted_merge_leaves_out_of_its_card(merged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "adapted"))
    told = {"objective": "self-labels", "granularity": "layer", "stopped_early": True, "mask_ratio": 0.32}
    pretend_adapted(folder, SOURCES, **told)
    (folder / "adaptation" / "curves.png").unlink()
    found = results("sst2", "mrpc")
    found = replace(found, tasks={name: replace(result, adapted_on=8) for name, result in found.tasks.items()})
    text = render(replace(read_contents(folder), results=found).public("x"), "x")
    assert "minimised the difference between the merged model's predictions and those of each task's own" in text
    assert "The loss went from 3.2 to 1.1. The steps stopped early, when it did not get better." in text
    assert "There is a coefficient for each task and layer. Which singular directions" in text
    assert "curves.png" not in text
    assert "These scores are transductive: all 16 examples were among the inputs the model was adapted on." in text


def test_two_clips(tmp_path: Path) -> None:
    base, towers = make_clip(tmp_path, tasks=2)
    merged = cart_hf.merge(base=base, models=towers, output=tmp_path / "merged").output
    card = ModelCard.load(merged / "README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert 'model = CLIPModel.from_pretrained("merged")' in card.text
    assert "add_zero_shot" in card.text
    assert "Two models: their centred task vectors cancel" in card.text
    assert "Each task keeps its own head" not in card.text


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("merge.json", None, "is not a merged model (no merge.json)"),
        ("merge.json", "{", "merge.json is damaged: Expecting property name"),
        ("merge.json", "{}", "merge.json is not what this version of cart-hf writes; merge again"),
        ("cart_hf.yaml", "a: [", "cart_hf.yaml is damaged"),
        ("results.json", "[]", "results.json is not a results file of cart-hf"),
    ],
)
def test_damaged_folders_are_refused(merged: Path, tmp_path: Path, file: str, text: str | None, message: str) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "copy"))
    (folder / file).unlink(missing_ok=True)
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(cart_hf.UserError, match=re.escape(message)):
        cart_hf.push(folder, "org/x")
