"""`cart-hf demo`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from cart_hf.benchmarking.rows import Row


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
        The folder to write: base/, models/NAME/, data/NAME/, merged/ and benchmark/.
    seed:
        Seed of pretraining and fine-tuning.
    overwrite:
        Replace an earlier demo.
    """
    # Waiting threads that spin make each other several times slower on a busy machine. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from cart_hf.benchmarking.report import notes, terminal_table
    from cart_hf.cli.console import err, out, progress_bars, quiet_libraries
    from cart_hf.demo.run import METHODS, run_demo

    err.print(
        "Pretraining a tiny RoBERTa on CLINC150's sentences, fine-tuning it for 8 domains, merging the 8 models with "
        f"{len(METHODS)} methods: two to three minutes on two cores."
    )
    quiet_libraries()
    with progress_bars() as bars:
        result = run_demo(output, seed=seed, overwrite=overwrite, progress=bars)
    rows = result.benchmark.rows
    out.print()
    out.print("Test accuracy in % of one model on 8 tasks (norm.: relative to each task's own model)")
    out.print()
    out.print(terminal_table(rows))
    out.print()
    for line in [*notes(result.benchmark), *reading(rows)]:
        out.print(line)
    out.print()
    took = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in result.seconds.items())
    out.print(f"{took}. Everything is in {output}/: base, models/NAME, data/NAME, merged, benchmark. To go on:")
    out.print(f"  cart-hf evaluate {output}/merged --normalize")
    out.print(f"  cart-hf merge --base {output}/base --models {output}/models/* --method ties --output {output}/ties")
    out.print(f"  cart-hf analyze {output}/merged/cart_hf.yaml {output}/analysis --results {output}/benchmark")
    out.print(f"  cart-hf tune {output}/recipe.yaml {output}/tuned --grid rank_ratio=0.16,0.32 scale=2,4")
    out.print(f"  cart-hf compress {output}/recipe.yaml {output}/small")
    out.print(f"  cart-hf benchmark {output}/recipe.yaml {output}/again")
    out.print(f"  python -c \"import cart_hf; print(cart_hf.MultiTaskModel.from_pretrained('{output}/merged').tasks)\"")


def reading(rows: list[Row]) -> list[str]:
    """Say in words what the table shows, whatever it shows."""
    average = {row.method or row.name: 100 * (row.results.average or 0.0) for row in rows}
    names = {row.method or row.name: row.name for row in rows}
    merges = {row.method: average[row.method] for row in rows if row.method is not None}
    best = max(merges, key=lambda method: merges[method])
    lost, won = average["individual"] - merges["average"], merges["cart"] - merges["average"]
    lines = [
        f"Eight separate models answer {average['individual']:.1f} % right; averaging their weights into one "
        f"loses {lost:.1f} points, and CART "
        + (f"wins {won:.1f} of them back." if won >= 0 else f"loses {-won:.1f} more."),
    ]
    if best == "cart":
        second = max((method for method in merges if method != "cart"), key=lambda method: merges[method])
        lines.append(
            f"CART is the best merge here, {merges['cart'] - merges[second]:.1f} points before {names[second]}."
        )
    else:
        lines.append(f"The best merge here is {names[best]}, {merges[best] - merges['cart']:.1f} points before CART.")
    lines.append("Differences under a point are noise at this size (3600 test sentences, one seed).")
    return lines
