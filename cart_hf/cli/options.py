"""What several verbs have in common: groups of options, their types, and what is done about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from cart_hf.errors import UserError

MODELS = Group("Models")
METHOD = Group("Method")
TENSORS = Group("Tensors")
EXECUTION = Group("Execution")
HUB = Group("Hub")

Words = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]
Numbers = Annotated[list[float] | None, Parameter(consume_multiple=True, negative=())]


def positionals(
    recipe: Path | None, output: Path | None, models: Sequence[str] | None
) -> tuple[Path | None, Path | None]:
    """Return the recipe and the output folder: a lone argument beside ``--models`` that is no file is the output."""
    if recipe is not None and output is None and models and not recipe.is_file():
        return None, recipe  # `cart-hf merge OUT --base B --models A1 A2`
    return recipe, output


def target_of(output: Path | None, argument: Path | None, repo: str | None) -> Path | None:
    """Return the folder to write, if one is named.

    :raises UserError: when there are two.
    """
    if output is not None and argument is not None:
        raise UserError(f"two outputs: {argument} and --output {output}; give one")
    return output or argument or (Path(repo.rpartition("/")[2]) if repo else None)


def checked_repository(repo: str | None, device: str, *, private: bool | None, tasks: Sequence[str] = ()) -> str | None:
    """Return the full name of the repository to push to, or None.

    :param tasks: those whose adapters will have repositories of their own.
    :raises UserError: when a push could not work.
    """
    if repo is None:
        if private is not None:
            raise UserError("--private and --public are about the repository: name it with --push-to-hub")
        return None
    from cart_hf.processes import join
    from cart_hf.publishing import check_push

    return join(device).by_main(lambda: check_push(repo, private=private, tasks=tasks))


def push_made(output: Path, repo: str | None, *, private: bool | None, format: str) -> None:
    """Push what was made just now, where a repository is named, and say what was sent."""
    if repo is not None:
        from cart_hf.cli.push import push_merged, show

        show(push_merged(output, repo, private=private), silent=format == "json")


def key_values(words: Sequence[str], parameters: Mapping[str, Any], flag: str = "--set ") -> dict[str, Any]:
    """Return a method's parameters with those of ``--set KEY=VALUE``, values as YAML reads them.

    :param parameters: those that have flags of their own; None where they are not given.
    :param flag: what stands before a word, for messages.
    :raises UserError: for a word without ``=``, and a parameter that is given twice.
    """
    import yaml

    given = dict(parameters)
    for word in words:
        key, equals, text = word.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as failure:
            raise UserError(f"{flag}{word}: the value is not valid YAML") from failure
        if not equals or not key or value is None:
            raise UserError(f"{flag}{word}: expected KEY=VALUE")
        if given.get(key) is not None:
            raise UserError(f"{flag}{key}: given twice; keep one")
        given[key] = value
    return given


def wrappers(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read ``--wrap NAME`` and ``--wrap NAME:KEY=VALUE,KEY=VALUE``.

    :raises UserError: for a key without a value, and one that is given twice.
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        name, _, told = word.partition(":")
        found[name] = key_values([part for part in told.split(",") if part], found.get(name, {}), f"--wrap {name}:")
    return found


def task_heads(words: Sequence[str]) -> dict[str, str]:
    """Read ``--heads TASK=HEAD``.

    :raises UserError: for a word without one of the two.
    """
    pairs = dict(word.partition("=")[::2] for word in words)
    wrong = [task for task, head in pairs.items() if not task or not head]
    if wrong:
        raise UserError(f"--heads {wrong[0]}: expected TASK=HEAD")
    return pairs
