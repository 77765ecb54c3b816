"""Merges go to a Hub on this machine by the unmodified client, and come back by plain transformers."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from adapted_folder import pretend_adapted
from checkpoints import make_clip, make_family
from commands import Answer, assert_absent, environment, run_cli
from hub_server import Request, serving
from hub_uploads import Account, WritableHub
from small_tasks import numbers, save_processor, save_tokenizer, texts, write_split
from transformers import AutoModel, AutoModelForSequenceClassification, CLIPModel
from warm_python import run_python

import cart_hf

WRITER, READ_ONLY, WRONG = "hf_writerSECRETtoken", "hf_readonlySECRETtoken", "hf_wrongSECRETtoken"
ACCOUNTS = {
    WRITER: Account("me", {"org": "write", "guests": "read"}),
    READ_ONLY: Account("me", {"org": "write"}, role="read"),
}
CLIP = "tanganke/clip-vit-base-patch32_"
SETS = ("sun397", "gtsrb", "dtd")
TEXT = {"sst2": "textattack/roberta-base-SST-2", "cola": "textattack/roberta-base-CoLA", "rte": "me/roberta-rte"}
LABELS = ["negative", "positive"]
REWRITTEN = {"README.md", "merge.json", "cart_hf.yaml", "results.json"}  # for the repository

# A machine that has transformers and datasets, but not cart-hf.
CONSUMER = """
import json, sys, torch
sys.modules["cart_hf"] = None
from datasets import load_dataset
from transformers import AutoModel, AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer, CLIPModel
text, clip = sys.argv[1:]
rows = load_dataset("nyu-mll/glue", "sst2", split="validation")
tokens = AutoTokenizer.from_pretrained(text)(list(rows["sentence"]), padding=True, truncation=True, max_length=18, return_tensors="pt")
task = AutoModelForSequenceClassification.from_pretrained(text, subfolder="tasks/sst2").eval()
own = AutoTokenizer.from_pretrained(text, subfolder="tasks/sst2")
with torch.no_grad():
    right = (task(**tokens).logits.argmax(1) == torch.tensor(list(rows["label"]))).float().mean()
processor = AutoProcessor.from_pretrained(clip)
sums = {name: sum(float(tensor.double().sum()) for key, tensor in model.state_dict().items() if "pooler" not in key)
        for name, model in (("text", AutoModel.from_pretrained(text)), ("task", task), ("clip", CLIPModel.from_pretrained(clip)))}
print(json.dumps({"accuracy": float(right), "crop": processor.image_processor.crop_size["height"],
                  "tokens": processor(text=["a b"])["input_ids"], "names": [own.name_or_path], **sums}))
"""


def total(model: torch.nn.Module) -> float:
    """Return the sum of what the folder holds: it has no pooler, which transformers then makes up."""
    return sum(float(tensor.double().sum()) for name, tensor in model.state_dict().items() if "pooler" not in name)


def is_upload(request: Request) -> bool:
    return request.method == "PUT"


@dataclass
class World:
    """A hub, and folders that lie beside it."""

    hub: WritableHub
    folder: Path
    outcomes: dict[str, Answer]
    logs: dict[str, list[Request]]

    def run(self, commands: dict[str, list[str]], **more: str) -> None:
        """Run command lines in one process; a line without HF_TOKEN has the writer's."""
        lines = [
            words if words[0].startswith("HF_TOKEN") else [f"HF_TOKEN={WRITER}", *words] for words in commands.values()
        ]
        self.outcomes |= dict(zip(commands, run_cli(lines, self.hub.url, self.folder / "home", **more), strict=True))

    def files(self, repo: str) -> dict[str, bytes]:
        """Return what a repository's main branch holds."""
        repository = self.hub.repositories[repo]
        return {name: file.path.read_bytes() for name, file in repository.commits[repository.refs["main"]].items()}

    def metadata(self, repo: str) -> dict[str, object]:
        return yaml.safe_load(self.files(repo)["README.md"].decode().split("---\n")[1])

    def commits(self, repo: str) -> int:
        return len(self.hub.repositories[repo].commits) - 1  # the first is the Hub's own

    def sent(self, repo: str, since: int = 0) -> list[Request]:
        return [
            request for request in self.hub.log[since:] if f"/{repo}/" in request.path or f"/{repo}." in request.path
        ]


