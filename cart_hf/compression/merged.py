"""A merge written as one LoRA adapter of the base, rather than as a whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cart_hf.api import merge, resolved_target
from cart_hf.compression.request import request
from cart_hf.compression.run import Compressed, make
from cart_hf.errors import UserError, telling
from cart_hf.output import WorkFolder, check_target
from cart_hf.output.unfinished import cannot_write
from cart_hf.parallel import Progress
from cart_hf.recipe import Recipe


def merge_as_adapter(
    recipe: Recipe,
    *,
    output: str | Path,
    rank: int,
    device: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Compressed:
    """Merge models, and write the best adapter of a rank that turns the base into the merged model.

    A merge of adapters differs from their base by the sum of their ranks at most, so at that rank nothing is lost; of
    models with heads there is an adapter for each task, the same but for the head.

    :param recipe: the merge; it must name the base.
    :param output: folder to write: the adapter itself, or ``adapters/NAME`` where the tasks have heads.
    :param rank: of each layer.
    :param device, workers, overwrite, progress: as for :func:`cart_hf.merge`.
    :raises UserError: when the recipe or an input is wrong; nothing is then left at ``output``.
    """
    if recipe.base_model is None:
        raise UserError("--as-adapter: the adapter is for the base: name it (--base)")
    target = resolved_target(output)
    check_target(target, overwrite=overwrite)
    with WorkFolder(target, overwrite=overwrite) as folder, telling(cannot_write(target)):
        merged = folder.parent / "merged"
        merge(recipe, output=merged, device=device, workers=workers, progress=progress)
        tasks = sorted(path.name for path in merged.glob("tasks/*"))
        models = [f"{name}={merged / 'tasks' / name}" for name in tasks] or [f"merged={merged}"]
        settings = {"base": str(recipe.base_model), "models": models}
        wanted = request(None, settings, {"rank": rank, "centre": "base"})
        made = make(
            wanted,
            folder,
            device=device,
            workers=workers,
            overwrite=False,
            progress=progress,
            merged=merged,
            title=target.name,
        )
    return replace(made, output=target)
