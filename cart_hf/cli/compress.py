"""`cart-hf compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from cart_hf.cli.adapters import preview, report
from cart_hf.cli.masks import preview as preview_masks
from cart_hf.cli.masks import report as report_masks
from cart_hf.cli.options import (
    EXECUTION,
    HUB,
    MODELS,
    TENSORS,
    Numbers,
    Words,
    checked_repository,
    positionals,
    push_made,
    target_of,
)
from cart_hf.errors import UserError

if TYPE_CHECKING:
    from cart_hf.recipe import Recipe

ADAPTERS = Group("Adapters")


def compress(
    recipe: Path | None = None,
    output_folder: Path | None = None,
    /,
    *,
    base: Annotated[str | None, Parameter(group=MODELS)] = None,
    models: Annotated[Words, Parameter(group=MODELS)] = None,
    weights: Annotated[Numbers, Parameter(group=MODELS)] = None,
    tokenizer_source: Annotated[str | None, Parameter(group=MODELS)] = None,
    form: Annotated[Literal["cart", "tsv_c", "emr"] | None, Parameter(group=ADAPTERS)] = None,
    rank_ratio: Annotated[float | None, Parameter(group=ADAPTERS)] = None,
    rank: Annotated[int | None, Parameter(group=ADAPTERS)] = None,
    energy: Annotated[float | None, Parameter(group=ADAPTERS)] = None,
    budget: Annotated[str | None, Parameter(group=ADAPTERS)] = None,
    restore: Annotated[Literal["small", "all", "none"] | None, Parameter(group=ADAPTERS)] = None,
    centre: Annotated[Literal["average", "base"] | None, Parameter(group=ADAPTERS)] = None,
    adapter_dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, Parameter(group=ADAPTERS)] = None,
    solver: Annotated[Literal["fast", "exact"] | None, Parameter(group=ADAPTERS)] = None,
    include: Annotated[Words, Parameter(group=TENSORS)] = None,
    exclude: Annotated[Words, Parameter(group=TENSORS)] = None,
    dtype: Annotated[Literal["float32", "float64"] | None, Parameter(group=TENSORS)] = None,
    out_dtype: Annotated[Literal["float32", "float64", "bfloat16", "float16"] | None, Parameter(group=TENSORS)] = None,
    max_shard_size: Annotated[str | None, Parameter(group=TENSORS)] = None,
    output: Annotated[Path | None, Parameter(group=EXECUTION)] = None,
    device: Annotated[str, Parameter(group=EXECUTION)] = "auto",
    workers: Annotated[int | None, Parameter(group=EXECUTION, validator=Number(gte=1))] = None,
    overwrite: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    factors: Annotated[Path | None, Parameter(group=EXECUTION)] = None,
    factors_rank_ratio: Annotated[float | None, Parameter(group=EXECUTION)] = None,
    dry_run: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    print_recipe: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    format: Annotated[Literal["human", "json"], Parameter(group=EXECUTION)] = "human",
    push_to_hub: Annotated[str | None, Parameter(group=HUB)] = None,
    private: Annotated[bool | None, Parameter(group=HUB, negative="--public")] = None,
) -> None:
    """Store fine-tuned models as one model and a little for each: their average and LoRA adapters (CART-Indexing).

    Each adapter holds the top singular directions of what its model differs from the average by, exact norms and
    biases, and the task's own head: nearly the fine-tuned model, at a fraction of its bytes, for plain PEFT. Of a
    single model the adapter is for the base itself, and is all that is written. `--form` names two other ways to store
    them: TSV-C's adapters of the base, and EMR-Merging's one task vector with a bit for each weight and task, of which
    `cart-hf restore` makes a task's model.

    **Examples**

    ```text
    cart-hf compress --base ./roberta --models sst2=./run1 cola=./run2 rte=./run3 --output small
    cart-hf compress --base ./roberta --models sst2=./run1 cola=./run2 rte=./run3 --output small --budget 10MB
    cart-hf compress recipe.yaml small --rank-ratio 0.04 --adapter-dtype bfloat16 --dry-run
    cart-hf compress recipe.yaml masked --form emr
    cart-hf compress --base FacebookAI/roberta-base --models textattack/roberta-base-SST-2 --output sst2-lora
    cart-hf compress recipe.yaml small --push-to-hub me/small --private
    ```

    Parameters
    ----------
    recipe:
        A recipe; its `compress:` key says how (`{rank_ratio: 0.08, restore: small, dtype: float32}`).
    output_folder:
        The folder to write.
    base:
        The pretrained model.
    models:
        The fine-tuned models, `REF` or `NAME=REF`.
    weights:
        A relative weight for each model in the average.
    tokenizer_source:
        Whose tokenizer the output gets: `base` (default), or a model's name.
    form:
        cart (default), tsv_c (adapters of the base, all else restored) or emr (masks of one task vector).
    rank_ratio:
        The rank of each layer, as a fraction of the smaller dimension (default 0.08; 1/T for tsv_c).
    rank:
        The rank of each layer, instead of `--rank-ratio`.
    energy:
        The share of the squared singular values kept, instead of `--rank-ratio`.
    budget:
        The size of each adapter, such as 20MB: ranks are chosen where they reduce the error most.
    restore:
        What else is kept exactly: small (norms and biases; default), all (embeddings too; default for tsv_c), or none
        (only the head: such adapters work in batches of several tasks).
    centre:
        What the adapters are for: the models' average, which is written (default), or the base.
    adapter_dtype:
        Type of the factors (default float32).
    solver:
        fast (default: within 1e-3 of the best factors, checked), or exact.
    include:
        Also decompose the matrices that match: part of a name, a glob, or `re:REGEX`.
    exclude:
        Give no factors to the layers that match.
    dtype:
        Type of the arithmetic: float32 (default) or float64.
    out_dtype:
        Type of the centre's tensors; default: the inputs'.
    max_shard_size:
        Largest weight file of the centre (default 5GB).
    output:
        The folder to write (the same as the second argument); default with `--push-to-hub`: the repository's name.
    device:
        auto, cpu, cuda, cuda:1, mps ...
    workers:
        Worker threads; default: one per core.
    overwrite:
        Replace an earlier output of cart-hf.
    factors:
        A folder where the singular factors are kept, the same as those of `cart-hf merge --factors`.
    factors_rank_ratio:
        Rank up to which to compute them (default: as this compression needs).
    dry_run:
        Read configurations and headers only, print what each adapter would hold, write nothing.
    print_recipe:
        Print the recipe that these flags amount to, as YAML, and stop.
    format:
        What stdout gets: a summary for people, or JSON.
    push_to_hub:
        Push the output to this repository, `ORG/NAME`, as `cart-hf push` does; whether it may work is found out first.
    private:
        Make a new repository private or public; default: the Hub's default for you or the organisation.
    """
    import cart_hf
    from cart_hf.cli.console import progress_bars, quiet_libraries
    from cart_hf.compression.request import making_of, request
    from cart_hf.recipe import Recipe

    recipe, output_folder = positionals(recipe, output_folder, models)
    target = target_of(output, output_folder, push_to_hub)
    settings: dict[str, Any] = {
        "base": base,
        "models": models,
        "weights": weights,
        "tokenizer_source": tokenizer_source,
        "include": include,
        "exclude": exclude,
        "dtype": dtype,
        "out_dtype": out_dtype,
        "max_shard_size": max_shard_size,
    }
    making = {
        "form": form,
        "rank_ratio": rank_ratio,
        "rank": rank,
        "energy": energy,
        "budget": budget,
        "restore": restore,
        "centre": centre,
        "dtype": adapter_dtype,
        "solver": solver,
    }
    what = request(Recipe.load(recipe, fewest=1) if recipe is not None else None, settings, making)
    if print_recipe:
        print(what.to_yaml(), end="")  # noqa: T201
        return
    if target is None and not dry_run:
        raise UserError("no output folder: give it after the recipe, or with --output")
    quiet_libraries()
    masks = making_of(what).form == "emr"
    if target is None or dry_run:
        (preview_masks if masks else preview)(what, target, overwrite=overwrite, format=format)
        return
    repo = _checked_family(push_to_hub, what, device, private=private)  # before the work, not after it
    with progress_bars() as bars:
        made = cart_hf.compress(
            what,
            output=target,
            device=device,
            workers=workers,
            overwrite=overwrite,
            factors=factors,
            factors_rank_ratio=factors_rank_ratio,
            progress=bars,
        )
    if isinstance(made, cart_hf.Masked):
        report_masks(made, format)
    else:
        report(made, format)
    push_made(made.output, repo, private=private, format=format)


def _checked_family(repo: str | None, recipe: Recipe, device: str, *, private: bool | None) -> str | None:
    """Return the full name of the repository to push to, or None; the adapters' own are looked at too.

    :raises UserError: when a push could not work.
    """
    from cart_hf.compression.request import making_of, writes_centre

    if repo is not None and making_of(recipe).form == "emr":
        raise UserError("--push-to-hub: masks are not a model; push what `cart-hf restore` makes of them, as you like")
    tasks = [entry.name for entry in recipe.models] if len(recipe.models) > 1 else []
    if repo is not None and tasks and not writes_centre(recipe):
        raise UserError(
            "--push-to-hub: several adapters of the base are repositories of their own: push each afterwards"
        )
    return checked_repository(repo, device, private=private, tasks=tasks)
