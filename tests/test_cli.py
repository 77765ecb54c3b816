"""The command line: help, the roads that give the same bytes, what goes to stdout, exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import transformers
import yaml
from checkpoints import make_clip, make_family
from commands import assert_absent, call, refuse, succeed

import cart_hf
from cart_hf.cli import app, console, main
from cart_hf.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked")

VERBS = sorted(name for name in app if not name.startswith("-"))
WEIGHTS = "model.safetensors"


class Family(NamedTuple):
    """A base and three fine-tuned models."""

    base: str
    models: list[str]

    def arguments(self, *extra: object) -> list[object]:
        return ["merge", "--base", self.base, "--models", *self.models, *extra]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return Family(*make_family(tmp_path_factory.mktemp("family"), "roberta"))


@pytest.fixture(scope="module")
def done(family, tmp_path_factory):
    """A merge by flags: the answer and the folder."""
    output = tmp_path_factory.mktemp("done") / "out"
    return succeed(*family.arguments("--output", output)), output


def contents(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return every file below ``folder`` by its path there."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if name not in but}


# ---------------------------------------------------------------------------------------------------------------------
# Help
# ---------------------------------------------------------------------------------------------------------------------

LIGHT = """
import json, sys
from cart_hf.cli import app, console, main
verbs = [name for name in app if not name.startswith("-")]
commands = [["--help"], [], ["--version"], ["recipes"], *([verb, "--help"] for verb in verbs)]
answers = {}
for command in commands:
    sys.argv = ["cart-hf", *command]
    try:
        main()
    except SystemExit as exit_:
        print(json.dumps({"command": command, "code": exit_.code, "heavy": sorted(
            {"torch", "transformers", "numpy", "scipy", "datasets", "accelerate"} & set(sys.modules))}), flush=True)
"""


def test_help_is_light():
    """Help, the version and the list of recipes come without importing torch, and say what there is."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "120"}
    )
    assert done.stderr == ""
    text, reports = "", []
    for line in done.stdout.splitlines():
        if line.startswith('{"command"'):
            report = json.loads(line)
            reports.append(report | {"text": text})
            text = ""
        else:
            text += f"{line}\n"
    assert [report for report in reports if report["code"] or report["heavy"]] == []
    by_command = {" ".join(report["command"]): report["text"] for report in reports}
    for command in ("--help", ""):
        assert "cart-hf VERB --help" in by_command[command]
        assert all(re.search(rf"│ {verb}\s+\w", by_command[command]) for verb in VERBS), by_command[command]
    assert by_command["--version"].strip() == cart_hf.__version__
    for verb in VERBS:
        answer = by_command[f"{verb} --help"]
        assert f"Usage: cart-hf {verb}" in answer
        assert "Examples" in answer
        assert f"cart-hf {verb}" in answer.split("Examples")[1]