def write_card(folder: Path | str, **metadata: object) -> None:
    (Path(folder) / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# a model\n")


def fill(hub: WritableHub, folder: Path) -> None:
    """Put the checkpoints that the literature uses on the hub, small: their ids, layout and class, not their size."""
    base, models = make_family(folder / "text", "roberta")
    save_tokenizer("roberta", base, *models)
    write_card(base, license="mit", language="en")
    hub.add("FacebookAI/roberta-base", base)
    for (task, name), place in zip(TEXT.items(), models, strict=True):
        write_card(place, license="mit", language=["en"], datasets=["nyu-mll/glue"])
        hub.add(name, place, private=task == "rte", readers=[WRITER])
    base, towers = make_clip(folder / "clip")
    save_tokenizer("clip", base)
    save_processor("clip", base)
    hub.add("openai/clip-vit-base-patch32", base)
    for name, place in zip(SETS, towers, strict=True):
        write_card(place, license="apache-2.0" if name == "dtd" else "mit")
        hub.add(CLIP + name, place)
    rows = {"sentence": texts(12, seed=3), "label": numbers(12, 2, seed=5)}
    write_split(folder / "glue" / "sst2", "validation-00000-of-00001", rows, label=LABELS)
    configs = [{"config_name": "sst2", "data_files": [{"split": "validation", "path": "sst2/validation-*"}]}]
    write_card(folder / "glue", configs=configs)
    hub.add("datasets/nyu-mll/glue", folder / "glue")
    (folder / "foreign").mkdir()
    write_card(folder / "foreign", license="mit")
    for name in ("me/foreign", "me/taken"):
        hub.add(name, folder / "foreign", readers=[WRITER])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The user's own commands, one after the other."""
    folder = tmp_path_factory.mktemp("push")
    with serving(ACCOUNTS, WritableHub) as hub:
        fill(hub, folder)
        world = World(hub, folder, {}, {})
        merged, results = str(folder / "merged"), str(folder / "merged" / "results.json")
        text = ["--base", "FacebookAI/roberta-base", "--models", *(f"{task}={name}" for task, name in TEXT.items())]
        evaluate = ["evaluate", "org/glue-3", "--tasks", "sst2", "--label-mapping", "index", "--device", "cpu"]
        world.run(
            {
                # as the user writes it: no output folder, it is called like the repository
                "clip": [
                    *("merge", "--base", "openai/clip-vit-base-patch32", "--models", *(CLIP + name for name in SETS)),
                    *("--push-to-hub", "me/clip-3"),
                ],
                "text": ["merge", *text, "--output", merged, "--push-to-hub", "org/glue-3"],
                "evaluate": [*evaluate, "--output", results],
                "again, with results": ["push", merged, "org/glue-3", "--licence", "apache-2.0", "--format", "json"],
                "unchanged": ["push", merged, "org/glue-3", "--licence", "apache-2.0"],
                "theirs": ["push", merged, "me/theirs"],
                "private": ["push", merged, "secret", "--private"],
            }
        )
        yield world


def test_the_users_command_merges_and_pushes(world: World) -> None:
    answer = world.outcomes["clip"]
    assert answer.code == 0, answer.err
    assert f"{world.hub.url}/me/clip-3\n" in answer.out
    lines = "\n".join(line.strip() for line in answer.out.splitlines()[-2:])
    assert lines == 'from transformers import CLIPModel\nmodel = CLIPModel.from_pretrained("me/clip-3")'
    assert (world.folder / "clip-3" / "model.safetensors").is_file()
    assert world.commits("me/clip-3") == 1
    metadata = world.metadata("me/clip-3")
    assert metadata["base_model"] == ["openai/clip-vit-base-patch32", *(CLIP + name for name in SETS)]
    assert metadata["pipeline_tag"] == "zero-shot-image-classification"
    assert metadata["license"] == "other"  # they differ, and the base does not say
    assert "base: unknown" in answer.err
    assert "--licence" in answer.err


def test_plain_transformers_loads_what_was_pushed(world: World) -> None:
    settings = environment(world.hub.url, world.folder / "clean", HF_TOKEN=WRITER, PYTHONPATH="")
    answer = run_python(CONSUMER, "org/glue-3", "me/clip-3", environment=settings, cwd=world.folder.parent)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    place = world.folder / "merged"
    assert found["text"] == total(AutoModel.from_pretrained(place))
    assert found["task"] == total(AutoModelForSequenceClassification.from_pretrained(place, subfolder="tasks/sst2"))
    assert found["clip"] == total(CLIPModel.from_pretrained(world.folder / "clip-3"))
    assert found["crop"] == 16
    score = json.loads((place / "results.json").read_text())["tasks"]["sst2"]["score"]
    assert found["accuracy"] == pytest.approx(score)


def test_every_byte_string_is_sent_once(world: World) -> None:
    """Four folders hold the backbone; the store sees it once."""
    stored = [request for request in world.hub.log if is_upload(request)]
    assert len({request.path for request in stored}) == len(stored)
    files = world.files("org/glue-3")
    shared = [name for name, data in files.items() if data == files["model.safetensors"]]
    assert shared == ["model.safetensors", *(f"tasks/{task}/backbone.safetensors" for task in sorted(TEXT))]


def test_the_repository_is_the_folder(world: World) -> None:
    local = {
        p.relative_to(world.folder / "merged").as_posix(): p
        for p in (world.folder / "merged").rglob("*")
        if p.is_file()
    }
    remote = world.files("org/glue-3")
    assert set(remote) == {*local, ".gitattributes"}
    assert all(path.read_bytes() == remote[name] for name, path in local.items() if name not in REWRITTEN)
    assert (world.folder / "merged" / "README.md").read_bytes() == world.files("me/secret")["README.md"]


def test_a_second_push_sends_what_is_new_and_a_third_nothing(world: World) -> None:
    assert world.outcomes["again, with results"].code == 0, world.outcomes["again, with results"].err
    pushed = json.loads(world.outcomes["again, with results"].out)
    assert set(pushed["files"]) == {"README.md", "results.json"}
    assert pushed["commit"] in world.hub.repositories["org/glue-3"].commits
    assert "has all of it already" in world.outcomes["unchanged"].out
    assert world.commits("org/glue-3") == 2


def test_the_card_tells_of_the_sources_and_the_results(world: World) -> None:
    metadata, text = world.metadata("org/glue-3"), world.files("org/glue-3")["README.md"].decode()
    assert metadata["base_model"] == ["FacebookAI/roberta-base", TEXT["sst2"], TEXT["cola"]]
    assert metadata["base_model_relation"] == "merge"
    assert (metadata["license"], metadata["language"], metadata["datasets"]) == ("apache-2.0", ["en"], ["nyu-mll/glue"])
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"] == {"name": "SST-2", "type": "nyu-mll/glue", "config": "sst2", "split": "validation"}
    score = json.loads((world.folder / "merged" / "results.json").read_text())["tasks"]["sst2"]["score"]
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("accuracy", score)]
    commit = world.hub.repositories[TEXT["sst2"]].refs["main"]
    assert f"[{TEXT['sst2']}](https://huggingface.co/{TEXT['sst2']}) at [`{commit[:8]}`]" in text
    assert 'RobertaForSequenceClassification.from_pretrained("org/glue-3", subfolder="tasks/sst2")' in text


