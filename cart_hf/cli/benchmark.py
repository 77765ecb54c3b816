"""`cart-hf benchmark`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number


def benchmark(
    recipe: Path,
    output: Path,
    /,
    *,
    device: str = "auto",
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    keep_models: Annotated[bool, Parameter(negative=())] = False,
    resume: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    format: Literal["human", "json", "markdown", "latex", "csv"] = "human",
) -> None:
    """Fill the paper's table on your models: pretrained, individual, and every method on every task.

    The recipe's `evaluation:` says which tasks and examples, its `benchmark:` which methods. A method's `grid:` lists
    values to try: the best on the selection split is scored. Its `compress:` adds CART-Indexing, one centre with an
    adapter for each task, at several sizes, and the bytes of every row. Writes benchmark.json, .md, .csv and .tex, a
    radar plot of normalised scores, a bar chart, and a plot of score against size.

    ```yaml
    evaluation: {suite: glue, split: validation}
    benchmark:
      selection: {split: train, limit: 500}
      methods:
        - average
        - {method: task_arithmetic, grid: {scale: [0.2, 0.3, 0.4]}}
        - {method: cart, grid: {rank_ratio: [0.04, 0.08, 0.16], scale: [1.0, 1.5, 2.0]}}
      compress: {rank_ratio: [0.01, 0.04, 0.16, 0.64]}
    ```

    **Examples**

    ```text
    cart-hf benchmark recipe.yaml results
    cart-hf benchmark recipe.yaml results --resume
    ```

    Parameters
    ----------
    recipe:
        A recipe; without `benchmark:`, every method with its defaults, and the recipe's own.
    output:
        The folder to write.
    device:
        auto, cpu, cuda ...
    workers:
        Worker threads of the merges; default: one per core.
    keep_models:
        Keep each method's merged model in OUTPUT/models.
    resume:
        Go on with an earlier run: what was measured is not measured again.
    overwrite:
        Replace an earlier benchmark.
    format:
        What stdout gets.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import cart_hf
    from cart_hf import tables
    from cart_hf.benchmarking import report
    from cart_hf.cli.console import out, progress_bars, quiet_libraries, warn
    from cart_hf.cli.evaluate import tell_errors

    what = cart_hf.Recipe.load(recipe)
    quiet_libraries()
    with progress_bars() as bars:
        result = cart_hf.benchmark(
            what,
            output=output,
            device=device,
            workers=workers,
            keep_models=keep_models,
            resume=resume,
            overwrite=overwrite,
            progress=bars,
        )
    left_out = report.write_files(result)
    if format == "json":
        print(json.dumps(report.as_json(result), indent=2))  # noqa: T201
    elif format == "human":
        out.print(report.terminal_table(result.rows, out.width))
        for note in report.notes(result):
            out.print(note)
        out.print(f"every task's score, and the plots: {result.output / report.PAGE_FILE}")
    else:
        write = {"markdown": tables.markdown, "latex": tables.latex, "csv": tables.comma_separated}[format]
        print(write(report.as_table(result.rows)), end="")  # noqa: T201
    for problem in left_out:
        warn(f"no plots: {problem}")
    tell_errors({f"{row.name}, {task}": why for row in result.rows for task, why in row.results.errors.items()})
