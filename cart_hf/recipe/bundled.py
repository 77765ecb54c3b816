"""The recipes that come with cart-hf: package data in a wheel, the folder `recipes/` in a checkout."""

from __future__ import annotations

from pathlib import Path

from cart_hf.errors import UserError, did_you_mean


def bundled_folder() -> Path:
    """Return the folder that holds the recipes."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent / "recipes"
    return (
        checkout if checkout.is_dir() and (package.parent / "pyproject.toml").is_file() else package / "bundled_recipes"
    )


def bundled_recipes() -> dict[str, Path]:
    """Return the recipes by name."""
    return {path.stem: path for path in sorted(bundled_folder().glob("*.yaml"))}


def bundled_recipe(name: str) -> Path:
    """Return the file of one recipe.

    :raises UserError: when there is none of that name.
    """
    known = bundled_recipes()
    if name.removesuffix(".yaml") not in known:
        raise UserError(f"no bundled recipe '{name}'{did_you_mean(name, known)}")
    return known[name.removesuffix(".yaml")]


def title_of(path: Path) -> str:
    """Return a recipe's first comment line: what it is."""
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