def test_a_private_source_is_named_in_private_repositories_only(world: World) -> None:
    public, private = world.files("org/glue-3"), world.files("me/secret")
    assert not [name for name, data in public.items() if b"roberta-rte" in data]
    assert "1 of the sources are private" in world.outcomes["text"].err
    assert world.hub.repositories["me/secret"].private
    assert not world.hub.repositories["org/glue-3"].private
    assert {name for name, data in private.items() if b"roberta-rte" in data} == {
        "README.md",
        "merge.json",
        "cart_hf.yaml",
    }
    assert world.metadata("me/secret")["license"] == "mit"  # the one that all share
    assert "licence" not in world.outcomes["private"].err


def test_no_path_of_this_machine_is_published(world: World) -> None:
    files = [(repo, *item) for repo in ("org/glue-3", "me/secret", "me/clip-3") for item in world.files(repo).items()]
    assert len(files) > 30
    assert not [(repo, name) for repo, name, data in files if str(world.folder).encode() in data]


@dataclass
class Trouble:
    world: World
    log: list[Request]


REFUSED = {
    # command line after `push MERGED`, phrases of the one message
    "read-only token": (["me/x"], "me/x: the access token is read-only; make one with the write role"),
    "wrong token": (
        ["me/x"],
        "the Hub does not know the access token; log in again (hf auth login), or correct HF_TOKEN",
    ),
    "no token": (["me/x"], "no access token: log in (hf auth login) or set HF_TOKEN"),
    "another's namespace": (
        ["you/x"],
        "'you' is neither you nor an organisation of yours (you may write to me, org, guests)",
    ),
    "guest": (["guests/x"], "your role in 'guests' is 'read', which may not write"),
    "invalid name": (["me/two--dashes"], "'me/two--dashes' cannot name a repository: Cannot have -- or .."),
    "foreign": (
        ["me/foreign"],
        "me/foreign exists and was not written by cart-hf (no merge.json or compress.json of ours)",
    ),
    "public": (["org/glue-3", "--private"], "org/glue-3 exists and is public; make it private in its settings"),
    "licence": (
        ["me/licence", "--licence", "MIT License"],
        'the Hub refuses the card\'s metadata: "license" must be one of',
    ),
    "forbidden": (["me/forbidden"], "the token may not write there; it needs the write role for 'me'"),
    "down": (["me/down"], "{url} is out of order or busy (Server error '503", "push again: what the Hub already has"),
    "store down": (["me/store"], "{url} is out of order or busy", "503"),
    "cut": (["me/cut"], "the connection to {url} failed", "push again: what the Hub already has is not sent twice"),
    "raced": (["me/raced"], "somebody else has committed to it just now; look at their commit, then push again"),
}
TOKENS = {"read-only token": READ_ONLY, "wrong token": WRONG, "no token": ""}


