"""`cart-hf tune`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from cart_hf.cli.options import EXECUTION, Words
from cart_hf.errors import UserError

if TYPE_CHECKING:
    from cart_hf.tuning import Tuned

SEARCH = Group("Search")
EXAMPLES = Group("Examples")


def tune(
    recipe: Path,
    output: Path | None = None,
    /,
    *,
    grid: Annotated[Words, Parameter(group=SEARCH)] = None,
    search: Annotated[Literal["grid", "coordinate"] | None, Parameter(group=SEARCH)] = None,
    data_free: Annotated[bool | None, Parameter(group=SEARCH, negative=())] = None,
    tasks: Annotated[Words, Parameter(group=EXAMPLES)] = None,
    tasks_file: Annotated[str | None, Parameter(group=EXAMPLES)] = None,
    data: Annotated[str | None, Parameter(group=EXAMPLES)] = None,
    split: Annotated[str | None, Parameter(group=EXAMPLES)] = None,
    limit: Annotated[int | None, Parameter(group=EXAMPLES, validator=Number(gte=1))] = None,
    batch_size: Annotated[int | None, Parameter(group=EXAMPLES, validator=Number(gte=1))] = None,
    device: Annotated[str, Parameter(group=EXECUTION)] = "auto",
    workers: Annotated[int | None, Parameter(group=EXECUTION, validator=Number(gte=1))] = None,
    factors: Annotated[Path | None, Parameter(group=EXECUTION)] = None,
    resume: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    overwrite: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    format: Annotated[Literal["human", "json"], Parameter(group=EXECUTION)] = "human",
) -> None:
    """Search the rank and the scale (or any other parameters) that score best on a validation split.

    The models are decomposed once for all points. Writes the best recipe, every point (JSON, CSV) and a heat map. The
    recipe's `tune:` key says what to try; without it, what the method suggests:

    ```yaml
    tune:
      grid: {rank_ratio: [0.04, 0.08, 0.16], scale: [1.0, 1.5, 2.0]}
      search: grid            # or coordinate
      selection: {split: validation, limit: 250}
    ```

    Without any data (--data-free), CART's rank and scale are chosen by a rule.

    **Examples**

    ```text
    cart-hf tune recipe.yaml
    cart-hf tune recipe.yaml tuned --grid rank_ratio=0.04,0.08,0.16 scale=1,1.5,2,2.5,3 --limit 250
    cart-hf tune recipe.yaml tuned --grid scale=3,4,5 --resume
    cart-hf tune recipe.yaml tuned --data-free
    cart-hf merge tuned/recipe.yaml merged
    ```

    Parameters
    ----------
    recipe:
        A recipe; its `evaluation:` names the tasks and their data.
    output:
        The folder to write; default: the recipe's name with `-tuned`, here.
    grid:
        What to try, as PARAMETER=VALUE,VALUE ...
    search:
        `grid` tries every combination, `coordinate` one parameter at a time from the best point so far.
    data_free:
        Choose CART's rank and scale by a rule and measure nothing; the default where no tasks are named.
    tasks:
        Tasks to measure; default: the recipe's.
    tasks_file:
        YAML file that declares further tasks.
    data:
        Folder that holds TASK/SPLIT.parquet.
    split:
        The split that points are compared on.
    limit:
        At most so many examples of each task.
    batch_size:
        Examples at a time.
    device:
        auto, cpu, cuda ...
    workers:
        Worker threads; default: one per core.
    factors:
        Folder where singular factors are found, and stay; default: they go when the search ends.
    resume:
        Go on with an earlier search, with the same grid or another: what was measured is not measured again.
    overwrite:
        Replace an earlier search.
    format:
        What stdout gets.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import cart_hf
    from cart_hf.cli.console import progress_bars, quiet_libraries, warn
    from cart_hf.tuning import record

    what = cart_hf.Recipe.load(recipe)
    selection = {name: value for name, value in (("split", split), ("limit", limit)) if value is not None}
    own = what.tune.selection.model_dump(exclude_unset=True) if what.tune is not None and selection else {}
    asked: dict[str, Any] = {"grid": _values(grid), "search": search, "selection": {**own, **selection} or None}
    examples = {"tasks": tasks, "tasks_file": tasks_file, "data": data, "batch_size": batch_size}
    quiet_libraries()
    with progress_bars() as bars:
        found = cart_hf.tune(
            what,
            output=output or Path(f"{recipe.stem}-tuned"),
            tuning={name: value for name, value in asked.items() if value is not None},
            examples={name: value for name, value in examples.items() if value is not None},
            data_free=data_free,
            device=device,
            workers=workers,
            factors=factors,
            resume=resume,
            overwrite=overwrite,
            progress=bars,
        )
    left_out = record.write_files(found)
    if format == "json":
        print(json.dumps(record.as_json(found), indent=2))  # noqa: T201
    else:
        _tell(found)
    for problem in left_out:
        warn(f"no plots: {problem}")


def _values(words: Sequence[str] | None) -> dict[str, list[Any]] | None:
    """Read ``--grid NAME=VALUE,VALUE``, values as YAML reads them.

    :raises UserError: for a word of another form, and a parameter that is given twice.
    """
    import yaml

    found: dict[str, list[Any]] = {}
    for word in words or ():
        name, equals, text = word.partition("=")
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError as failure:
            raise UserError(f"--grid {word}: the values are not valid YAML") from failure
        if not name or not equals or not values or None in values:
            raise UserError(f"--grid {word}: expected PARAMETER=VALUE,VALUE")
        if name in found:
            raise UserError(f"--grid {name}: given twice; keep one")
        found[name] = values
    return found or None


def _tell(found: Tuned) -> None:
    from cart_hf.cli.console import out, print_table, warn
    from cart_hf.evaluation.report import percent
    from cart_hf.tuning import record

    if found.points:
        print_table(record.as_table(found, tasks=False))
    best = ", ".join(f"{name} {found.best[name]}" for name in record.searched(found))
    score = max((point.results.average or 0.0 for point in found.points), default=None)
    out.print(f"best: {best}" + (f", average {percent(score)} of {len(found.points)} points" if found.points else ""))
    for note in record.notes(found):
        warn(note)
    times = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in found.seconds.items() if seconds)
    out.print(f"wrote {found.output} ({times})")
    out.print(f"merge it: cart-hf merge {found.output / record.RECIPE_FILE} OUTPUT")
