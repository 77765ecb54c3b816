"""Reading YAML files that people write: a recipe, a tasks file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cart_hf.errors import UserError

# libyaml's is ten times as fast, where PyYAML was built with it
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_yaml(text: str) -> Any:
    """Return what a YAML document holds.

    :raises yaml.YAMLError: when it is not one.
    """
    try:
        return yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError:
        return yaml.safe_load(text)  # says more clearly what is wrong


def read_mapping(path: str | Path, what: str, expected: str) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    :param what: what the file is, for messages, such as ``recipe``.
    :param expected: what such a file looks like, for a file that holds something else.
    :raises UserError: when it cannot be read, or is not a mapping.
    """
    try:
        data = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as failure:
        raise UserError(f"cannot read the {what} {path}: {failure.strerror}") from failure
    except (yaml.YAMLError, UnicodeDecodeError) as failure:
        raise UserError(f"{path} is not valid YAML: {_one_line(failure)}") from failure
    if not isinstance(data, dict):
        raise UserError(f"{path}: {expected}")
    return data


def _one_line(failure: Exception) -> str:
    """Return YAML's complaint with its place."""
    mark = getattr(failure, "problem_mark", None)
    problem = getattr(failure, "problem", None) or " ".join(str(failure).split())
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(problem)
