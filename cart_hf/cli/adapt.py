"""`cart-hf adapt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from cart_hf.cli.options import (
    EXECUTION,
    HUB,
    METHOD,
    MODELS,
    Words,
    checked_repository,
    key_values,
    positionals,
    push_made,
    target_of,
    task_heads,
)
from cart_hf.cli.resuming import resumable
from cart_hf.errors import UserError

if TYPE_CHECKING:
    from cart_hf.adaptation import Adapted
    from cart_hf.plan import Plan
    from cart_hf.recipe import Recipe

LEARNING = Group("Learning")
INPUTS = Group("Inputs")


def adapt(
    recipe: Path | None = None,
    output_folder: Path | None = None,
    /,
    *,
    base: Annotated[str | None, Parameter(group=MODELS)] = None,
    models: Annotated[Words, Parameter(group=MODELS)] = None,
    method: Annotated[str | None, Parameter(group=METHOD)] = None,
    rank_ratio: Annotated[float | None, Parameter(group=METHOD)] = None,
    scale: Annotated[float | None, Parameter(group=METHOD)] = None,
    set_: Annotated[Words, Parameter(name="--set", group=METHOD)] = None,
    seed: Annotated[int | None, Parameter(group=METHOD)] = None,
    objective: Annotated[Literal["entropy", "self-labels"] | None, Parameter(group=LEARNING)] = None,
    granularity: Annotated[Literal["task", "layer", "tensor"] | None, Parameter(group=LEARNING)] = None,
    steps: Annotated[int | None, Parameter(group=LEARNING, validator=Number(gte=0))] = None,
    lr: Annotated[float | None, Parameter(group=LEARNING, validator=Number(gt=0))] = None,
    batch_size: Annotated[int | None, Parameter(group=LEARNING, validator=Number(gte=1))] = None,
    optimizer: Annotated[Literal["adam", "adamw", "sgd"] | None, Parameter(group=LEARNING)] = None,
    init: Annotated[float | None, Parameter(group=LEARNING)] = None,
    mask_ratio: Annotated[float | None, Parameter(group=LEARNING)] = None,
    head_lr: Annotated[float | None, Parameter(group=LEARNING, validator=Number(gt=0))] = None,
    patience: Annotated[int | None, Parameter(group=LEARNING, validator=Number(gte=1))] = None,
    suite: Annotated[str | None, Parameter(group=INPUTS)] = None,
    tasks: Annotated[Words, Parameter(group=INPUTS)] = None,
    tasks_file: Annotated[Path | None, Parameter(group=INPUTS)] = None,
    heads: Annotated[Words, Parameter(group=INPUTS)] = None,
    data: Annotated[Path | None, Parameter(group=INPUTS)] = None,
    split: Annotated[str | None, Parameter(group=INPUTS)] = None,
    limit: Annotated[int | None, Parameter(group=INPUTS, validator=Number(gte=1))] = None,
    held_out: Annotated[float | None, Parameter(group=INPUTS)] = None,
    output: Annotated[Path | None, Parameter(group=EXECUTION)] = None,
    device: Annotated[str, Parameter(group=EXECUTION)] = "auto",
    dtype: Annotated[Literal["float32", "bfloat16"] | None, Parameter(group=EXECUTION)] = None,
    workers: Annotated[int | None, Parameter(group=EXECUTION, validator=Number(gte=1))] = None,
    num_processes: Annotated[int, Parameter(group=EXECUTION, validator=Number(gte=1))] = 1,
    terms: Annotated[Literal["disk", "device"], Parameter(group=EXECUTION)] = "disk",
    overwrite: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    resume: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    factors: Annotated[Path | None, Parameter(group=EXECUTION)] = None,
    dry_run: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    print_recipe: Annotated[bool, Parameter(group=EXECUTION, negative=())] = False,
    format: Annotated[Literal["human", "json"], Parameter(group=EXECUTION)] = "human",
    push_to_hub: Annotated[str | None, Parameter(group=HUB)] = None,
    private: Annotated[bool | None, Parameter(group=HUB, negative="--public")] = None,
) -> None:
    """Merge with coefficients that are learnt on unlabelled inputs (test-time adaptation, AdaMerging).

    `W = centre + sum_t c_t term_t`: a coefficient for each task and tensor, found by making the merged model sure of
    its predictions (entropy), or agree with each task's own model (self-labels). For cart, task_arithmetic, ties
    (AdaMerging++), dare and consensus. The output is a merged folder as any other; its recipe names the coefficients,
    and gives it again without data.

    **Examples**

    ```text
    cart-hf adapt recipe.yaml adapted
    cart-hf adapt recipe.yaml adapted --held-out 0.5 --steps 300 --lr 0.003
    cart-hf adapt recipe.yaml adapted --objective self-labels --split train --limit 1000
    cart-hf adapt recipe.yaml adapted --mask-ratio 0.32 --dtype bfloat16
    cart-hf adapt --base ./roberta --models sst2=./run1 cola=./run2 rte=./run3 --output adapted --data ./data
    ```

    Parameters
    ----------
    recipe:
        A recipe; its `adapt:` key says how (`{steps: 500, lr: 0.001}`), its `evaluation:` key on which tasks and data.
    output_folder:
        The folder to write.
    base:
        The pretrained model.
    models:
        The fine-tuned models, `REF` or `NAME=REF`, two or more.
    method:
        cart (default), task_arithmetic, ties, dare, consensus.
    rank_ratio:
        cart: the rank kept, as a fraction of the smaller dimension (default 0.08).
    scale:
        The coefficient to begin with, of a merge from flags; for a recipe see `--init`.
    set_:
        Any other parameter of the method, as KEY=VALUE.
    seed:
        Seed of the order of the inputs, and of methods that draw random numbers (default 0).
    objective:
        entropy (default) of the predictions, or self-labels: agreement with each task's own model, which regressions
        need.
    granularity:
        A coefficient for each task, for each task and layer, or for each task and tensor (default; "layer-wise" in the
        AdaMerging paper).
    steps:
        Updates (default 500); 0 gives the static merge.
    lr:
        Learning rate (default 0.001).
    batch_size:
        Inputs of each task in a step (default 16).
    optimizer:
        adam (default), adamw or sgd.
    init:
        The scale to begin with; default: the recipe's.
    mask_ratio:
        cart: also learn which of the first singular directions, this share of the smaller dimension, are kept
        (AdaRank).
    head_lr:
        Also learn each task's head, at this rate; with `--objective self-labels`.
    patience:
        Stop when so many windows of 25 steps bring nothing better, and keep the best window's coefficients; default:
        all steps, and the last one's.
    suite:
        A named list of tasks: glue-7, vision-8 ...
    tasks:
        Tasks by name; default: the recipe's, or those that its models are called after.
    tasks_file:
        YAML file that declares your own tasks.
    heads:
        TASK=NAME: the model whose head answers a task, where it is called differently.
    data:
        Folder that holds `NAME/SPLIT.parquet`; labels are not needed.
    split:
        The split whose inputs are used; default: the one that is scored.
    limit:
        At most so many inputs of each task, spread evenly.
    held_out:
        Share of the inputs that is left out: `cart-hf evaluate OUTPUT --unseen-by OUTPUT` scores these.
    output:
        The folder to write (the same as the second argument); default with `--push-to-hub`: the repository's name.
    device:
        auto, cpu, cuda, cuda:1, mps ...
    dtype:
        bfloat16 runs the model under autocast; coefficients and weights stay float32.
    workers:
        Worker threads of each process; default: one per core.
    num_processes:
        Processes on this machine that share each batch (one per GPU, or several on the CPU).
    terms:
        Where the dense task vectors are: on disk (default: memory does not grow with the number of tasks), or on the
        device, which is faster and takes one more model there for each task.
    overwrite:
        Replace an earlier output of cart-hf.
    resume:
        Go on with an adaptation to the same folder that was killed; without one, just start.
    factors:
        cart: a folder where the singular factors are kept, the same as those of `cart-hf merge --factors`.
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
    from cart_hf.adaptation.request import request
    from cart_hf.processes import is_main, launch
    from cart_hf.recipe import Recipe

    recipe, output_folder = positionals(recipe, output_folder, models)
    target = target_of(output, output_folder, push_to_hub)
    settings = {"base": base, "models": models, "method": method, "seed": seed}
    parameters = key_values(set_ or [], {"rank_ratio": rank_ratio, "scale": scale})
    learning = {
        "objective": objective,
        "granularity": granularity,
        "steps": steps,
        "lr": lr,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "init": init,
        "mask_ratio": mask_ratio,
        "head_lr": head_lr,
        "patience": patience,
        "split": split,
        "limit": limit,
        "held_out": held_out,
        "dtype": dtype,
    }
    examples = {
        "suite": suite,
        "tasks": tuple(tasks) if tasks else None,
        "tasks_file": str(tasks_file) if tasks_file else None,
        "heads": task_heads(heads or []) or None,
        "data": str(data) if data else None,
    }
    loaded = Recipe.load(recipe) if recipe is not None else None
    what = request(loaded, settings, parameters, learning, examples)
    if print_recipe:
        print(what.to_yaml(), end="")  # noqa: T201
        return
    if target is None and not dry_run:
        raise UserError("no output folder: give it after the recipe, or with --output")
    if target is None or dry_run:
        _preview(what, target, overwrite=overwrite)
        return
    repo = checked_repository(push_to_hub, device, private=private)  # before the work, not after it
    arguments: dict[str, Any] = {
        "device": device,
        "workers": workers,
        "terms": terms,
        "overwrite": overwrite,
        "resume": resume,
        "factors": factors,
    }
    with resumable(target, resume=resume, what="an adaptation"):
        if num_processes > 1:
            told: Told = launch(share, num_processes, recipe=what, target=target, arguments=arguments)
        else:
            told = share(what, target, arguments)
    if is_main():
        _tell(told, format)
        push_made(told.output, repo, private=private, format=format)


