"""Compressed folders become families of repositories on a Hub on this machine; plain transformers and PEFT load them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from checkpoints import make_clip, make_family
from commands import environment
from hub_server import serving
from hub_uploads import WritableHub, wrong_metadata
from peft import PeftModel
from small_tasks import images, save_processor, save_tokenizer, texts, write_split, write_tasks
from test_push import ACCOUNTS, TEXT, WRITER, World, fill, is_upload
from transformers import CLIPModel, RobertaForSequenceClassification
from warm_python import run_python

import cart_hf
from cart_hf.evaluation.results import Results, TaskResult
from cart_hf.publishing import check_push
from cart_hf.publishing.card import is_ours
from cart_hf.recipe import Evaluation
from cart_hf.tasks import IMAGE as IMAGE_TASK
from cart_hf.tasks import TEXT as TEXT_TASK

BASE = "FacebookAI/roberta-base"
LONG = "a-task-whose-name-is-so-long-that-no-repository-of-the-hub-can-be-called-after-it-" + "x" * 20
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "compress.json", "README.md"}
WORDS = torch.arange(5, 21).view(2, 8)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)

# A machine that has transformers and peft, but not cart-hf: it runs what the cards say.
CONSUMER = """
import json, re, sys
sys.modules["cart_hf"] = None
import torch
from huggingface_hub import hf_hub_download
from peft import AutoPeftModelForSequenceClassification
words = torch.arange(5, 21).view(2, 8)
images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
answers = {}
with torch.no_grad():
    for repo in sys.argv[1:]:
        clip = "clip" in repo
        inputs = {"input_ids": words, **({"pixel_values": images} if clip else {})}
        blocks = re.findall(r"```python\\n(.*?)```", open(hf_hub_download(repo, "README.md")).read(), re.DOTALL)
        scope = {"inputs": inputs}
        for block in [block for block in blocks if "cart_hf" not in block]:
            exec(block, scope)
            found = scope.get("outputs") or scope["model"].eval()(**inputs)
            answers.setdefault(repo, []).append((found.logits_per_image if clip else found.logits).tolist())
    auto = AutoPeftModelForSequenceClassification.from_pretrained("me/fam-cola", num_labels=3)
    answers["auto"] = auto.eval()(input_ids=words).logits.tolist()
    del sys.modules["cart_hf"]  # and one that has it
    from cart_hf import MultiTaskModel
    served = MultiTaskModel.from_pretrained("me/fam")(input_ids=words)
    answers["served"] = {task: output.logits.tolist() for task, output in served.items()}
