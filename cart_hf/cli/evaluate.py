"""`cart-hf evaluate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from cart_hf.cli.options import task_heads

if TYPE_CHECKING:
    from cart_hf.evaluation.results import Results

TASKS = Group("Tasks")
DATA = Group("Data")
MODEL = Group("Model")
EXECUTION = Group("Execution")
RESULTS = Group("Results")

Words = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]
Format = Literal["human", "json", "markdown", "latex", "csv"]


def evaluate(
    model: str,
    /,
    *,
    suite: Annotated[str | None, Parameter(group=TASKS)] = None,
    tasks: Annotated[Words, Parameter(group=TASKS)] = None,
    tasks_file: Annotated[Path | None, Parameter(group=TASKS)] = None,
    heads: Annotated[Words, Parameter(group=TASKS)] = None,
    label_mapping: Annotated[Literal["name", "index"] | None, Parameter(group=TASKS)] = None,
    data: Annotated[Path | None, Parameter(group=DATA)] = None,
    split: Annotated[str | None, Parameter(group=DATA)] = None,
    limit: Annotated[int | None, Parameter(group=DATA, validator=Number(gte=1))] = None,
    stream: Annotated[bool, Parameter(group=DATA, negative=())] = False,
    unseen_by: Annotated[str | None, Parameter(group=DATA)] = None,
    base: Annotated[str | None, Parameter(group=MODEL)] = None,
    normalize: Annotated[bool, Parameter(group=MODEL, negative=())] = False,
    batch_size: Annotated[int, Parameter(group=EXECUTION, validator=Number(gte=1))] = 64,
    device: Annotated[str, Parameter(group=EXECUTION)] = "auto",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Parameter(group=EXECUTION)] = "float32",
    num_processes: Annotated[int, Parameter(group=EXECUTION, validator=Number(gte=1))] = 1,
    output: Annotated[Path | None, Parameter(group=RESULTS)] = None,
    resume: Annotated[bool, Parameter(group=RESULTS, negative=())] = False,
    overwrite: Annotated[bool, Parameter(group=RESULTS, negative=())] = False,
    submission: Annotated[Path | None, Parameter(group=RESULTS)] = None,
    format: Annotated[Format, Parameter(group=RESULTS)] = "human",
) -> None:
    """Measure a model on tasks: a merged or compressed folder, a plain classification checkpoint, or a CLIP.

    The examples come from the Hub, or from `--data DIR` with `DIR/NAME/SPLIT.parquet` (or CSV, TSV, JSON lines, or an
    image folder). `cart-hf tasks` lists the built-in tasks and suites. Under `torchrun` or `accelerate launch` the
    examples are shared out; the results do not depend on it.

    **Examples**

    ```text
    cart-hf evaluate merged --suite glue --output results.json
    cart-hf evaluate clip-8 --suite vision-8 --normalize --dtype bfloat16
    cart-hf evaluate textattack/roberta-base-SST-2 --tasks sst2 --label-mapping index
    cart-hf evaluate merged --tasks-file mine.yaml --data ./data --limit 500
    cart-hf evaluate merged --suite glue --num-processes 2 --output results.json --resume
    cart-hf evaluate adapted --unseen-by adapted
    cart-hf evaluate merged --submission glue.zip
    ```

    Parameters
    ----------
    model:
        A folder, a Hub id or `id@revision`.
    suite:
        A named list of tasks: glue, glue-7, vision-8, vision-14, vision-20 ...
    tasks:
        Tasks by name; default: those that the model's heads are called after.
    tasks_file:
        YAML file that declares your own tasks.
    heads:
        TASK=HEAD: the head that answers a task (of a compressed CLIP: the adapter), where it is called differently.
    label_mapping:
        `name` (default) matches the label names of model and data, `index` trusts their order.
    data:
        Folder that holds `NAME/SPLIT.parquet`.
    split:
        train, validation or test; default: each task's own (GLUE: validation).
    limit:
        At most so many examples of each task, spread evenly.
    stream:
        Read the first `--limit` rows over the network instead of downloading the whole dataset.
    unseen_by:
        An adapted model, a folder or a Hub id: score only the inputs that it was not adapted on.
    base:
        The pretrained model: lends a vision tower its text tower; default: what the merge was made of.
    normalize:
        Also score the individual models that the merge was made from (kept in a cache).
    batch_size:
        Examples at a time, in each process.
    device:
        auto, cpu, cuda ...
    dtype:
        bfloat16 and float16 run under autocast.
    num_processes:
        Processes on this machine that share the examples out (one per GPU, or several on the CPU).
    output:
        File for the results (JSON), written after each task.
    resume:
        Take over the finished tasks of `--output`.
    overwrite:
        Replace `--output` or `--submission`.
    submission:
        Zip file for the GLUE leaderboard: predictions of the test split, whose labels are hidden.
    format:
        What stdout gets.
    """
    arguments: dict[str, Any] = {
        "suite": suite,
        "tasks": tuple(tasks) if tasks else None,
        "tasks_file": str(tasks_file) if tasks_file else None,
        "heads": task_heads(heads or []) or None,
        "label_mapping": label_mapping,
        "data": str(data) if data else None,
        "split": split,
        "limit": limit,
        "stream": stream or None,
        "unseen_by": unseen_by,
        "batch_size": batch_size,
        "dtype": dtype,
        "base": base,
        "normalize": normalize,
        "device": device,
        "output": output,
        "resume": resume,
        "overwrite": overwrite,
        "submission": submission,
    }
    if num_processes > 1:
        from cart_hf.processes import launch

        results = launch(measure, num_processes, model=model, arguments=arguments)
    else:
        results = measure(model, arguments)
    finish(results, format, submission)


def measure(model: str, arguments: dict[str, Any]) -> Results:
    """Evaluate with progress bars, in this process's share of the work."""
    from cart_hf.cli.console import progress_bars, quiet_libraries
    from cart_hf.evaluation.api import evaluate as run
    from cart_hf.processes import is_main

    quiet_libraries()
    with progress_bars() as bars:
        return run(model, progress=bars if is_main() else None, **arguments)


