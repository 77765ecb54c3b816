"""`cart-hf merge`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from cart_hf.cli.adapters import report
from cart_hf.cli.options import (
    EXECUTION,
    HUB,
    METHOD,
    MODELS,
    TENSORS,
    Numbers,
    Words,
    checked_repository,
    key_values,
    positionals,
    push_made,
    target_of,
    wrappers,
)
from cart_hf.cli.resuming import resumable
from cart_hf.errors import UserError

if TYPE_CHECKING:
    from cart_hf.compression import Compressed
    from cart_hf.recipe import Recipe


def merge(
    recipe: Path | None = None,
    output_folder: Path | None = None,
    /,
    *,
    base: Annotated[str | None, Parameter(group=MODELS)] = None,
    models: Annotated[Words, Parameter(group=MODELS)] = None,
    weights: Annotated[Numbers, Parameter(group=MODELS)] = None,
    tokenizer_source: Annotated[str | None, Parameter(group=MODELS)] = None,
    method: Annotated[str | None, Parameter(group=METHOD)] = None,
    rank_ratio: Annotated[float | None, Parameter(group=METHOD)] = None,
    rank: Annotated[float | None, Parameter(group=METHOD)] = None,
    energy: Annotated[float | None, Parameter(group=METHOD)] = None,
    scale: Annotated[float | None, Parameter(group=METHOD)] = None,
    density: Annotated[float | None, Parameter(group=METHOD)] = None,
    fuse_qkv: Annotated[bool | None, Parameter(group=METHOD, negative=())] = None,
    set_: Annotated[Words, Parameter(name="--set", group=METHOD)] = None,
    wrap: Annotated[Words, Parameter(group=METHOD)] = None,
    seed: Annotated[int | None, Parameter(group=METHOD)] = None,
    include: Annotated[Words, Parameter(group=TENSORS)] = None,
    exclude: Annotated[Words, Parameter(group=TENSORS)] = None,
    dtype: Annotated[Literal["float32", "float64", "bfloat16", "float16"] | None, Parameter(group=TENSORS)] = None,
    out_dtype: Annotated[Literal["float32", "float64", "bfloat16", "float16"] | None, Parameter(group=TENSORS)] = None,
    max_shard_size: Annotated[str | None, Parameter(group=TENSORS)] = None,
    output: Annotated[Path | None, Parameter(group=EXECUTION)] = None,
    device: Annotated[str, Parameter(group=EXECUTION)] = "auto",
    workers: Annotated[int | None, Parameter(group=EXECUTION, validator=Number(gte=1))] = None,
    num_processes: Annotated[int, Parameter(group=EXECUTION, validator=Number(gte=1))] = 1,
    overwrite: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    resume: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    factors: Annotated[Path | None, Parameter(group=EXECUTION)] = None,
    factors_rank_ratio: Annotated[float | None, Parameter(group=EXECUTION)] = None,
    as_adapter: Annotated[int | None, Parameter(group=EXECUTION, validator=Number(gte=1))] = None,
    dry_run: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    print_recipe: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    format: Annotated[Literal["human", "json"], Parameter(group=EXECUTION)] = "human",
    push_to_hub: Annotated[str | None, Parameter(group=HUB)] = None,
    private: Annotated[bool | None, Parameter(group=HUB, negative="--public")] = None,
) -> None:
    """Merge fine-tuned models into one.

    Give a recipe file, or `--base` and `--models`. A model is a Hub id, `id@revision`, `org/name/sub/folder`, a local
    folder, or a LoRA adapter (its folder or Hub id, or `BASE+ADAPTER`); `NAME=REF` names its task. Under
    `torchrun`, `accelerate launch` or `srun` the work is shared out; the bytes written do not depend on it.

    **Examples**

    ```text
    cart-hf merge --base openai/clip-vit-base-patch32 --output clip-3 --scale 2 \\
        --models tanganke/clip-vit-base-patch32_{sun397,gtsrb,dtd}
    cart-hf merge --base ./roberta --models sst2=./run1 cola=./run2 rte=./run3 --output merged
    cart-hf merge recipe.yaml merged --dry-run
    cart-hf merge recipe.yaml merged --num-processes 4 --resume
    cart-hf merge recipe.yaml merged --push-to-hub me/merged --private
    cart-hf merge --base B --models lora1 lora2 lora3 --output merged-lora --as-adapter 16
    cart-hf merge --base B --models A1 A2 A3 --method ties --density 0.2 --print-recipe
    ```

    Parameters
    ----------
    recipe:
        A recipe: mergekit's YAML with `models:`, plus our keys.
    output_folder:
        The folder to write.
    base:
        The pretrained model.
    models:
        The fine-tuned models, `REF` or `NAME=REF`, two or more.
    weights:
        A relative weight for each model.
    tokenizer_source:
        Whose tokenizer the output gets: `base` (default), or a model's name.
    method:
        cart (default), average, task_arithmetic, ties, consensus, dare, breadcrumbs, della, model_stock, slerp, tsv_m,
        iso_c, iso_cts, wudi, ace, regmean, fisher, knots, or one that an installed package adds.
    rank_ratio:
        The rank kept, as a fraction of the smaller dimension: cart (default 0.08), tsv_m (1/models).
    rank:
        cart, tsv_m: the rank kept, instead of `--rank-ratio`.
    energy:
        cart, tsv_m: the share of the squared singular values kept, instead of `--rank-ratio`.
    scale:
        Factor of the merged update: λ of cart (default 1), task_arithmetic, ties ...
    density:
        ties, dare, breadcrumbs, della, knots: the fraction of entries kept.
    fuse_qkv:
        cart: decompose query, key and value stacked, as in the paper's open_clip checkpoints.
    set_:
        Any other parameter of the method, as KEY=VALUE.
    wrap:
        What is done to the method's result: lines, larv, svc; with parameters as NAME:KEY=VALUE,KEY=VALUE.
    seed:
        Seed of the methods that draw random numbers (default 0).
    include:
        Also decompose the matrices that match: part of a name, a glob, or `re:REGEX`.
    exclude:
        Only average the tensors that match.
    dtype:
        Type of the arithmetic: float32 (default) or float64; a half type means a half-precision output.
    out_dtype:
        Type of the output's tensors; default: the inputs'.
    max_shard_size:
        Largest weight file (default 5GB).
    output:
        The folder to write (the same as the second argument); default with `--push-to-hub`: the repository's name.
    device:
        auto, cpu, cuda, cuda:1, mps ...
    workers:
        Worker threads of each process; default: one per core. The bytes written do not depend on it.
    num_processes:
        Processes on this machine that share the work (one per GPU, or several on the CPU).
    overwrite:
        Replace an earlier output of cart-hf.
    resume:
        Go on with a merge to the same folder that was killed; without one, just start.
    factors:
        cart, tsv_m: a folder where the singular factors are kept; the next merge of the same models finds them there,
        with whatever rank and scale.
    factors_rank_ratio:
        Rank up to which to compute the factors (default: as this merge needs).
    as_adapter:
        Write the merge as a LoRA adapter of the base, of this rank, instead of a model (one for each task with a head).
    dry_run:
        Read configurations and headers only, print the plan, write nothing.
    print_recipe:
        Print the recipe that these flags amount to, as YAML, and stop.
    format:
        What stdout gets: a summary for people, or JSON.
    push_to_hub:
        Push the output to this repository, `ORG/NAME`, as `cart-hf push` does; whether it may work is found out first.
    private:
        Make a new repository private or public; default: the Hub's default for you or the organisation.
    """
    from cart_hf.processes import is_main
    from cart_hf.recipe import Recipe, recipe_from_flags, refuse_flags

    recipe, output_folder = positionals(recipe, output_folder, models)
    target = target_of(output, output_folder, push_to_hub)
    parameters: dict[str, Any] = {
        "rank_ratio": rank_ratio,
        "rank": int(rank) if rank is not None and rank.is_integer() else rank,
        "energy": energy,
        "scale": scale,
        "density": density,
        "fuse_qkv": fuse_qkv,
    }
    parameters = key_values(set_ or [], parameters)
    settings: dict[str, Any] = {
        "base": base,
        "models": models,
        "weights": weights,
        "tokenizer_source": tokenizer_source,
        "method": method,
        "wrap": wrappers(wrap) if wrap else None,
        "seed": seed,
        "include": include,
        "exclude": exclude,
        "dtype": dtype,
        "out_dtype": out_dtype,
        "max_shard_size": max_shard_size,
    }
    if recipe is not None:
        refuse_flags(settings, parameters)
        what = Recipe.load(recipe)
    else:
        what = recipe_from_flags(settings, parameters)
    if print_recipe:
        print(what.to_yaml(), end="")  # noqa: T201
        return
    if target is None and not dry_run:
        raise UserError("no output folder: give it after the recipe, or with --output")
    repo = checked_repository(push_to_hub, device, private=private)  # before the work, not after it
    if target is None or dry_run:
        _preview(what, target, device=device, workers=workers, overwrite=overwrite, format=format)
        return
    arguments: dict[str, Any] = {"device": device, "workers": workers, "overwrite": overwrite, "resume": resume}
    arguments |= {"factors": factors, "factors_rank_ratio": factors_rank_ratio}
    if as_adapter is not None:
        report(_merge_as_adapter(what, target, as_adapter, num_processes, arguments), format)
        push_made(target, repo, private=private, format=format)
        return
    merged = _merge(what, target, num_processes, arguments)
    if is_main():
        _tell(merged, format)
        push_made(merged.output, repo, private=private, format=format)


def _preview(
    recipe: Recipe, target: Path | None, *, device: str, workers: int | None, overwrite: bool, format: str
) -> None:
    """Print the plan, in the first process."""
    from cart_hf.api import plan_merge, resolved_target
    from cart_hf.cli import preview
    from cart_hf.cli.console import quiet_libraries, warn
    from cart_hf.merging import default_workers
    from cart_hf.output import check_target
    from cart_hf.processes import join

    processes = join(device)

    def show() -> None:
        if target is not None:
            check_target(resolved_target(target), overwrite=overwrite)
        plan = plan_merge(recipe)
        threads = workers or default_workers(plan, processes)
        if format == "json":
            print(json.dumps(preview.as_json(plan, threads), indent=2))  # noqa: T201
        else:
            preview.show(plan, threads)
        for warning in plan.warnings:
            warn(warning)

    quiet_libraries(models=False)
    processes.by_main(show)


@dataclass(frozen=True)
class Merged:
    """What is told of a merge.

    :param output: the output folder.
    :param warnings: what the user should know.
    :param lines: what was done, for people.
    """

    output: Path
    warnings: tuple[str, ...]
    lines: tuple[str, ...]


def _merge(recipe: Recipe, target: Path, count: int, arguments: dict[str, Any]) -> Merged:
    """Merge in ``count`` processes, or in this one's share of the work; say where a merge can be continued."""
    from cart_hf.processes import launch

    with resumable(target, resume=arguments["resume"], what="a merge"):
        if count > 1:
            merged: Merged = launch(share, count, recipe=recipe, target=target, arguments=arguments)
            return merged
        return share(recipe, target, arguments)