print(json.dumps(answers))
"""


def card(files: dict[str, bytes], path: str = "README.md") -> dict:
    return yaml.safe_load(files[path].decode().split("---\n")[1])


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "\nMy own words.\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("families")
    with serving(ACCOUNTS, WritableHub) as hub:
        fill(hub, folder)
        hub.add("me/blocked-cola", folder / "foreign", readers=[WRITER])
        hub.fail(lambda request: "/me/cut-cola/commit/" in request.path, status=403, times=1)
        yield World(hub, folder, {}, {})


@pytest.fixture(scope="module")
def local(world: World) -> Path:
    """Compressed folders of local models."""
    place = world.folder / "local"
    base, models = make_family(place / "roberta", "roberta")
    named = [f"{name}={path}" for name, path in zip(("sst2", "cola", LONG), models, strict=True)]
    cart_hf.compress(base=base, models=named[:2], output=place / "two", rank=4)
    cart_hf.compress(base=base, models=named[1:], output=place / "long", rank=2)
    cart_hf.compress(base=base, models=named[1:2], output=place / "one", rank=4)
    cart_hf.merge(base=base, models=named[1:], output=place / "plain", method="average")
    base, towers = make_clip(place / "clip")
    save_tokenizer("clip", base)
    save_processor("clip", base)
    cart_hf.compress(base=base, models=towers, output=place / "clip-3", rank=4, restore="none")
    for copy in ("kept", "measured"):
        shutil.copytree(place / "two", place / copy)
    score = TaskResult({"accuracy": 0.75}, 0.75, "accuracy", 8, 0.5, settings={"split": "validation"})
    Results(str(place), None, None, None, {"sst2": score}).save(place / "measured" / "results.json")
    shutil.copytree(place / "measured", place / "edited")
    for path in ("README.md", "adapters/cola/README.md"):
        edit(place / "edited" / path)
    text = {"kind": TEXT_TASK, "text": "first", "label_mapping": "index"}
    image = {"kind": IMAGE_TASK, "classes": ["cat", "dog"], "templates": ["a {}"]}
    labels = {"label": [0, 1, 1, 0, 1]}
    for seed, task in enumerate(("sst2", "cola")):
        write_split(place / "data" / task, "test", {"first": texts(5, seed=seed), **labels})
    for seed, task in enumerate(("task0", "task1")):
        rows = {"image": images(5, seed), **labels}
        write_split(place / "data" / task, "test", rows, image=datasets.Image())
    write_tasks(place / "mine.yaml", sst2=text, cola=text, task0=image, task1=image)
    return place


def measuring(local: Path, *tasks: str) -> Evaluation:
    return Evaluation(tasks=tasks, tasks_file=str(local / "mine.yaml"), data=str(local / "data"))


@pytest.fixture(scope="module")
def pushed(world: World, local: Path) -> World:
    """The user's own commands, one after the other."""
    text = ["--base", BASE, "--models", *(f"{task}={name}" for task, name in TEXT.items())]
    out, one = str(world.folder / "compressed"), str(world.folder / "one")
    measured = str(local / "measured")
    where = ["--tasks-file", str(local / "mine.yaml"), "--data", str(local / "data"), "--device", "cpu", "--output"]
    world.run(
        {
            "compress": ["compress", *text, "--output", out, "--rank", "4"],
            "blocked": ["push", out, "me/blocked"],
            "dry run": ["push", out, "me/dry", "--dry-run", "--format", "json"],
            "push": ["push", out, "me/fam"],
            "again": ["push", out, "fam"],
            "hidden": ["push", str(local / "two"), "me/hidden", "--private"],
            "measured": ["push", measured, "me/hidden", "--format", "json"],
            "edited": ["push", str(local / "edited"), "me/hidden"],
            "over theirs": ["push", measured, "me/hidden"],
            "shy": ["push", str(local / "two"), "me/shy", "--private", "--no-family"],
            "shy family": ["push", str(local / "two"), "me/shy"],
            "cut": ["push", str(local / "two"), "me/cut"],
            "cut again": ["push", str(local / "two"), "me/cut"],
            "too long": ["push", str(local / "long"), "me/long"],
            "long": ["push", str(local / "long"), "me/long", "--no-family"],
            "single": ["compress", "--base", BASE, "--models", f"cola={TEXT['cola']}", "--output", one, "--rank", "4"],
            "one": ["push", one, "me/one"],
            "one, again": ["push", one, "me/one"],
            "one, local": ["push", str(local / "one"), "me/one-local"],
            "clip": ["push", str(local / "clip-3"), "me/clip-3"],
            "merge over it": ["push", str(local / "plain"), "me/long"],
            "score": ["evaluate", "me/fam", "--tasks", "sst2", "cola", *where, str(local / "fam.json")],
            "score clip": ["evaluate", "me/clip-3", "--tasks", "task0", "task1", *where, str(local / "clip-3.json")],
        }
    )
    return world


def local_logits(folder: Path, task: str) -> list:
    model = RobertaForSequenceClassification.from_pretrained(folder, subfolder=f"tasks/{task}")
    return run(PeftModel.from_pretrained(model, folder / "adapters" / task))


def run(model: torch.nn.Module) -> list:
    with torch.no_grad():
        return model.eval()(input_ids=WORDS).logits.tolist()


def test_every_command_does_its_work(pushed: World) -> None:
    refused = {"blocked", "too long", "cut"}
    assert not {case: answer for case, answer in pushed.outcomes.items() if answer.code and case not in refused}


