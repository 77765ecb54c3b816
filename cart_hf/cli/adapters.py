"""Adapters for people: what they will be, and what was made."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cart_hf.compression import Compressed
    from cart_hf.recipe import Recipe


def preview(recipe: Recipe, target: Path | None, *, overwrite: bool, format: str) -> None:
    """Print what each adapter will hold."""
    from cart_hf.api import resolved_target
    from cart_hf.cli.console import out, print_table, size, warn
    from cart_hf.compression import plan_compression
    from cart_hf.compression.preview import estimates
    from cart_hf.compression.request import making_of, writes_centre
    from cart_hf.output import check_target
    from cart_hf.tables import Table, span

    if target is not None:
        check_target(resolved_target(target), overwrite=overwrite)
    plan, outlines = plan_compression(recipe)
    found = estimates(outlines, making_of(recipe))
    if format == "json":
        print(json.dumps([asdict(one) for one in found], indent=2))  # noqa: T201
        return
    header = ["adapter", "layers", "rank", "restored", "the centre's", "size", "of its model", "class"]
    rows = [
        [
            one.task,
            str(one.layers),
            span(*one.ranks) if one.ranks else "?",
            str(one.restored),
            str(one.left_out),
            size(one.nbytes) if one.nbytes else "?",
            f"{one.nbytes / one.model_bytes:.1%}" if one.nbytes else "?",
            one.class_name,
        ]
        for one in found
    ]
    print_table(Table(header, rows, words=1))
    what = f"centre {size(plan.nbytes)}" if writes_centre(recipe) else "the base is the centre"
    out.print(f"{what}; dry run: nothing was written")
    if any(one.wasteful for one in found):
        most = max(one.wasteful for one in found)
        warn(f"factors of {most} layers take more bytes than the layers themselves (rank above m n / (m + n))")


def report(made: Compressed, format: str) -> None:
    """Print what was made: for people, or as JSON."""
    from cart_hf.cli.console import out, print_table, size, warn
    from cart_hf.output.record import COMPRESS_FILE
    from cart_hf.tables import Table, span

    for warning in made.plan.warnings:
        warn(warning)
    if format == "json":
        print((made.output / COMPRESS_FILE).read_text(encoding="utf-8"), end="")  # noqa: T201
        return
    rows = []
    for outline in made.outlines:
        adapter = made.adapters[outline.name]
        ranks = [fit.rank for fit in adapter.layers.values()]
        share = f"{adapter.nbytes / outline.model_bytes:.1%}"
        error = f"{adapter.error:.3f}"
        rows.append([outline.name, span(min(ranks), max(ranks)), error, size(adapter.nbytes), share])
    print_table(Table(["adapter", "rank", "error", "size", "of its model"], rows))
    whole = made.centre_bytes + sum(adapter.nbytes for adapter in made.adapters.values())
    models = sum(outline.model_bytes for outline in made.outlines)
    if made.centre_bytes:
        out.print(
            f"centre {size(made.centre_bytes)}; all of it {size(whole)}, the models alone {size(models)} "
            f"({whole / models:.1%})"
        )
    out.print(f"wrote {made.output} in {sum(made.seconds.values()):.1f} s; error: 0 is the model itself, 1 the centre")
    out.print("\n".join(_loading(made)))


def _loading(made: Compressed) -> list[str]:
    """Return how the first adapter is loaded."""
    from cart_hf.output.record import ADAPTERS_FOLDER

    first, plan = made.outlines[0], made.plan
    kind = f"transformers.{first.class_name}"
    if made.centre_bytes:
        head = f', subfolder="tasks/{first.name}"' if first.name in plan.heads else ""
        model, adapter = f'{kind}.from_pretrained("{made.output}"{head})', made.output / ADAPTERS_FOLDER / first.name
    else:
        assert plan.base is not None  # the centre of a single model
        count = first.label_count
        labels = f", num_labels={count}" if count is not None else ""
        model = f'{kind}.from_pretrained("{plan.base.reference}"{labels})'
        adapter = made.output if len(made.outlines) == 1 else made.output / ADAPTERS_FOLDER / first.name
    return [f"    model = {model}", f'    model = peft.PeftModel.from_pretrained(model, "{adapter}")']