def break_things(hub: WritableHub) -> None:
    """Let something go wrong in each of some repositories."""

    def intrude(request: Request) -> bool:
        """Commit between the push's look at the repository and its own commit; edit a card between two pushes."""
        if "/me/raced/commit/" in request.path:
            hub.commit(hub.repositories["me/raced"], "main", {"README.md": hub.file("README.md", b"faster")})
        elif request.path == "/api/models/me/theirs":
            repository = hub.repositories["me/theirs"]
            files = dict(repository.commits[repository.refs["main"]])
            card = files["README.md"].path.read_bytes()
            if b"Their words" not in card:
                hub.commit(repository, "main", files | {"README.md": hub.file("README.md", card + b"Their words.\n")})
        return False

    hub.drop(intrude)
    hub.fail(lambda r: r.path == "/api/models/me/forbidden/preupload/main", status=403)
    hub.fail(lambda r: "/me/down/commit/" in r.path, status=503)
    hub.drop(lambda r: "/me/cut/preupload/" in r.path)
    hub.fail(lambda r: "/me/busy/commit/" in r.path, status=503, times=2)
    hub.drop(lambda r: "/me/lost/commit/" in r.path, after=0, times=1)
    hub.fail(lambda r: "/me/after/commit/" in r.path, status=403)
    hub.fail(is_upload, status=503, times=6)  # the first that is sent, as often as the client tries


