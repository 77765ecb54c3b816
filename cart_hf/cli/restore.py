"""`cart-hf restore`."""

from __future__ import annotations

from pathlib import Path


def restore(folder: Path, task: str, output: Path, /, *, base: str | None = None) -> None:
    """Make one task's model, a plain transformers folder, of what `cart-hf compress --form emr` stored.

    **Examples**

    ```text
    cart-hf compress recipe.yaml masked --form emr
    cart-hf restore masked sst2 sst2-again
    cart-hf evaluate sst2-again --tasks sst2
    ```

    Parameters
    ----------
    folder:
        What `cart-hf compress --form emr` wrote.
    task:
        Whose model.
    output:
        The folder to write.
    base:
        Where the base is now, if not where it was.
    """
    import cart_hf
    from cart_hf.cli.console import out, quiet_libraries

    quiet_libraries()
    out.print(f"wrote {cart_hf.restore(folder, task, output, base=base)}")
