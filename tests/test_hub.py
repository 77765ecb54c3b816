"""Merge sources on the Hub, read by the unmodified client from a server on this machine.

The client reads its settings when it is imported, so the command line runs in processes of its own; one process runs
many command lines, since importing transformers takes longer than all of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import copy_backbone, perturb, roberta_config, save
from commands import Answer, assert_absent, run_cli
from hub_server import Hub, Request, serving
from safetensors.torch import load_file
from transformers import RobertaForMaskedLM, RobertaForSequenceClassification

import cart_hf
from cart_hf.recipe import Recipe

READER, OTHER, WRONG = "hf_readerSECRETtoken", "hf_otherSECRETtoken", "hf_wrongSECRETtoken"
DOWN = "hf_down"  # whoever comes with this token finds the hub down
HEADER = 100_001  # what the client asks for at first to read a safetensors header; the test's files are larger


def merge_command(target: Path, *models: str, base: str = "org/base") -> list[str]:
    return ["merge", "--base", base, "--models", *models, "--output", str(target), "--device", "cpu", "--workers", "1"]


def weights(folder: Path) -> dict[str, bytes]:
    """Return every weight file of an output."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def is_weight(request: Request) -> bool:
    return request.method == "GET" and request.path.startswith("/cdn/")  # where the server keeps all LFS files


def is_whole_weight(request: Request) -> bool:
    """Whether a download was begun, or went on: a header is asked for with a range that has an end."""
    return is_weight(request) and (request.range is None or request.range.endswith("-"))


def repository(request: Request) -> str:
    """Return the name of the repository whose weights were asked for."""
    return request.path.split("/")[3]


def assert_refused(outcome: Answer, target: Path, *phrases: str) -> None:
    """Assert that one message says what is wrong with which model, and that nothing was written."""
    assert outcome.code == 2, outcome
    assert len(outcome.errors) == 1, outcome
    assert "Traceback" not in outcome.err
    assert not [phrase for phrase in phrases if phrase not in outcome.errors[0]], outcome.errors
    assert_absent(target)


def save_pickles(source: Path, target: Path, shards: int) -> None:
    """Write a model folder again with its weights in one or more pickles, as before safetensors."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.safetensors"))
    state = load_file(source / "model.safetensors")
    if shards == 1:
        torch.save(state, target / "pytorch_model.bin")
        return
    files = {f"pytorch_model-{i}.bin": list(state)[i::shards] for i in range(shards)}
    for file, keys in files.items():
        torch.save({key: state[key] for key in keys}, target / file)
    weight_map = {key: file for file, keys in files.items() for key in keys}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of model folders: a base, three tasks, and the same or other models in other layouts."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = RobertaForMaskedLM(roberta_config(vocab_size=3000))
    save(base, root / "base")
    (root / "base" / "tokenizer_config.json").write_text('{"model_max_length": 20}')
    for task in range(4):
        model = RobertaForSequenceClassification(roberta_config(vocab_size=3000, num_labels=task + 2))
        copy_backbone(model, base)
        perturb(model, seed=task + 1)
        save(model, root / f"task{task}")
        if task == 0:
            save(model, root / "sharded", max_shard_size="100kB")
    wide = RobertaForSequenceClassification(roberta_config(vocab_size=3000, intermediate_size=32))
    save(wide, root / "wide")
    # things beside a model that a merge has no use for
    (root / "task0" / "README.md").write_text("a card")
    (root / "task0" / "training_args.bin").write_bytes(b"not weights")
    (root / "task0" / "checkpoint-9").mkdir()
    (root / "task0" / "checkpoint-9" / "trainer_state.json").write_text("{}")
    shutil.copytree(root / "task2", root / "collection" / "sub" / "folder")
    save_pickles(root / "task1", root / "pickle", shards=1)
    save_pickles(root / "task2", root / "sharded_pickle", shards=2)
    (root / "empty").mkdir()
    (root / "empty" / "README.md").write_text("nothing else")
    for name in ("weightless", "damaged"):
        (root / name).mkdir()
        shutil.copy(root / "task0" / "config.json", root / name)
    (root / "damaged" / "model.safetensors").write_bytes(b"<html>not weights</html>" * 9)
    return root


def publish(hub: Hub, models: Path) -> None:
    """Fill a hub; ``org/task1`` has moved on since its tag v1."""
    for name in ("base", "task0", "collection", "sharded", "pickle", "sharded_pickle", "wide", "empty", "weightless"):
        hub.add(f"org/{name}", models / name)
    hub.add("org/damaged", models / "damaged")
    hub.add("org/task1", models / "task1", tag="v1")
    hub.add("org/task1", models / "task3")
    hub.add("org/gated", models / "task1", gated=True, readers=(READER,))
    hub.add("org/private", models / "task2", private=True, readers=(READER,))
    for name in ("dropped", "torn", "forbidden", "page", "broken"):  # what happens to them is up to the test
        hub.add(f"org/{name}", models / "task1")


@dataclass
class Online:
    """Command lines run in one process with a cache that was empty, and the log of those that met a working hub."""

    hub: Hub
    home: Path
    folder: Path
    outcomes: dict[str, Answer]
    log: list[Request]


ONLINE = ["a=org/task0", "b=org/task1@v1", "c=org/collection/sub/folder"]
LAYOUTS = ["a=org/sharded", "b=org/pickle", "c=org/sharded_pickle"]


@pytest.fixture(scope="module")
def online(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Online]:
    folder = tmp_path_factory.mktemp("online")
    down = f"HF_TOKEN={DOWN}"
    with serving() as hub:
        publish(hub, models)
        # one download breaks off, and is resumed
        hub.drop(lambda r: is_whole_weight(r) and "/org/base/" in r.path, times=1, after=150_000)
        hub.drop(lambda r: r.token == DOWN)
        commands = {
            "merged": merge_command(folder / "merged", *ONLINE),
            "layouts": merge_command(folder / "layouts", *LAYOUTS),
            "merged, hub down": [down, *merge_command(folder / "merged, hub down", *ONLINE)],
            "layouts, hub down": [down, *merge_command(folder / "layouts, hub down", *LAYOUTS)],
            "uncached, hub down": [down, *merge_command(folder / "uncached, hub down", "a=org/task0", "b=org/wide")],
        }
        outcomes = dict(zip(commands, run_cli(list(commands.values()), hub.url, folder / "home"), strict=True))
        yield Online(hub, folder / "home", folder, outcomes, [r for r in hub.log if r.token is None])


@pytest.fixture(scope="module")
def local(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weight files of the same merge from local folders."""
    target = tmp_path_factory.mktemp("local") / "merged"
    folders = [f"{name}={models / folder}" for name, folder in zip("abc", ("task0", "task1", "task2"), strict=True)]
    cart_hf.merge(base=str(models / "base"), models=folders, output=target, device="cpu", workers=1)
    return weights(target)