@pytest.fixture(scope="module")
def trouble(world: World) -> Trouble:
    """Everything that can go wrong, each with a repository of its own."""
    hub, folder = world.hub, world.folder
    head = (folder / "merged" / "tasks" / "cola" / "head.safetensors").read_bytes()
    hub.place(hashlib.sha256(head).hexdigest()).unlink()  # so that this file must be sent again
    copies = {
        name: shutil.copytree(folder / "merged", folder / name) for name in ("mine", "telling", "smaller", "broken")
    }
    card = (folder / "merged" / "README.md").read_text()  # the private repository's, which names all sources
    (copies["telling"] / "README.md").write_text(f"{card}\nMy own words.\n")
    (copies["mine"] / "README.md").write_text(card.replace(TEXT["rte"], "a/model"))
    shutil.rmtree(copies["smaller"] / "tasks" / "cola")
    (copies["broken"] / "tasks" / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "plain").mkdir()
    (folder / "plain" / "config.json").write_text("{}")
    merged, mine, smaller = str(folder / "merged"), str(copies["mine"]), str(copies["smaller"])
    models = [f"{task}={folder / 'text' / f'task{i}'}" for i, task in enumerate(TEXT)]
    merge = ["merge", "--base", str(folder / "text" / "base"), "--models", *models, "--device", "cpu", "--output"]
    break_things(hub)
    seen = len(hub.log)
    refused = {
        case: [f"HF_TOKEN={TOKENS.get(case, WRITER)}", "push", merged, *words] for case, (words, *_) in REFUSED.items()
    }
    world.run(
        {"store down": refused.pop("store down"), "store": ["push", merged, "me/store"]}
        | refused
        | {
            "busy": ["push", merged, "me/busy"],
            "lost": ["push", merged, "me/lost"],
            "dry run": ["push", mine, "me/dry", "--dry-run", "--format", "json"],
            "mine": ["push", mine, "me/mine"],
            "telling": ["push", str(copies["telling"]), "org/glue-3"],
            "theirs again": ["push", merged, "me/theirs"],
            "theirs, told": ["push", merged, "me/theirs", "--overwrite"],
            "foreign, told": ["push", merged, "me/taken", "--overwrite"],
            "smaller": ["push", smaller, "me/mine", "--dry-run"],
            "smaller, sent": ["push", smaller, "me/mine"],
            "broken": ["push", str(copies["broken"]), "me/broken"],
            "no model": ["push", str(folder / "plain"), "me/plain"],
            "no folder": ["push", str(folder / "nowhere"), "me/plain"],
            "merge, foreign": [*merge, str(folder / "not-merged"), "--push-to-hub", "me/foreign"],
            "merge, nameless": [*merge, str(folder / "not-merged"), "--private"],
            "merge, refused": [*merge, str(folder / "after"), "--push-to-hub", "after"],
        }
    )
    return Trouble(world, hub.log[seen:])


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pushed_is_refused_in_one_line(trouble: Trouble, case: str) -> None:
    answer = trouble.world.outcomes[case]
    phrases = [phrase.format(url=trouble.world.hub.url) for phrase in REFUSED[case][1:]]
    assert answer.code == 2, answer
    assert len(answer.errors) == 1, answer
    assert "Traceback" not in answer.err
    assert not [phrase for phrase in phrases if phrase not in answer.errors[0]], answer.errors


def test_what_is_refused_beforehand_makes_no_repository(trouble: Trouble) -> None:
    assert not {"me/x", "you/x", "guests/x", "me/two--dashes"} & set(trouble.world.hub.repositories)


def test_the_hub_is_asked_again_a_few_times(trouble: Trouble) -> None:
    commits = [request.status for request in trouble.log if "/me/busy/commit/" in request.path]
    assert commits == [503, 503, 200]
    assert trouble.world.outcomes["busy"].code == 0
    assert len([request for request in trouble.log if "/me/down/commit/" in request.path]) == 5


def test_a_commit_whose_answer_was_lost_is_not_made_twice(trouble: Trouble) -> None:
    assert trouble.world.outcomes["lost"].code == 0, trouble.world.outcomes["lost"].err
    assert len([request for request in trouble.log if "/me/lost/commit/" in request.path]) == 1
    assert trouble.world.commits("me/lost") == 1


def test_an_interrupted_push_goes_on(trouble: Trouble) -> None:
    """The head did not get through; the second push sends it and nothing else."""
    assert trouble.world.outcomes["store"].code == 0, trouble.world.outcomes["store"].err
    stored = [request for request in trouble.log if is_upload(request)]
    assert len({request.path for request in stored}) == 1
    assert [request.status for request in stored] == [503] * 6 + [200]
    assert trouble.world.commits("me/store") == 1
    assert trouble.world.files("me/store").keys() == trouble.world.files("org/glue-3").keys()


