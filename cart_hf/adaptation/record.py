"""What was learnt, written down: coefficients, inputs, losses, and how it was done."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cart_hf.adaptation.figures import curves, heat_map
from cart_hf.adaptation.inputs import Inputs
from cart_hf.adaptation.learn import History, ends
from cart_hf.adaptation.learnable import Learnable
from cart_hf.adaptation.terms import Terms
from cart_hf.errors import UserError
from cart_hf.output.record import COEFFICIENTS_FILE, CURVES_FILE, INPUTS_FILE
from cart_hf.plan import Plan
from cart_hf.plan.coefficients import Coefficients
from cart_hf.recipe import Adaptation


def coefficients_of(
    plan: Plan,
    terms: Sequence[Terms],
    learnable: Learnable,
    heads: Mapping[str, Mapping[str, torch.nn.Parameter]],
) -> Coefficients:
    """Return what was learnt, by tensor (or fused group).

    :param heads: the weights of the heads that were learnt, by task and name.
    """
    values, masks = {}, {}
    for term in terms:
        group, learnt = term.group, learnable.learnt(term.group)
        places = [i for i, _ in group.tensors[0].inputs]
        found = torch.zeros(len(plan.models))  # zero where a model lacks the tensor
        found[places] = torch.tensor(learnt.values)
        values[group.name] = found
        mask = learnable.changed_mask(group)
        if mask is not None:
            masks[group.name] = torch.zeros(len(plan.models), mask.shape[1], dtype=torch.bool)
            masks[group.name][places] = mask
    learnt_heads = {
        task: {name: weight.detach().cpu() for name, weight in weights.items()} for task, weights in heads.items()
    }
    return Coefficients(plan.method.name, tuple(model.name for model in plan.models), values, masks, learnt_heads)


def record(
    adaptation: Adaptation,
    seed: int,
    inputs: Sequence[Inputs],
    history: History,
    coefficients: Coefficients,
    fixed: int,
) -> dict[str, Any]:
    """Return what ``merge.json`` tells of an adaptation.

    :param fixed: how many tensors have coefficients that no task's output depends on.
    """
    first, last = ends(history.total) or (None, None)
    return {
        **adaptation.model_dump(exclude={"split", "limit", "init", "patience"}),
        "steps": history.steps,
        "stopped_early": history.stopped_early,
        "seed": seed,
        "tasks": {
            one.task.name: {
                "source": one.data.source,
                "split": one.data.split,
                "inputs": len(one),
                "held_out": one.held_out,
            }
            for one in inputs
        },
        "tensors": {"learnt": len(coefficients.values), "fixed": fixed},
        "loss": {"first": first, "last": last},
    }


def write_learnt(
    folder: Path, coefficients: Coefficients, told: Mapping[str, Any], inputs: Sequence[Inputs]
) -> Coefficients:
    """Write what a merge is made with: the coefficients, and the hashes of the inputs that they were learnt on."""
    folder.mkdir(exist_ok=True)
    complete = replace(coefficients, record=told)
    complete.save(folder / COEFFICIENTS_FILE)
    hashes = {one.task.name: torch.from_numpy(one.hashes()) for one in inputs}
    save_file(hashes, folder / INPUTS_FILE)
    return complete


def write_history(
    folder: Path, plan: Plan, adaptation: Adaptation, history: History, coefficients: Coefficients
) -> list[str]:
    """Write the losses and the figures; return why there are no figures, where there are none."""
    with (folder / CURVES_FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", *history.losses])
        for step, (total, *losses) in enumerate(zip(history.total, *history.losses.values(), strict=True)):
            writer.writerow([step, f"{total:.6g}", *(f"{loss:.6g}" for loss in losses)])
    try:
        heat_map(by_task(plan, coefficients), [folder / "coefficients.png"], initial=_initial(plan, coefficients))
        if history.steps:
            curves(history.losses, [folder / "curves.png"], objective=adaptation.objective)
    except UserError as failure:  # no matplotlib: the numbers are what matters
        return failure.problems
    return []


def by_task(plan: Plan, coefficients: Coefficients) -> dict[str, dict[str, float]]:
    """Return what was learnt for each tensor (or fused group), by the names of the models that have it."""
    found = {}
    for group in plan.groups():
        models = tuple(plan.models[i].name for i in sorted(i for i, _ in group.tensors[0].inputs))
        learnt = coefficients.of(group.name, models)
        if learnt is not None:
            found[group.name] = dict(zip(models, learnt.values, strict=True))
    return found


def _initial(plan: Plan, coefficients: Coefficients) -> float | None:
    """Return the coefficient that all tensors and tasks began with, if it was one."""
    own = {
        value
        for group in plan.groups()
        if group.name in coefficients.values
        for value in plan.own_coefficients(group) or ()
    }
    return own.pop() if len(own) == 1 else None
