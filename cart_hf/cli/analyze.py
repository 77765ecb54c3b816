"""`cart-hf analyze`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from cart_hf.cli.options import (
    EXECUTION,
    METHOD,
    MODELS,
    TENSORS,
    Numbers,
    Words,
    key_values,
    positionals,
    target_of,
    task_heads,
)
from cart_hf.errors import UserError

if TYPE_CHECKING:
    from cart_hf.analysis import Analysis

MEASURES = Group("Measures")
INPUTS = Group("Inputs of the layers")
BESIDE = Group("Beside the analysis")


def analyze(
    recipe: Path | None = None,
    output_folder: Path | None = None,
    /,
    *,
    base: Annotated[str | None, Parameter(group=MODELS)] = None,
    models: Annotated[Words, Parameter(group=MODELS)] = None,
    weights: Annotated[Numbers, Parameter(group=MODELS)] = None,
    method: Annotated[str | None, Parameter(group=METHOD)] = None,
    rank_ratio: Annotated[float | None, Parameter(group=METHOD)] = None,
    scale: Annotated[float | None, Parameter(group=METHOD)] = None,
    set_: Annotated[Words, Parameter(name="--set", group=METHOD)] = None,
    seed: Annotated[int | None, Parameter(group=METHOD)] = None,
    include: Annotated[Words, Parameter(group=TENSORS)] = None,
    exclude: Annotated[Words, Parameter(group=TENSORS)] = None,
    dtype: Annotated[Literal["float32", "float64"] | None, Parameter(group=TENSORS)] = None,
    up_to: Annotated[float, Parameter(group=MEASURES)] = 1.0,
    normalizer: Annotated[Literal["all", "top", "none"], Parameter(group=MEASURES)] = "all",
    inputs: Annotated[int | None, Parameter(group=INPUTS, validator=Number(gte=0))] = None,
    data: Annotated[Path | None, Parameter(group=INPUTS)] = None,
    suite: Annotated[str | None, Parameter(group=INPUTS)] = None,
    tasks: Annotated[Words, Parameter(group=INPUTS)] = None,
    tasks_file: Annotated[Path | None, Parameter(group=INPUTS)] = None,
    heads: Annotated[Words, Parameter(group=INPUTS)] = None,
    split: Annotated[str | None, Parameter(group=INPUTS)] = None,
    results: Annotated[Path | None, Parameter(group=BESIDE)] = None,
    tuning: Annotated[Path | None, Parameter(group=BESIDE)] = None,
    card: Annotated[Path | None, Parameter(group=BESIDE)] = None,
    output: Annotated[Path | None, Parameter(group=EXECUTION)] = None,
    device: Annotated[str, Parameter(group=EXECUTION)] = "auto",
    workers: Annotated[int | None, Parameter(group=EXECUTION, validator=Number(gte=1))] = None,
    factors: Annotated[Path | None, Parameter(group=EXECUTION)] = None,
    overwrite: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    format: Annotated[Literal["human", "json"], Parameter(group=EXECUTION)] = "human",
) -> None:
    """Measure why a merge works or fails: one page to read, and every number as JSON and CSV.

    Around the models' average (as CART has it) and around the base: singular values, what each rank leaves out (R) and
    how much the models' row spaces interfere (I), which models are alike, which layers carry which task, and what the
    merge keeps of each. Nothing is merged to disk, and no data is needed. Writes index.html, analysis.json, six tables
    as CSV, and the figures as PNG and SVG.

    **Examples**

    ```text
    cart-hf analyze recipe.yaml analysis
    cart-hf analyze recipe.yaml analysis --up-to 0.32
    cart-hf analyze recipe.yaml analysis --results benchmark --tuning tuned --card merged
    cart-hf analyze recipe.yaml analysis --data ./data --inputs 64
    cart-hf analyze --base ./roberta --models sst2=./run1 cola=./run2 rte=./run3 --output analysis
    ```

    Parameters
    ----------
    recipe:
        A recipe, of any method.
    output_folder:
        The folder to write.
    base:
        The pretrained model; without one there are no task vectors, only the models around their average.
    models:
        The fine-tuned models, `REF` or `NAME=REF`, two or more.
    weights:
        A relative weight for each model.
    method:
        The merge to look at: cart (default), task_arithmetic, ties ...
    rank_ratio:
        cart: the rank kept, as a fraction of the smaller dimension (default 0.08).
    scale:
        The method's scale.
    set_:
        Any other parameter of the method, as KEY=VALUE.
    seed:
        Seed of methods that draw random numbers (default 0).
    include:
        Also decompose the matrices that match: part of a name, a glob, or `re:REGEX`.
    exclude:
        Leave the tensors that match out of the method: they are averaged.
    dtype:
        Type of the arithmetic: float32 (default) or float64.
    up_to:
        The rank ratio up to which singular values and curves are computed (default 1: all of them); less is faster.
    normalizer:
        Interference of singular values over the norm of all of them (default: it never falls with the rank), of the
        top ones that are kept, or none.
    inputs:
        Check Theorem 1 on so many vectors that reach each layer of each model; default: 32 where examples are named.
    data:
        Folder that holds `NAME/SPLIT.parquet`; labels are not needed.
    suite:
        A named list of tasks: glue-7, vision-8 ...
    tasks:
        Tasks by name; default: the recipe's, or those that its models are called after.
    tasks_file:
        YAML file that declares your own tasks.
    heads:
        TASK=NAME: the model that a task is of, where it is called differently.
    split:
        The split whose inputs are used; default: the one that is scored.
    results:
        A folder of `cart-hf benchmark` or `cart-hf evaluate`, or its JSON: its scores are shown on the page.
    tuning:
        A folder of `cart-hf tune`, or its JSON, likewise.
    card:
        A merged folder of cart-hf: the figures are copied into it, and shown on its model card.
    output:
        The folder to write (the same as the second argument).
    device:
        auto, cpu, cuda, cuda:1, mps ...
    workers:
        Worker threads; default: one per core.
    factors:
        A folder where the singular factors are kept, the same as those of `cart-hf merge --factors`.
    overwrite:
        Replace an earlier analysis.
    format:
        What stdout gets: a summary for people, or analysis.json.
    """
    import cart_hf
    from cart_hf.analysis.request import inputs_wanted
    from cart_hf.cli.console import progress_bars, quiet_libraries

    recipe, output_folder = positionals(recipe, output_folder, models)
    target = target_of(output, output_folder, None)
    examples = {
        "data": None if data is None else str(data),
        "suite": suite,
        "tasks": tasks,
        "tasks_file": None if tasks_file is None else str(tasks_file),
        "heads": task_heads(heads) if heads else None,
        "split": split,
    }
    parameters = key_values(set_ or [], {"rank_ratio": rank_ratio, "scale": scale})
    what = cart_hf.Recipe.load(recipe) if recipe is not None else None
    if target is None:
        raise UserError("no output folder: give it after the recipe, or with --output")
    _check_card(card)
    quiet_libraries(models=inputs_wanted(inputs, examples) > 0)
    started = time.perf_counter()
    with progress_bars() as bars:
        found = cart_hf.analyze(
            what,
            output=target,
            base=base,
            models=models,
            method=method,
            weights=weights,
            include=include,
            exclude=exclude,
            dtype=dtype,
            seed=seed,
            up_to=up_to,
            normalizer=normalizer,
            inputs=inputs,
            examples=examples,
            results=results,
            tuning=tuning,
            factors=factors,
            device=device,
            workers=workers,
            overwrite=overwrite,
            progress=bars,
            **parameters,
        )
    _tell(found, target, time.perf_counter() - started, format)
    if card is not None:
        from cart_hf.publishing.analysis import add_to_card

        add_to_card(card, target)


def _check_card(card: Path | None) -> None:
    """Look for the merged folder before the work.

    :raises UserError: when it is none.
    """
    from cart_hf.output.record import COMPRESS_FILE, MERGE_FILE

    if card is not None and not any((card / name).is_file() for name in (MERGE_FILE, COMPRESS_FILE)):
        raise UserError(f"--card: {card} is not an output of cart-hf (no {MERGE_FILE}); give a merged folder")


def _tell(found: Analysis, output: Path, seconds: float, format: str) -> None:
    """Print what was found."""
    from cart_hf.analysis.document import as_document
    from cart_hf.analysis.files import ANALYSIS_FILE, PAGE_FILE
    from cart_hf.analysis.summary import lines
    from cart_hf.cli.console import out, warn

    for warned in found.warnings:
        warn(warned.text)
    for note in found.notes:
        warn(note)
    if format == "json":
        print((output / ANALYSIS_FILE).read_text(encoding="utf-8"), end="")  # noqa: T201
        return
    out.print("\n".join(lines(as_document(found))))
    out.print(f"read on: {output / PAGE_FILE} (analysed in {seconds:.1f} s)")