def test_plain_peft_loads_what_the_cards_say(pushed: World, local: Path) -> None:
    repos = ["me/fam", "me/fam-sst2", "me/fam-cola", "me/fam-rte", "me/one", "me/clip-3", "me/clip-3-task1"]
    settings = environment(pushed.hub.url, pushed.folder / "clean", HF_TOKEN=WRITER, PYTHONPATH="")
    answer = run_python(CONSUMER, *repos, environment=settings, cwd=pushed.folder.parent)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    compressed = pushed.folder / "compressed"
    for task in TEXT:
        assert found[f"me/fam-{task}"] == [local_logits(compressed, task)]
    assert found["me/fam"] == found["me/fam-sst2"]
    assert found["auto"] == found["me/fam-cola"][0]
    base = RobertaForSequenceClassification.from_pretrained(pushed.folder / "text" / "base", num_labels=3)
    assert found["me/one"] == [run(PeftModel.from_pretrained(base, pushed.folder / "one"))]
    for task in TEXT:
        assert torch.tensor(found["served"][task]).allclose(torch.tensor(found[f"me/fam-{task}"][0]), atol=1e-5)
    alone, mixed = found["me/clip-3"]
    second = found["me/clip-3-task1"][0]
    assert alone != second
    for row, expected in zip(mixed, (alone[0], second[1]), strict=True):  # a batch whose examples are of two tasks
        assert row == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("own_caches")
def test_what_was_pushed_scores_as_the_folder(pushed: World, local: Path) -> None:
    for name, folder, tasks in (
        ("fam", pushed.folder / "compressed", ("sst2", "cola")),
        ("clip-3", local / "clip-3", ("task0", "task1")),
    ):
        found = Results.load(local / f"{name}.json")
        here = cart_hf.evaluate(folder, measuring(local, *tasks))
        assert {task: r.metrics for task, r in found.tasks.items()} == {t: r.metrics for t, r in here.tasks.items()}
        assert tuple(found.tasks) == tasks
        assert np.isfinite(found.average)


def test_a_clip_is_the_same_there_and_here(pushed: World, local: Path) -> None:
    files = pushed.files("me/clip-3")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    place = local / "clip-3"
    for task in ("task0", "task1", "task2"):
        weights = (place / "adapters" / task / "adapter_model.safetensors").read_bytes()
        assert files[f"adapters/{task}/adapter_model.safetensors"] == weights
        assert pushed.files(f"me/clip-3-{task}")["adapter_model.safetensors"] == weights
    served = cart_hf.MultiTaskModel.from_pretrained(place)
    served.add_zero_shot("task1", ["cat", "dog"], ["{}"])
    plain = PeftModel.from_pretrained(CLIPModel.from_pretrained(place), place / "adapters" / "task1").eval()
    with torch.no_grad():
        embedded = plain.get_image_features(pixel_values=PIXELS)
        embedded = getattr(embedded, "pooler_output", embedded)
        logits = served(pixel_values=PIXELS)["task1"].logits
        expected = torch.nn.functional.normalize(embedded, dim=-1) @ served.zero_shot_0.T
    torch.testing.assert_close(logits, expected * plain.logit_scale.exp(), atol=1e-4, rtol=1e-4)


def test_a_family_of_repositories(pushed: World) -> None:
    folder = pushed.folder / "compressed"
    local = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert pushed.files("me/fam").keys() == {*local, ".gitattributes"}
    for task in TEXT:
        files = pushed.files(f"me/fam-{task}")
        assert files.keys() == {*ADAPTER, ".gitattributes"}
        same = ("adapter_config.json", "adapter_model.safetensors", "README.md")
        assert all(files[name] == pushed.files("me/fam")[f"adapters/{task}/{name}"] for name in same)
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/fam"
        assert json.loads(files["compress.json"])["tasks"].keys() == {task}
        data = card(files)
        assert (data["base_model"], data["base_model_relation"]) == ("me/fam", "adapter")
        assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-classification")
        assert {"lora", "cart", "cart-hf"} <= set(data["tags"])
        assert not wrong_metadata(data)
    assert "me/fam-sst2\n" in pushed.outcomes["push"].out
    assert 'PeftModel.from_pretrained(model, "me/fam-sst2")' in pushed.outcomes["push"].out