@dataclass(frozen=True)
class Told:
    """What is told of an adaptation.

    :param output: the output folder.
    :param notes: what the user should know.
    :param rows: of each task the inputs, those held out, and the loss at first and at last.
    :param lines: what was done, for people.
    """

    output: Path
    notes: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]


def share(recipe: Recipe, target: Path, arguments: dict[str, Any]) -> Told:
    """Adapt with progress bars, in this process's share of the work."""
    import cart_hf
    from cart_hf.cli.console import progress_bars, quiet_libraries

    quiet_libraries()
    with progress_bars() as bars:
        made = cart_hf.adapt(recipe, output=target, progress=bars, **arguments)
    return Told(made.output, (*made.warnings, *made.notes), tuple(_rows(made)), tuple(_lines(made)))


def _rows(made: Adapted) -> list[tuple[str, ...]]:
    from cart_hf.adaptation.learn import ends

    rows: list[tuple[str, ...]] = []
    for task, losses in made.history.losses.items():
        means = [f"{mean:.3f}" for mean in ends(losses) or ()] or ["-", "-"]
        told = made.coefficients.record["tasks"][task]
        rows.append((task, str(told["inputs"]), str(told["held_out"]), *means))
    return rows


def _lines(made: Adapted) -> list[str]:
    from cart_hf.adaptation.record import by_task
    from cart_hf.cli.console import size
    from cart_hf.publishing.adaptation import GRANULARITIES

    told, output = made.coefficients.record, made.output
    values = [value for learnt in by_task(made.plan, made.coefficients).values() for value in learnt.values()]
    steps = f"{told['steps']} steps" + (" (stopped early)" if told["stopped_early"] else "")
    lines = [
        f"{steps} on {told['objective']}: a coefficient for {GRANULARITIES[told['granularity']]}, "
        f"now from {min(values):.3f} to {max(values):.3f}, in {told['tensors']['learnt']} tensors",
        f"wrote {size(made.plan.nbytes)} to {output} in {sum(made.seconds.values()):.1f} s "
        f"({made.seconds['adapt']:.1f} s adapting)",
        f'load it: transformers.{made.plan.loader}.from_pretrained("{output}")',
        f"score it: cart-hf evaluate {output} (scores on the inputs it was adapted on are transductive)",
    ]
    if any(task["held_out"] for task in told["tasks"].values()):
        lines.append(f"          cart-hf evaluate {output} --unseen-by {output} (on the inputs that were held out)")
    return lines


