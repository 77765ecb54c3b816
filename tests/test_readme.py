"""What the README shows works: its recipe, its commands, and the commands that continuous integration runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml
from commands import call, succeed

import cart_hf
from cart_hf.methods import all_methods

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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
        if words[1].endswith(".yaml"):  # the recipe above it, under the name the README gives it
            assert call(*words).errors == ["cannot read the recipe recipe.yaml: No such file or directory"]
        else:
            printed = succeed(*words, "--print-recipe").out
            assert len(yaml.safe_load(printed)["models"]) == 3


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