@pytest.mark.parametrize("target", ["merged", "layouts"])
def test_models_on_the_hub_merge_to_the_bytes_of_the_local_folders(
    online: Online, local: dict[str, bytes], target: str
) -> None:
    assert online.outcomes[target].code == 0, online.outcomes[target].err
    assert "model.safetensors" in local
    assert weights(online.folder / target) == local
    assert (online.folder / target / "tokenizer_config.json").is_file()


def test_the_output_records_and_pins_the_commits(online: Online) -> None:
    repositories = online.hub.repositories
    expected = {"base": repositories["org/base"].refs["main"], "a": repositories["org/task0"].refs["main"]}
    expected |= {"b": repositories["org/task1"].refs["v1"], "c": repositories["org/collection"].refs["main"]}
    record = json.loads((online.folder / "merged" / "merge.json").read_text())
    sources = [record["base"], *record["models"]]
    assert {source["name"]: source["commit"] for source in sources} == expected
    for source in sources:
        file = source["files"]["model.safetensors"]
        name, _, subfolder = source["reference"].partition("@")[0].removeprefix("org/").partition("/")
        stored = repositories[f"org/{name}"].commits[source["commit"]]
        assert file["sha256"] == stored[f"{subfolder}/model.safetensors" if subfolder else "model.safetensors"].oid
    recipe = Recipe.load(online.folder / "merged" / "cart_hf.yaml")
    pinned = {entry.name: entry.model for entry in recipe.models} | {"base": recipe.base_model}
    assert {name: reference.revision for name, reference in pinned.items()} == expected
    assert (pinned["c"].path, pinned["c"].subfolder) == ("org/collection", "sub/folder")


def test_headers_are_read_by_range_before_any_weights(online: Online) -> None:
    requests = [r for r in online.log if is_weight(r) and repository(r) in ("base", "task0", "task1", "collection")]
    headers = [r for r in requests if not is_whole_weight(r)]
    assert {repository(r) for r in headers} == {"base", "task0", "task1", "collection"}
    assert all((r.status, r.sent) == (206, HEADER) for r in headers)
    whole = requests[len(headers) :]
    assert all(is_whole_weight(r) for r in whole), "a header was read after a download had begun"
    assert sorted(repository(r) for r in whole) == ["base", "base", "collection", "task0", "task1"]
    begun, resumed = (r for r in whole if repository(r) == "base")
    start = int((resumed.range or "").strip("bytes=-"))
    assert (begun.range, begun.sent) == (None, 150_000)
    assert 0 < start <= 150_000
    (files,) = online.hub.repositories["org/base"].commits.values()
    assert resumed.sent == files["model.safetensors"].size - start