def _merge_as_adapter(recipe: Recipe, target: Path, rank: int, count: int, arguments: dict[str, Any]) -> Compressed:
    """Merge with progress bars into an adapter.

    :raises UserError: for what is about a merge into a model.
    """
    from cart_hf.cli.console import progress_bars, quiet_libraries
    from cart_hf.compression.merged import merge_as_adapter

    known = {name: arguments.pop(name) for name in ("device", "workers", "overwrite")}
    if count > 1 or any(arguments.values()):
        raise UserError("--as-adapter: leave out --num-processes, --resume and --factors")
    quiet_libraries()
    with progress_bars() as bars:
        return merge_as_adapter(recipe, output=target, rank=rank, progress=bars, **known)


def share(recipe: Recipe, target: Path, arguments: dict[str, Any]) -> Merged:
    """Merge with progress bars, in this process's share of the work."""
    import cart_hf
    from cart_hf.cli import preview
    from cart_hf.cli.console import progress_bars, quiet_libraries, size
    from cart_hf.methods import get_method

    quiet_libraries(models=get_method(recipe.merge_method).calibration is not None)
    with progress_bars() as bars:
        result = cart_hf.merge(recipe, output=target, progress=bars, **arguments)
    plan, seconds = result.plan, result.seconds
    lines = [
        preview.headline(plan),
        f"wrote {size(plan.nbytes)} to {result.output} in {sum(seconds.values()):.1f} s "
        f"({seconds.get('merge', 0.0):.1f} s merging)",
        f'load it: transformers.{plan.loader}.from_pretrained("{result.output}")',
    ]
    if result.factors_found is not None:
        lines.append(
            f"factors: {result.factors_found} of {plan.count('low_rank')} matrices found in {arguments['factors']}"
        )
    if plan.first_task:
        first, kind = plan.first_task
        lines += [
            f'a task:  transformers.{kind}.from_pretrained("{result.output}", subfolder="tasks/{first}")',
            f'all:     cart_hf.MultiTaskModel.from_pretrained("{result.output}")',
        ]
    return Merged(result.output, plan.warnings, tuple(lines))


def _tell(merged: Merged, format: str) -> None:
    """Print what was done."""
    from cart_hf.cli.console import out, warn

    for warning in merged.warnings:
        warn(warning)
    if format == "json":
        print((merged.output / "merge.json").read_text(encoding="utf-8"), end="")  # noqa: T201
    else:
        out.print("\n".join(merged.lines))
