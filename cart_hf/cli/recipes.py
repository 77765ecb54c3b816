"""`cart-hf recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cart_hf.errors import UserError


def recipes(
    action: Literal["list", "show", "copy"] = "list", name: str | None = None, target: Path | None = None, /
) -> None:
    """List the bundled recipes, show one, or copy one to edit it.

    **Examples**

    ```text
    cart-hf recipes
    cart-hf recipes show clip-vit-b32-8
    cart-hf recipes copy clip-vit-b32-8 my-merge.yaml
    ```

    Parameters
    ----------
    action:
        list, show or copy.
    name:
        The recipe's name.
    target:
        copy: the file to write; default: NAME.yaml here.
    """
    from cart_hf.cli.console import out
    from cart_hf.recipe.bundled import bundled_recipe, bundled_recipes, title_of

    if action == "list":
        for known, path in bundled_recipes().items():
            out.print(f"{known:24} {title_of(path)}")
        return
    if name is None:
        raise UserError(f"cart-hf recipes {action}: name a recipe (cart-hf recipes lists them)")
    text = bundled_recipe(name).read_text(encoding="utf-8")
    if action == "show":
        print(text, end="")  # noqa: T201
        return
    target = target or Path(f"{name.removesuffix('.yaml')}.yaml")
    if target.exists():
        raise UserError(f"{target} exists; name another file")
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as failure:
        raise UserError(f"cannot write {target}: {failure.strerror}") from failure
    out.print(f"copied to {target}; edit it, then: cart-hf merge {target} OUTPUT")