def _tell(told: Told, format: str) -> None:
    """Print what was done."""
    from cart_hf.cli.console import out, print_table, warn
    from cart_hf.output.record import MERGE_FILE
    from cart_hf.tables import Table

    for note in told.notes:
        warn(note)
    if format == "json":
        print((told.output / MERGE_FILE).read_text(encoding="utf-8"), end="")  # noqa: T201
        return
    print_table(Table(["task", "inputs", "held out", "loss at first", "loss at last"], [list(r) for r in told.rows]))
    out.print("\n".join(told.lines))


def _preview(recipe: Recipe, target: Path | None, *, overwrite: bool) -> None:
    """Print the plan, and how much there is to learn."""
    from cart_hf.adaptation.request import static
    from cart_hf.api import plan_merge, resolved_target
    from cart_hf.cli import preview
    from cart_hf.cli.console import out, quiet_libraries
    from cart_hf.output import check_target

    quiet_libraries()
    if target is not None:
        check_target(resolved_target(target), overwrite=overwrite)
    plan: Plan = plan_merge(static(recipe))
    preview.show(plan, 1)
    found = [group for group in plan.groups() if plan.own_coefficients(group) is not None]
    values = sum(len(group.tensors[0].inputs) for group in found)
    out.print(
        f"coefficients: {values}, of {len(found)} tensors; those that no task's output depends on stay as they are"
    )