def test_ctrl_c_says_how_to_go_on(trouble: Trouble) -> None:
    """The user interrupts while a head is on its way; the push that is repeated sends that head, and commits once."""
    world, merged = trouble.world, str(trouble.world.folder / "merged")
    head = (world.folder / "merged" / "tasks" / "rte" / "head.safetensors").read_bytes()
    world.hub.place(hashlib.sha256(head).hexdigest()).unlink()
    arrived, go_on = threading.Event(), threading.Event()

    def hold(request: Request) -> bool:
        if is_upload(request):
            arrived.set()
            return go_on.wait(60)
        return False

    world.hub.drop(hold, times=1)
    pushing = subprocess.Popen(
        [sys.executable, "-m", "cart_hf", "push", merged, "me/slow"],
        env=environment(world.hub.url, world.folder / "home", HF_TOKEN=WRITER),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it may be ignored here, as under nohup
    )
    assert arrived.wait(60)
    pushing.send_signal(signal.SIGINT)
    go_on.set()
    _, err = pushing.communicate(timeout=60)
    assert pushing.returncode == 130, err
    assert f"interrupted; `cart-hf push {merged} me/slow` sends what is missing" in err
    assert "Traceback" not in err
    assert world.commits("me/slow") == 0
    seen = len(world.hub.log)
    world.run({"slow": ["push", merged, "me/slow"]})
    assert world.outcomes["slow"].code == 0, world.outcomes["slow"].err
    assert len([request for request in world.hub.log[seen:] if is_upload(request)]) <= 1
    assert world.commits("me/slow") == 1


