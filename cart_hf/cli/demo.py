"""`cart-hf demo`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from cart_hf.demo.comparison import Row


def demo(
    output: Path = Path("cart-hf-demo"),
    /,
    *,
    seed: int = 0,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Run the whole road on small real data, offline, in two to three minutes.

    A tiny RoBERTa is pretrained on the sentences of CLINC150, fine-tuned for 8 of its domains, and the 8 models are
    merged into one by every method. Settings are chosen on the validation split and scored on the test split.

    **Examples**

    ```text
    cart-hf demo
    cart-hf demo my-demo --seed 1
    ```

    Parameters
    ----------
    output:
        The folder to write: base/, models/NAME/, merged/ and results.md.
    seed:
        Seed of pretraining and fine-tuning.
    overwrite:
        Replace an earlier demo.
    """
    # Waiting threads that spin make each other several times slower on a busy machine. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from cart_hf.cli.console import err, out, progress_bars, quiet_libraries
    from cart_hf.demo.comparison import edges, settings_text
    from cart_hf.demo.run import GRIDS, run_demo
    from cart_hf.demo.table import name_of, terminal

    err.print(
        "Pretraining a tiny RoBERTa on CLINC150's sentences, fine-tuning it for 8 domains, merging the 8 models with "
        f"{len(GRIDS)} methods: two to three minutes on two cores."
    )
    quiet_libraries()
    with progress_bars() as bars:
        result = run_demo(output, seed=seed, overwrite=overwrite, progress=bars)
    rows = {row.name: row for row in result.rows}
    out.print()
    out.print("Test accuracy in % of one model on 8 tasks (norm.: relative to each task's own model)")
    out.print()
    out.print(terminal(result.rows))
    out.print()
    out.print("Chosen on the validation split:")
    for name, row in rows.items():
        at_edge = " and ".join(edges(row, GRIDS.get(name, {})))
        note = f"  ({at_edge} at the edge of the values tried)" if at_edge else ""
        if row.settings:
            out.print(f"  {name_of(row):16} {settings_text(row.settings)}{note}")
    out.print()
    for line in reading(result.rows):
        out.print(line)
    out.print()
    took = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in result.seconds.items())
    out.print(f"{took}. Everything is in {output}/: base, models/NAME, merged, results.md. To go on:")
    out.print(f"  cart-hf merge {output}/merged/cart_hf.yaml {output}/again --dry-run")
    out.print(f"  cart-hf merge --base {output}/base --models {output}/models/* --method ties --output {output}/ties")
    out.print(f"  python -c \"import cart_hf; print(cart_hf.MultiTaskModel.from_pretrained('{output}/merged').tasks)\"")


def reading(rows: list[Row]) -> list[str]:
    """Say in words what the table shows, whatever it shows."""
    from cart_hf.demo.table import name_of

    by_name = {row.name: row for row in rows}
    merges = [row for row in rows if row.name not in ("pretrained", "individual")]
    best = max(merges, key=lambda row: row.average)
    cart, average = by_name["cart"], by_name["average"]
    lost, spread = by_name["individual"].average - average.average, cart.average - average.average
    lines = [
        f"Eight separate models answer {by_name['individual'].average:.1f} % right; averaging their weights into one "
        f"loses {lost:.1f} points, and CART "
        + (f"wins {spread:.1f} of them back." if spread >= 0 else f"loses {-spread:.1f} more."),
    ]
    if best.name == "cart":
        second = max((row for row in merges if row.name != "cart"), key=lambda row: row.average)
        lines.append(
            f"CART is the best merge here, {cart.average - second.average:.1f} points before {name_of(second)}."
        )
    else:
        lines.append(f"The best merge here is {name_of(best)}, {best.average - cart.average:.1f} points before CART.")
    lines.append("Differences under a point are noise at this size (3600 test sentences, one seed).")
    return lines
