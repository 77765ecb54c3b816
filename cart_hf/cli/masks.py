"""EMR-Merging's masks for people: what they will be, and what was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cart_hf.compression import Masked
    from cart_hf.recipe import Recipe


def preview(recipe: Recipe, target: Path | None, *, overwrite: bool, format: str) -> None:
    """Print what each task's mask will take."""
    from cart_hf.api import resolved_target
    from cart_hf.cli.console import out, print_table, size
    from cart_hf.compression import plan_masked
    from cart_hf.compression.masks import mask_shards
    from cart_hf.output import check_target
    from cart_hf.tables import Table

    if target is not None:
        check_target(resolved_target(target), overwrite=overwrite)
    plan = plan_masked(recipe)
    nbytes = {model.name: sum(s.nbytes for s in mask_shards(plan, i)) for i, model in enumerate(plan.models)}
    if format == "json":
        print(json.dumps({"unified": plan.nbytes, "masks": nbytes}, indent=2))  # noqa: T201
        return
    print_table(Table(["mask", "size"], [[name, size(one)] for name, one in nbytes.items()]))
    out.print(f"unified model {size(plan.nbytes)}, besides the base; dry run: nothing was written")


def report(made: Masked, format: str) -> None:
    """Print what was made: for people, or as JSON."""
    from cart_hf.cli.console import out, print_table, size, warn
    from cart_hf.output.record import COMPRESS_FILE
    from cart_hf.tables import Table

    for warning in made.plan.warnings:
        warn(warning)
    if format == "json":
        print((made.output / COMPRESS_FILE).read_text(encoding="utf-8"), end="")  # noqa: T201
        return
    rows = [
        [name, f"{mask.rescaler:.3f}", f"{mask.error:.3f}", size(mask.nbytes), f"{mask.nbytes / mask.model_bytes:.1%}"]
        for name, mask in made.masks.items()
    ]
    print_table(Table(["mask (EMR-Merging)", "rescaler", "error", "size", "of its model"], rows))
    models = sum(mask.model_bytes for mask in made.masks.values())
    whole = made.unified_bytes + made.task_bytes
    out.print(
        f"unified model {size(made.unified_bytes)}; all of it {size(whole)}, and the base is needed too; the models "
        f"alone {size(models)}"
    )
    out.print(f"wrote {made.output} in {sum(made.seconds.values()):.1f} s; error: 0 is the model itself, 1 the base")
    out.print(f"    cart-hf restore {made.output} {next(iter(made.masks))} OUTPUT")
