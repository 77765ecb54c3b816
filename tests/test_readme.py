"""What the README shows works: its recipe, its commands, and the commands that continuous integration runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from commands import call, succeed

import cart_hf
from cart_hf.cli import app
from cart_hf.methods import all_methods
from cart_hf.tasks import find_tasks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_recipes_are_recipes():
    for block in blocks("yaml"):
        assert cart_hf.Recipe.from_mapping(yaml.safe_load(block)).models


def test_merge_commands_are_understood():
    commands = [
        c for block in blocks("bash") for c in block.replace("\\\n", " ").splitlines() if c.startswith("cart-hf merge")
    ]
    assert len(commands) >= 2
    for command in commands:
        words = shlex.split(command)[1:]
        if words[1].endswith(".yaml"):  # the recipe above it, under the name the README gives it, or the tuned one
            assert call(*words).errors == [f"cannot read the recipe {words[1]}: No such file or directory"]
            assert words[1] in ("recipe.yaml", "tuned/recipe.yaml")
        else:
            printed = succeed(*words, "--print-recipe").out
            assert len(yaml.safe_load(printed)["models"]) == 3


def test_evaluation_page(tmp_path):
    """Its tasks file and its recipe keys are read, its commands are understood, its results file is one."""
    own, of_a_recipe, sizes = (yaml.safe_load(block) for block in blocks("yaml", EVALUATION))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    assert [task.name for task in find_tasks(tasks_file=tmp_path / "mine.yaml")] == ["trec", "birds"]
    model = yaml.safe_load(blocks("yaml")[0])
    assert len(cart_hf.Recipe.from_mapping({**model, **of_a_recipe}).benchmark.methods) == 4
    assert len(cart_hf.Recipe.from_mapping({**model, **sizes}).benchmark.compress.rows) == 4
    found = cart_hf.Results.from_dict(json.loads(blocks("json", EVALUATION)[0]))
    assert found.average == 0.888
    commands = [line for block in blocks("bash", EVALUATION) + blocks("bash") for line in block.splitlines()]
    verbs = [shlex.split(line)[1:] for line in commands if line.startswith("cart-hf ") and "\\" not in line]
    verbs += [shlex.split(line.split("-m cart_hf ")[1]) for line in commands if "-m cart_hf " in line]
    assert len(verbs) >= 8
    for words in verbs:
        app.parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("name", ["adaptation", "adapters", "analysis", "benchmarks", "publishing", "tuning"])
def test_the_commands_of_a_page_are_understood(name):
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line.strip() for line in page.splitlines() if line.strip().startswith("cart-hf ")]
    assert commands
    for command in commands:
        words = shlex.split(command.removesuffix("..."), comments=True)
        app.parse_args(words[1:], exit_on_error=False, print_error=False)


def test_the_page_about_tuning_has_a_recipes_key(tmp_path):
    (block,) = blocks("yaml", (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8"))
    recipe = {"merge_method": "cart", "models": ["a", "b"], **yaml.safe_load(block)}
    assert len(cart_hf.Recipe.from_mapping(recipe).tuned().points) == 25


def test_every_method_and_parameter_is_listed():
    table = README.split("## Methods")[1].split("## Results")[0]
    for name, method in all_methods().items():
        row = next(line for line in table.splitlines() if line.startswith(f"| `{name}`"))
        for parameter in method.parameters:
            if parameter.name not in ("weight", "normalize"):
                assert f"`{parameter.name}`" in row, (name, parameter.name)


def test_continuous_integration_runs_the_readmes_test_command():
    command = next(block for block in blocks("bash") if "pytest" in block).strip().split(" && ", 2)[2]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("install -q", "install")