def finish(results: Results, format: Format, submission: Path | None) -> None:
    """Print the results, and exit with 2 (the user's mistakes) or 1 when a task has none."""
    from cart_hf.cli.console import warn
    from cart_hf.processes import is_main

    if is_main():
        _print(results, format)
        for name, result in results.tasks.items():
            if result.broken_images:
                rows = ", ".join(list(result.broken_images)[:5])
                count = len(result.broken_images)
                warn(f"{name}: {count} of {result.examples} images cannot be decoded and count as wrong (rows {rows})")
        if submission is not None and submission.is_file():
            _tell_submission(submission)
    tell_errors(results.errors)


def _print(results: Results, format: Format) -> None:
    from cart_hf import tables
    from cart_hf.cli.console import out, print_table
    from cart_hf.evaluation.report import as_table, conventions, transductive

    table = as_table(results)
    if format == "json":
        print(json.dumps(results.to_dict(), indent=2))  # noqa: T201
    elif format == "human":
        if results.tasks:
            print_table(table)
            for note in (conventions(results), transductive(results)):
                if note is not None:
                    out.print(note)
    else:
        write = {"markdown": tables.markdown, "latex": tables.latex, "csv": tables.comma_separated}[format]
        print(write(table), end="")  # noqa: T201


def tell_errors(errors: Mapping[str, str]) -> None:
    """Print why tasks have no result, and exit with 2 (the user's mistakes) or 1; return when there are none.

    :param errors: messages by task.
    """
    from cart_hf.cli.console import err
    from cart_hf.evaluation.run import INTERNAL
    from cart_hf.processes import is_main

    if is_main():
        for name, problem in errors.items():
            err.print(f"error: {problem}" if f"'{name}'" in problem else f"error: task '{name}': {problem}")
    if errors:
        sys.exit(1 if any(problem.startswith(INTERNAL) for problem in errors.values()) else 2)


def _tell_submission(path: Path) -> None:
    from cart_hf.cli.console import out, warn
    from cart_hf.evaluation.submission import missing_files

    out.print(f"wrote {path}: upload it at https://gluebenchmark.com/submit")
    missing = missing_files(path)
    if missing:
        warn(f"{path}: the leaderboard also wants {', '.join(missing)}")