def test_only_files_that_a_merge_needs_are_downloaded(online: Online) -> None:
    names = {r.path.rpartition("/")[2] for r in online.log if r.method == "GET" and not r.path.startswith("/api/")}
    assert {"config.json", "tokenizer_config.json", "model.safetensors"} <= names
    assert names.isdisjoint({"README.md", "training_args.bin", "trainer_state.json"})
    assert not any("/resolve/main/" in r.path for r in online.log), "a file was asked for by branch, not by commit"


def test_offline_works_after_a_first_run(online: Online, local: dict[str, bytes]) -> None:
    seen = len(online.hub.log)
    again, layouts, recipe, unknown = run_cli(
        [
            merge_command(online.folder / "again", *ONLINE),
            merge_command(online.folder / "layouts again", *LAYOUTS),
            ["merge", str(online.folder / "merged" / "cart_hf.yaml"), str(online.folder / "pinned"), "--device", "cpu"],
            merge_command(online.folder / "unknown", "a=org/task0", "b=org/wide"),
        ],
        online.hub.url,
        online.home,
        HF_HUB_OFFLINE="1",
    )
    assert [again.code, layouts.code, recipe.code] == [0, 0, 0], again.err + layouts.err + recipe.err
    for name in ("again", "layouts again", "pinned"):
        assert weights(online.folder / name) == local
    assert_refused(unknown, online.folder / "unknown", "b: org/wide", "not in the local cache", "HF_HUB_OFFLINE")
    assert len(online.hub.log) == seen


def test_a_hub_that_is_down_is_not_needed_for_cached_models(online: Online, local: dict[str, bytes]) -> None:
    for case in ("merged, hub down", "layouts, hub down"):
        assert online.outcomes[case].code == 0, online.outcomes[case].err
        assert weights(online.folder / case) == local
    case = "uncached, hub down"
    phrases = ("b: org/wide", "not in the local cache", f"{online.hub.url} cannot be reached", "check the connection")
    assert_refused(online.outcomes[case], online.folder / case, *phrases)


REFUSED = {
    "unknown repository": ("org/nowhere", "no such repository", "check the spelling"),
    "unknown name without organisation": ("nowhere", "no such repository", "check the spelling"),
    "unknown revision": ("org/task0@v9", "no such branch, tag or commit"),
    "unknown commit": ("org/task0@" + "0" * 40, "no such branch, tag or commit"),
    "unknown subfolder": ("org/collection/sub/fodler", "no folder 'sub/fodler'", "did you mean 'sub/folder'?"),
    "gated": ("org/gated", "gated: accept its terms at {url}/org/gated", "hf auth login"),
    "private": ("org/private", "for a private repository log in (hf auth login)"),
    "dropped while resolving": ("org/dropped", "{url} cannot be reached", "check the connection and try again"),
    "dropped while reading a header": ("org/torn", "the connection to the Hub failed", "try again"),
    "forbidden": ("org/forbidden", "the Hub could not be read", "403 Forbidden"),
    "not a hub's answer": ("org/page", "{url} does not answer like a Hub", "HF_ENDPOINT", "proxy"),
    "out of order": ("org/broken", "the Hub is out of order (503", "try again later"),
    "not an id": ("org/two--dashes", "not a valid Hub id"),
    "no model": ("org/empty", "has no config.json"),
    "no weights": ("org/weightless", "holds no weights"),
    "damaged weights": ("org/damaged", "damaged weight file", "'model.safetensors'"),
}


@dataclass
class Refused:
    url: str
    folder: Path
    outcomes: dict[str, Answer]
    log: list[Request]


@pytest.fixture(scope="module")
def refused(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Refused]:
    """A dry run and every refusal, in one process that has no need of weights."""
    folder = tmp_path_factory.mktemp("refused")
    with serving() as hub:
        publish(hub, models)
        hub.fail(lambda r: "/org/forbidden/tree" in r.path, status=403)
        hub.fail(lambda r: "/org/page" in r.path, status=200)
        hub.fail(lambda r: is_weight(r) and "/org/broken/" in r.path, status=503)
        hub.drop(lambda r: "/org/dropped" in r.path)
        hub.drop(lambda r: is_weight(r) and "/org/torn/" in r.path)
        commands = {"dry run": [*merge_command(folder / "dry run", *ONLINE), "--dry-run", "--format", "json"]}
        commands["pickle"] = merge_command(folder / "pickle", "a=org/pickle", "b=org/nowhere", "c=org/sharded_pickle")
        commands["mismatch"] = merge_command(folder / "mismatch", "a=org/task0", "b=org/wide")
        for case, (reference, *_) in REFUSED.items():
            commands[case] = merge_command(folder / case, "a=org/task0", f"b={reference}")
        outcomes = run_cli(list(commands.values()), hub.url, folder / "home")
        yield Refused(hub.url, folder, dict(zip(commands, outcomes, strict=True)), list(hub.log))