def test_a_push_that_stopped_in_the_middle_goes_on(pushed: World) -> None:
    assert pushed.outcomes["cut"].code == 2
    assert "me/cut-cola: the token may not write there" in pushed.outcomes["cut"].errors[0]
    out = pushed.outcomes["cut again"].out
    assert out.count("has all of it already") == 2
    assert "pushed 4 files" in out
    assert [pushed.commits(f"me/cut{end}") for end in ("", "-sst2", "-cola")] == [1] * 3


def test_one_repository_serves_every_task(pushed: World, tmp_path: Path) -> None:
    """The main repository holds all of the folder."""
    for name, data in pushed.files("me/fam").items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with torch.no_grad():
        found = cart_hf.MultiTaskModel.from_pretrained(tmp_path)(input_ids=WORDS)
    for task in TEXT:
        expected = torch.tensor(local_logits(pushed.folder / "compressed", task))
        torch.testing.assert_close(found[task].logits, expected, atol=1e-5, rtol=1e-5)


def test_the_folder_keeps_its_own_paths(pushed: World) -> None:
    config = json.loads((pushed.folder / "compressed" / "adapters" / "cola" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pushed.folder / "compressed" / "tasks" / "cola")


def test_a_repeated_push_sends_nothing(pushed: World) -> None:
    answer = pushed.outcomes["again"]
    assert answer.out.count("has all of it already") == 4
    assert [pushed.commits(f"me/fam{end}") for end in ("", "-sst2", "-cola", "-rte")] == [1] * 4
    stored = [request.path for request in pushed.hub.log if is_upload(request)]
    assert len(set(stored)) == len(stored)


def test_results_go_into_the_cards_and_nothing_else_is_sent(pushed: World) -> None:
    told = json.loads(pushed.outcomes["measured"].out)
    assert set(told["files"]) == {"README.md", "results.json", "adapters/sst2/README.md"}
    assert {one["repo"]: list(one["files"]) for one in told["members"]} == {
        "me/hidden-sst2": ["README.md"],
        "me/hidden-cola": [],
    }
    for card_ in (card(pushed.files("me/hidden-sst2")), card(pushed.files("me/hidden"), "adapters/sst2/README.md")):
        (result,) = card_["model-index"][0]["results"]
        assert [metric["value"] for metric in result["metrics"]] == [0.75]
    assert b"It has not been measured yet." in pushed.files("me/hidden-cola")["README.md"]


def test_a_dry_run_lists_every_repository(pushed: World) -> None:
    told = json.loads(pushed.outcomes["dry run"].out)
    assert [told["repo"], *(one["repo"] for one in told["members"])] == ["me/dry", *(f"me/dry-{t}" for t in TEXT)]
    assert all(set(one["files"]) == ADAPTER for one in told["members"])
    assert not [name for name in pushed.hub.repositories if name.startswith("me/dry")]


def test_a_foreign_member_is_found_before_anything_is_sent(pushed: World) -> None:
    answer = pushed.outcomes["blocked"]
    assert answer.code == 2
    assert len(answer.errors) == 1
    assert "me/blocked-cola exists and was not written by cart-hf" in answer.errors[0]
    assert "me/blocked" not in pushed.hub.repositories
    assert "me/blocked-sst2" not in pushed.hub.repositories


def test_a_family_can_be_checked_before_there_is_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", world.hub.url)
    assert check_push("new", tasks=TEXT, token=WRITER) == "me/new"
    with pytest.raises(cart_hf.UserError, match="me/blocked-cola exists and was not written by cart-hf"):
        check_push("me/blocked", tasks=TEXT, token=WRITER)
    assert check_push("me/blocked", token=WRITER) == "me/blocked"


def test_no_path_of_this_machine_and_no_private_model_is_published(pushed: World) -> None:
    names = [name for name in pushed.hub.repositories if re.match("me/(fam|hidden|shy|long|one|clip-3)", name)]
    files = [(repo, *item) for repo in names for item in pushed.files(repo).items()]
    assert len(files) > 80
    assert not [(repo, name) for repo, name, data in files if str(pushed.folder).encode() in data]
    public = [(repo, name, data) for repo, name, data in files if not pushed.hub.repositories[repo].private]
    assert not [(repo, name) for repo, name, data in public if b"roberta-rte" in data]
    assert "| rte | a private model |" in pushed.files("me/fam")["README.md"].decode()


def test_what_belongs_to_a_private_repository_is_private(pushed: World) -> None:
    names = [f"me/{main}{member}" for main in ("hidden", "shy") for member in ("", "-sst2", "-cola")]
    assert [pushed.hub.repositories[name].private for name in names] == [True] * 6
    assert not pushed.hub.repositories["me/fam-sst2"].private


def test_a_card_that_people_edited_stays(pushed: World, local: Path) -> None:
    assert pushed.outcomes["edited"].err.count("was edited by people and is sent as it is") == 2
    for repo, path in (("me/hidden", "README.md"), ("me/hidden-cola", "adapters/cola/README.md")):
        sent = pushed.files(repo)["README.md"]
        assert sent == (local / "edited" / path).read_bytes()
        assert b"My own words." in sent
    assert is_ours(pushed.files("me/hidden-sst2")["README.md"].decode())
    assert "stays as it is (me/hidden-cola: README.md)" in pushed.outcomes["over theirs"].err
    assert pushed.files("me/hidden")["adapters/cola/README.md"] == sent


def test_a_task_whose_repository_cannot_be_named(pushed: World) -> None:
    answer = pushed.outcomes["too long"]
    assert answer.code == 2
    assert len(answer.errors) == 1
    assert f"'me/long-{LONG}' cannot name the repository of an adapter" in answer.errors[0]
    assert "--no-family" in answer.errors[0]
    assert not [name for name in pushed.hub.repositories if name.startswith("me/long-")]


def test_one_repository_only(pushed: World) -> None:
    first = next(iter(pushed.hub.repositories["me/long"].commits.values()))
    commits = list(pushed.hub.repositories["me/long"].commits.values())
    files = {name: file.path.read_bytes() for name, file in commits[1].items()}
    assert first.keys() == {".gitattributes"}
    config = json.loads(files[f"adapters/{LONG}/adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/long"
    text = files["README.md"].decode()
    assert 'PeftModel.from_pretrained(model, "me/long", subfolder="adapters/cola")' in text
    assert "repository of its own" not in text


def test_a_merge_pushed_over_it_leaves_no_adapters(pushed: World) -> None:
    files = pushed.files("me/long")
    assert "merge.json" in files
    assert not [name for name in files if name.startswith("adapters/") or name == "compress.json"]


def test_an_adapter_of_the_base_is_an_ordinary_adapter_repository(pushed: World) -> None:
    files = pushed.files("me/one")
    assert files.keys() == {*ADAPTER, "cart_hf.yaml", ".gitattributes"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    data = card(files)
    assert (data["base_model"], data["base_model_relation"], data["license"]) == (BASE, "adapter", "mit")
    assert "has all of it already" in pushed.outcomes["one, again"].out


def test_an_adapter_of_a_local_base_says_so(pushed: World) -> None:
    files = pushed.files("me/one-local")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert "base_model" not in card(files)
    assert 'from_pretrained("path/to/base", num_labels=3)' in files["README.md"].decode()
    assert "the base is a local or a private model" in pushed.outcomes["one, local"].err


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("adapters/cola/adapter_model.safetensors", None, "(no adapters/cola/adapter_model.safetensors)"),
        ("merge.json", None, "is not a merged model (no merge.json)"),
        ("compress.json", "{}", "compress.json is not what this version of cart-hf writes; compress again"),
    ],
)
def test_damaged_folders_are_refused(local: Path, tmp_path: Path, file: str, text: str | None, message: str) -> None:
    folder = Path(shutil.copytree(local / "two", tmp_path / "copy"))
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(cart_hf.UserError, match=re.escape(message)):
        cart_hf.push(folder, "org/x")


def test_a_local_card_is_of_the_folder(local: Path) -> None:
    text = (local / "kept" / "README.md").read_text()
    assert is_ours(text)
    assert "\n# two\n" in text
    assert is_ours((local / "kept" / "adapters" / "cola" / "README.md").read_text())
    assert is_ours((local / "one" / "README.md").read_text())