def test_offline(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the client reads it when it is imported
    with pytest.raises(cart_hf.UserError, match="me/x: HF_HUB_OFFLINE forbids pushing; unset it"):
        cart_hf.push(world.folder / "merged", "me/x")


def test_a_hub_without_xet(trouble: Trouble) -> None:
    world = trouble.world
    world.run({"xet": ["push", str(world.folder / "merged"), "me/xet"]}, HF_HUB_DISABLE_XET="0")
    assert len(world.outcomes["xet"].errors) == 1, world.outcomes["xet"]
    assert "me/xet: uploading by Xet failed" in world.outcomes["xet"].errors[0]
    assert "set HF_HUB_DISABLE_XET=1 if this Hub has no Xet" in world.outcomes["xet"].errors[0]


def test_a_dry_run_lists_what_would_be_sent(trouble: Trouble) -> None:
    world = trouble.world
    assert world.outcomes["dry run"].code == 0, world.outcomes["dry run"].err
    told = json.loads(world.outcomes["dry run"].out)
    assert told["commit"] is None
    assert "me/dry" not in world.hub.repositories
    assert told["files"].keys() == world.files("org/glue-3").keys() - {".gitattributes"}
    data = {name: (world.folder / "mine" / name).read_bytes() for name in told["files"].keys() - REWRITTEN}
    assert all(told["files"][name] == len(content) for name, content in data.items())
    assert told["nbytes"] == sum(map(len, set(data.values()))) + sum(told["files"][name] for name in REWRITTEN)
    answer = world.outcomes["smaller"]
    assert "    delete  tasks/cola/head.safetensors\n" in answer.out
    assert "dry run: nothing was sent" in answer.out
    assert "model.safetensors\n" not in answer.out.replace("tasks/cola/", "")


def test_a_card_that_people_edited_stays(trouble: Trouble) -> None:
    assert trouble.world.outcomes["mine"].code == 0, trouble.world.outcomes["mine"].err
    assert trouble.world.files("me/mine")["README.md"] == (trouble.world.folder / "mine" / "README.md").read_bytes()
    assert "was edited by people and is sent as it is" in trouble.world.outcomes["mine"].err
    assert "the card on the Hub was edited by people and stays" in trouble.world.outcomes["theirs again"].err
    assert trouble.world.outcomes["theirs, told"].code == 0


def test_overwrite_writes_into_what_is_not_ours(trouble: Trouble) -> None:
    assert trouble.world.outcomes["foreign, told"].code == 0, trouble.world.outcomes["foreign, told"].err
    assert b"cart-hf wrote this card" in trouble.world.files("me/taken")["README.md"]
    assert b"a model" in trouble.world.files("me/foreign")["README.md"]


def test_tasks_that_are_gone_go_from_the_repository(trouble: Trouble) -> None:
    assert trouble.world.outcomes["smaller, sent"].code == 0, trouble.world.outcomes["smaller, sent"].err
    assert not [name for name in trouble.world.files("me/mine") if name.startswith("tasks/cola/")]
    assert "tasks/sst2/head.safetensors" in trouble.world.files("me/mine")


@pytest.mark.parametrize(
    ("case", "phrases"),
    [
        ("telling", ("README.md names me/roberta-rte, which is private; take it out, or --name-private-sources",)),
        ("broken", ("cannot read", "tasks/gone.txt: No such file")),
        (
            "no model",
            ("plain is not a merged model (no merge.json): push a folder that cart-hf merge or compress wrote",),
        ),
        ("no folder", ("nowhere is not a folder",)),
        ("merge, foreign", ("me/foreign exists and was not written by cart-hf",)),
        ("merge, nameless", ("name it with --push-to-hub",)),
        (
            "merge, refused",
            ("me/after: the token may not write there", "after is complete: `cart-hf push", "after me/after`"),
        ),
    ],
)
def test_what_is_wrong_here_is_refused(trouble: Trouble, case: str, phrases: tuple[str, ...]) -> None:
    answer = trouble.world.outcomes[case]
    assert answer.code == 2, answer
    assert len(answer.errors) == 1, answer
    assert not [phrase for phrase in phrases if phrase not in answer.errors[0]], answer.errors


def test_a_merge_is_checked_first_and_kept_after(trouble: Trouble) -> None:
    assert_absent(trouble.world.folder / "not-merged")
    assert {"me/broken", "me/plain"}.isdisjoint(trouble.world.hub.repositories)
    assert cart_hf.MultiTaskModel.from_pretrained(trouble.world.folder / "after").tasks == sorted(TEXT)


def test_an_adapted_merge_is_pushed_with_what_it_learnt(world: World) -> None:
    """Without saying where its inputs lie on this machine; a static merge takes what was learnt away again."""
    adapted = Path(shutil.copytree(world.folder / "merged", world.folder / "adapted"))
    pretend_adapted(adapted, {task: str(world.folder / "glue" / task) for task in TEXT})
    static = ["push", str(world.folder / "merged"), "me/adapted", "--dry-run"]
    world.run({"adapted": ["push", str(adapted), "me/adapted"], "adapted, static again": static})
    assert world.outcomes["adapted"].code == 0, world.outcomes["adapted"].err
    files = world.files("me/adapted")
    inside = {path.name for path in (adapted / "adaptation").iterdir()}
    assert {name for name in files if name.startswith("adaptation/")} == {f"adaptation/{name}" for name in inside}
    assert not [name for name, data in files.items() if str(world.folder).encode() in data]
    assert yaml.safe_load(files["cart_hf.yaml"])["coefficients"] == "adaptation/coefficients.safetensors"
    answer = world.outcomes["adapted, static again"]
    assert answer.code == 0, answer.err
    assert len(inside) == 5
    assert not [name for name in inside if f"    delete  adaptation/{name}\n" not in answer.out]


def test_a_token_is_written_nowhere(trouble: Trouble) -> None:
    """Not into the folders, the repositories, the messages or the store's requests."""
    own = [path for path in trouble.world.folder.rglob("*") if path.is_file()]
    pushed = [(repo, *item) for repo in trouble.world.hub.repositories for item in trouble.world.files(repo).items()]
    assert len(own) > 100 and len(pushed) > 100
    assert not [path for path in own if b"SECRET" in path.read_bytes()]
    assert not [(repo, name) for repo, name, data in pushed if b"SECRET" in data]
    assert not [case for case, answer in trouble.world.outcomes.items() if "SECRET" in answer.out + answer.err]
    assert {request.token for request in trouble.world.hub.log if is_upload(request)} == {None}