def test_dry_run_and_refusals_download_no_weight_file(refused: Refused) -> None:
    seen = [r for r in refused.log if is_weight(r)]
    assert {"base", "task0", "task1", "collection", "wide"} <= {repository(r) for r in seen}
    assert not [r.path for r in seen if is_whole_weight(r)]
    assert not list((refused.folder / "home").rglob("*.safetensors"))


def test_dry_run_prints_the_plan_and_writes_nothing(refused: Refused) -> None:
    outcome = refused.outcomes["dry run"]
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    assert plan["models"] == ["org/task0", "org/task1@v1", "org/collection/sub/folder"]
    assert not (refused.folder / "dry run").exists()


def test_a_shape_mismatch_is_refused_from_the_headers(refused: Refused) -> None:
    outcome = refused.outcomes["mismatch"]
    assert outcome.code == 2
    weight = "encoder.layer.0.intermediate.dense.weight"
    assert any(f"tensor '{weight}' has shape [24, 16] in base and [32, 16] in b" in e for e in outcome.errors)
    assert "Traceback" not in outcome.err
    assert_absent(refused.folder / "mismatch")


def test_a_pickle_is_not_downloaded_beside_a_model_that_is_refused(refused: Refused) -> None:
    assert_refused(refused.outcomes["pickle"], refused.folder / "pickle", "b: org/nowhere", "no such repository")
    assert not [r for r in refused.log if "pickle" in r.path and r.path.endswith(".bin")]


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(refused: Refused, case: str) -> None:
    reference, *phrases = REFUSED[case]
    phrases = [phrase.format(url=refused.url) for phrase in phrases]
    model = reference.partition("@")[0].rpartition("/")[2]
    assert_refused(refused.outcomes[case], refused.folder / case, "b: ", model, *phrases)


@dataclass
class Closed:
    """Command lines run with tokens, and with downloads that never come to an end."""

    folder: Path
    outcomes: dict[str, Answer]
    log: list[Request]


@pytest.fixture(scope="module")
def closed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Closed:
    folder = tmp_path_factory.mktemp("closed")
    with serving(tokens=(READER, OTHER)) as hub:
        publish(hub, models)
        hub.drop(lambda r: is_whole_weight(r) and "/org/torn/" in r.path, after=50_000)
        commands = {
            # first, with nothing in the cache: what a reader downloaded, everyone with this cache can read
            "gated": merge_command(folder / "gated", "a=org/task0", "b=org/gated"),
            "reader": merge_command(folder / "reader", "a=org/task0", "b=org/gated", "c=org/private"),
            "private": merge_command(folder / "private", "a=org/task0", "b=org/private"),
            "wrong": merge_command(folder / "wrong", "a=org/task0", f"b={models / 'task1'}", base=str(models / "base")),
            "torn": merge_command(folder / "torn", "a=org/task0", "b=org/torn"),
        }
        tokens = {"gated": OTHER, "reader": READER, "private": OTHER, "wrong": WRONG, "torn": READER}
        lines = [[f"HF_TOKEN={tokens[case]}", *words] for case, words in commands.items()]
        outcomes = run_cli(lines, hub.url, folder / "home")
        return Closed(folder, dict(zip(commands, outcomes, strict=True)), list(hub.log))


def test_a_token_opens_gated_and_private_repositories(closed: Closed, local: dict[str, bytes]) -> None:
    assert closed.outcomes["reader"].code == 0, closed.outcomes["reader"].err
    assert weights(closed.folder / "reader") == local
    assert READER in {r.token for r in closed.log if r.path.startswith("/org/private/")}
    assert {r.token for r in closed.log if r.path.startswith("/cdn/")} == {None}


@pytest.mark.parametrize(
    ("case", "phrases"),
    [
        ("gated", ("b: org/gated is gated", "accept its terms")),
        ("private", ("b: org/private", "no such repository")),
        ("wrong", ("a: org/task0", "does not know the access token", "hf auth login", "HF_TOKEN")),
        ("torn", ("b: org/torn", "connection to the Hub failed", "try again")),
    ],
)
def test_what_a_token_does_not_open_is_refused(closed: Closed, case: str, phrases: tuple[str, ...]) -> None:
    assert_refused(closed.outcomes[case], closed.folder / case, *phrases)


def test_a_token_is_written_nowhere(closed: Closed) -> None:
    files = [path for path in closed.folder.rglob("*") if path.is_file()]
    assert {"merge.json", "cart_hf.yaml", "README.md", "config.json"} <= {path.name for path in files}
    assert not [path for path in files if b"SECRET" in path.read_bytes()]
    assert not [case for case, outcome in closed.outcomes.items() if "SECRET" in outcome.out + outcome.err]