def examples() -> list[str]:
    """Return the commands of every verb's help, on one line each."""
    found = []
    for verb in VERBS:
        (block,) = re.findall(r"```text\n(.*?)```", app[verb].help, flags=re.DOTALL)
        text = block.replace("\\\n", " ")
        found += [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return found


@pytest.mark.parametrize("line", examples())
def test_examples_are_commands(line):
    """The examples of the help use verbs and flags that exist."""
    program, verb, *words = shlex.split(line)
    assert (program, verb in VERBS) == ("cart-hf", True)
    app.parse_args([verb, *words], exit_on_error=False, print_error=False)


def test_every_flag_is_explained():
    """No flag stands in the help without a word about it."""
    for verb in VERBS:
        for argument in app[verb].assemble_argument_collection(parse_docstring=True):
            assert argument.parameter.help, f"{verb} {argument.names}"


def test_entry_points():
    """``cart-hf`` and ``python -m cart_hf`` are the same program."""
    (script,) = entry_points(group="console_scripts", name="cart-hf")
    assert script.load() is main
    done = subprocess.run([sys.executable, "-m", "cart_hf", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == cart_hf.__version__


# ---------------------------------------------------------------------------------------------------------------------
# The same merge by other roads
# ---------------------------------------------------------------------------------------------------------------------

SETTINGS = [
    (),
    ("--rank", 3, "--scale", 2),
    ("--energy", 0.8, "--fuse-qkv"),
    ("--rank-ratio", 0.25, "--weights", 1, 2, 3, "--exclude", "key", "re:value", "--dtype", "float64"),
    ("--include", "word_embeddings", "--out-dtype", "bfloat16", "--max-shard-size", "9kB"),
    ("--method", "average", "--weights", 0.5, 0.25, 0.25),
    ("--method", "task_arithmetic", "--set", "lambda=[0.1, 0.5]"),
    ("--method", "ties", "--density", 0.5, "--set", "per_tensor=true", "normalize=false"),
    ("--method", "consensus"),
    ("--method", "dare", "--seed", 7, "--density", 0.3, "--tokenizer-source", "task1"),
]


@pytest.mark.parametrize("flags", SETTINGS, ids=lambda flags: " ".join(map(str, flags)) or "defaults")
def test_roads(family, tmp_path, monkeypatch, flags):
    """By flags, by the printed recipe from elsewhere, and by the output's own recipe: the same bytes."""
    by_flags = tmp_path / "by_flags"
    monkeypatch.chdir(Path(family.base).parent)
    arguments = ["merge", "--base", "base", "--models", "task0", "./task1", family.models[2]]
    succeed(*arguments, "--output", by_flags, *flags)
    printed = succeed(*arguments, "--print-recipe", *flags)
    assert printed.err == ""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "printed.yaml"
    recipe.write_text(printed.out, encoding="utf-8")
    assert Recipe.load(recipe) == Recipe.load(by_flags / "cart_hf.yaml")
    succeed("merge", recipe, "by_recipe")
    succeed("merge", by_flags / "cart_hf.yaml", "again", "--workers", 3)
    differing = ("merge.json", "README.md")  # times, and the folder's name
    expected = contents(by_flags, but=differing)
    assert any(name.endswith(".safetensors") for name in expected)
    assert contents(tmp_path / "by_recipe", but=differing) == expected
    assert contents(tmp_path / "again", but=differing) == expected


def test_python_api(family, done, tmp_path):
    """``cart_hf.merge`` is the same merge."""
    result = cart_hf.merge(base=family.base, models=family.models, output=tmp_path / "out")
    assert result.output == tmp_path / "out"
    assert contents(result.output, but=("merge.json", "README.md")) == contents(
        done[1], but=("merge.json", "README.md")
    )


def test_two_ways_to_list_models(family):
    """``--models a b c`` is ``--models a --models b --models c``; so it is for every flag that takes several words."""
    lists = {"--models": family.models, "--weights": [1, 2, 3], "--include": ["word"], "--exclude": ["key", "value"]}
    lists |= {"--set": ["rank=3", "scale=2"]}
    together = [word for flag, words in lists.items() for word in (flag, *words)]
    apart = [word for flag, words in lists.items() for item in words for word in (flag, item)]
    equals = [f"{flag}={item}" for flag, words in lists.items() for item in words]
    answers = [succeed("merge", "--print-recipe", *words).out for words in (together, apart, equals)]
    assert answers[0] == answers[1] == answers[2]
    recipe = yaml.safe_load(answers[0])
    assert [entry["parameters"]["weight"] for entry in recipe["models"]] == [1, 2, 3]
    assert recipe["exclude"] == ["key", "value"]


def test_underscores_and_positions(family, tmp_path):
    """The output may stand first or last, and flags may be written with underscores."""
    printed = succeed(*family.arguments("--print-recipe", "--rank-ratio", 0.5)).out
    assert succeed(*family.arguments("--print-recipe", "--rank_ratio", 0.5)).out == printed
    succeed("merge", tmp_path / "out", *family.arguments()[1:])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(printed, encoding="utf-8")
    succeed("merge", recipe, "--output", tmp_path / "by_flag")
    succeed("merge", "--dry-run", recipe)
    assert (tmp_path / "out" / WEIGHTS).is_file()
    assert (tmp_path / "by_flag" / WEIGHTS).is_file()


def test_named_models(family, tmp_path):
    """``NAME=REF`` names the task's folder."""
    models = [f"{name}={folder}" for name, folder in zip(("sst2", "cola", "x.y-z_1"), family.models, strict=True)]
    succeed("merge", "--models", *models, "--output", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "tasks").iterdir()) == ["cola", "sst2", "x.y-z_1"]


# ---------------------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------------------


def test_summary(family, done):
    """The summary counts what happened, and its lines of Python run."""
    answer, output = done
    assert answer.err == ""
    headline, wrote, *loading = answer.out.splitlines()
    assert headline.startswith("cart, 3 models into one RobertaModel")
    assert "low-rank: 12 of 37 tensors" in headline
    assert "heads kept: 3" in headline
    assert str(output) in wrote
    expressions = [line.partition(":")[2].strip() for line in loading]
    names = {"transformers": transformers, "cart_hf": cart_hf}
    loaded = [type(eval(expression, names)).__name__ for expression in expressions]
    assert loaded == ["RobertaModel", "RobertaForSequenceClassification", "MultiTaskModel"]


def test_summary_of_clip(tmp_path):
    """Towers without heads are merged into a whole CLIP."""
    base, models = make_clip(tmp_path / "family")
    answer = succeed("merge", "--base", base, "--models", *models, "--output", tmp_path / "out")
    assert "from the base" in answer.out
    (line,) = [line for line in answer.out.splitlines() if line.startswith("load it: ")]
    model = eval(line.removeprefix("load it: "), {"transformers": transformers})
    assert type(model).__name__ == "CLIPModel"


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.mark.parametrize("flags", [(), ("--format", "json")])
@pytest.mark.parametrize("target", [(), ("out",)])
def test_dry_run(family, tmp_path, monkeypatch, flags, target):
    """A dry run reads headers, prints roles and ranks, and writes nothing at all."""
    monkeypatch.chdir(tmp_path)
    models = Path(family.base).parent
    before = everything(models)
    answer = succeed(*family.arguments("--dry-run", "--rank", 5, *(("--output", *target) if target else ()), *flags))
    assert everything(models) == before
    assert list(tmp_path.iterdir()) == []
    assert answer.err == ""
    if flags:
        plan = json.loads(answer.out)
        ranks = {group["rank"] for group in plan["groups"] if group["role"] == "low_rank"}
        assert ranks == {"5"}
        assert sum(group["count"] for group in plan["groups"]) == 37
        assert plan["output_bytes"] == sum(group["bytes"] for group in plan["groups"])
        assert sorted(plan["heads"]) == ["task0", "task1", "task2"]
        assert plan["memory_bytes"] > 0
    else:
        rows = [line.split() for line in answer.out.splitlines() if line.startswith("low_rank")]
        assert len(rows) == 6
        assert all(row[-4] == "5" for row in rows), rows  # rank, count, bytes, unit
        assert "low-rank: 12 of 37 tensors" in answer.out
        assert "heads kept: 3" in answer.out
        assert "nothing was written" in answer.out


def test_dry_run_names_tensors_whole(family):
    """A name printed by a dry run can be found and copied."""
    assert "encoder.layer.*.attention.output.dense.weight" in succeed(*family.arguments("--dry-run")).out


def test_dry_run_reads_no_weights(family, tmp_path):
    """Headers are enough: the same files with every number a NaN give the same plan."""
    copies = []
    for folder in family.models:
        copy = tmp_path / Path(folder).name
        copy.mkdir()
        (copy / "config.json").write_bytes((Path(folder) / "config.json").read_bytes())
        data = (Path(folder) / WEIGHTS).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        (copy / WEIGHTS).write_bytes(data[:start] + b"\xff" * (len(data) - start))
        copies.append(copy)
    expected = json.loads(succeed(*family.arguments("--dry-run", "--format", "json")).out)
    plan = json.loads(succeed("merge", "--base", family.base, "--models", *copies, "--dry-run", "--format", "json").out)
    assert {**plan, "models": None} == {**expected, "models": None}


def test_json(family, tmp_path):
    """``--format json`` puts one JSON document on stdout, and warnings elsewhere."""
    output = tmp_path / "out"
    arguments = ["merge", "--models", *family.models[:2], "--output", output, "--format", "json"]
    answer = succeed(*arguments)
    data = json.loads(answer.out)
    assert data == json.loads((output / "merge.json").read_text(encoding="utf-8"))
    assert data["method"] == "cart"
    assert len(data["warnings"]) == 1
    assert answer.err.startswith("warning: two models")
    plan = succeed(*arguments[:-3], tmp_path / "no", "--dry-run", "--format", "json")
    assert json.loads(plan.out)["warnings"] == data["warnings"]


def test_json_and_errors(family, tmp_path):
    """An error leaves stdout empty whatever the format."""
    refuse(tmp_path / "out", *family.arguments("--output", tmp_path / "out", "--rank", 0, "--format", "json"))


@pytest.mark.parametrize("name", ["plain", "two words", "é", "m[v1]", "m[bold]", "m[/x]"])
def test_output_name(family, tmp_path, name):
    """A folder's name is printed as it is."""
    output = tmp_path / name
    answer = succeed(*family.arguments("--output", output))
    assert answer.out.count(str(output)) == 4


def test_terminal(family, tmp_path, monkeypatch):
    """Progress bars are for terminals, on stderr only, and HF_HUB_DISABLE_PROGRESS_BARS turns them off."""
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console.err, "is_interactive", True)  # rich decides it when the module is imported
    arguments = family.arguments("--method", "ties", "--format", "json", "--output")
    answer = call(*arguments, tmp_path / "one", terminal=True)
    assert answer.code == 0
    assert "merging" in answer.err
    assert "finding thresholds" in answer.err
    json.loads(answer.out)
    assert call(*arguments, tmp_path / "two").err == ""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    answer = call(*arguments, tmp_path / "three", terminal=True)
    assert answer.code == 0
    assert "merging" not in answer.err


def test_pipe(family, tmp_path):
    """The whole program in a pipe: one JSON document on stdout, nothing on stderr - no library's chatter either."""
    command = [sys.executable, "-m", "cart_hf", *map(str, family.arguments("--output", tmp_path / "out"))]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["method"] == "cart"
    assert done.stderr == ""


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes
# ---------------------------------------------------------------------------------------------------------------------


def test_interrupted(family, tmp_path, monkeypatch):
    """Ctrl-C leaves nothing and exits with 130."""
    monkeypatch.setattr("cart_hf.api.run", mock.Mock(side_effect=KeyboardInterrupt))
    answer = call(*family.arguments("--output", tmp_path / "out"))
    assert (answer.code, answer.out) == (130, "")
    assert_absent(tmp_path / "out")


def test_interrupted_says_so(family, tmp_path, monkeypatch):
    """Ctrl-C says what is left."""
    monkeypatch.setattr("cart_hf.api.run", mock.Mock(side_effect=KeyboardInterrupt))
    assert "interrupted" in call(*family.arguments("--output", tmp_path / "out")).err


def test_our_own_mistake(family, tmp_path, monkeypatch):
    """A bug of cart-hf is a traceback, not the user's error; the work folder is removed all the same."""
    monkeypatch.setattr("cart_hf.api.run", mock.Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        call(*family.arguments("--output", tmp_path / "out"))
    assert_absent(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# The other verbs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """Two recipes in the place of the bundled ones."""
    folder = tmp_path / "bundled"
    folder.mkdir()
    text = "merge_method: cart\nmodels: [o/a, o/b]\n"
    (folder / "first.yaml").write_text(f"# The first recipe\n#\n#   more\n{text}", encoding="utf-8")
    (folder / "second-2.yaml").write_text(f"# Zweites Rezept: λ\n{text}", encoding="utf-8")
    monkeypatch.setattr("cart_hf.recipe.bundled.bundled_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_recipes_list(bundled):
    answer = succeed("recipes")
    assert [line.split(maxsplit=1) for line in answer.out.splitlines()] == [
        ["first", "The first recipe"],
        ["second-2", "Zweites Rezept: λ"],
    ]
    assert succeed("recipes", "list").out == answer.out


@pytest.mark.parametrize("name", ["first", "second-2", "second-2.yaml"])
def test_recipes_show_and_copy(bundled, tmp_path, name):
    """``show`` prints the file as it is, ``copy`` writes it, and never over another."""
    stem = name.removesuffix(".yaml")
    text = (bundled / f"{stem}.yaml").read_text(encoding="utf-8")
    assert succeed("recipes", "show", name).out == text
    answer = succeed("recipes", "copy", name)
    assert f"cart-hf merge {stem}.yaml" in answer.out
    assert (tmp_path / f"{stem}.yaml").read_text(encoding="utf-8") == text
    succeed("recipes", "copy", name, tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("edited", encoding="utf-8")
    refuse(tmp_path / "out", "recipes", "copy", name, tmp_path / "mine.yaml", naming=("mine.yaml exists",))
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == "edited"
    assert isinstance(Recipe.load(tmp_path / f"{stem}.yaml"), Recipe)


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        (("show",), ("show", "name a recipe", "cart-hf recipes")),
        (("copy",), ("copy", "name a recipe")),
        (("show", "frist"), ("'frist'", "did you mean 'first'?")),
        (("copy", "frist"), ("did you mean 'first'?",)),
        (("shwo", "first"), ("shwo", "show")),
    ],
)
def test_recipes_refused(bundled, tmp_path, words, naming):
    refuse(tmp_path / "out", "recipes", *words, naming=naming)


def test_recipes_copy_nowhere(bundled, tmp_path):
    refuse(tmp_path / "out", "recipes", "copy", "first", tmp_path / "no" / "x.yaml", naming=("x.yaml",))


def test_env():
    """What an issue needs: versions, platform and devices, one item on a line."""
    answer = succeed("env")
    items = dict(line.removeprefix("- ").split(": ", 1) for line in answer.out.splitlines())
    assert items["cart-hf"] == cart_hf.__version__
    assert items["torch"] == torch.__version__
    assert items["transformers"] == transformers.__version__
    assert {"platform", "python", "safetensors", "huggingface_hub", "numpy", "scipy", "cores", "gpu"} <= set(items)
    assert int(items["cores"]) >= 1
    assert answer.err == ""


def test_env_keeps_secrets(monkeypatch):
    """A token in the environment is not printed."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in succeed("env").out
