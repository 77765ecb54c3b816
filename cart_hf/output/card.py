"""The first model card of a merge: what was merged, how, and how to load it."""

from __future__ import annotations

from pathlib import Path

import jinja2
import yaml

from cart_hf import __version__
from cart_hf.output.record import resolved_recipe
from cart_hf.plan import Plan
from cart_hf.sources import Checkpoint

_PIPELINES = {"SequenceClassification": "text-classification", "ImageClassification": "image-classification"}


def write_card(folder: Path, plan: Plan, title: str) -> None:
    """Write ``README.md``."""
    template = jinja2.Environment(keep_trailing_newline=True).from_string(
        Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    )
    text = template.render(
        metadata=yaml.safe_dump(_metadata(plan), sort_keys=False),
        title=title,
        method=plan.method,
        version=__version__,
        base=_source(plan.base) if plan.base else None,
        models=[{"name": m.name, "source": _source(m), "class_name": m.architecture.class_name} for m in plan.models],
        summary=f"Low-rank: {plan.count('low_rank')} of {len(plan.tensors)} tensors; "
        f"averaged: {plan.count('average')}; entry by entry: {plan.count('elementwise')}; "
        f"from the base: {plan.count('base')}.",
        loading=_loading(plan, title),
        recipe=_public_recipe(plan),
        limitations=_limitations(plan),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _metadata(plan: Plan) -> dict[str, object]:
    # the Hub refuses a card whose base_model is a local path
    ids = [c.reference.path for c in plan.checkpoints if not c.reference.is_local]
    data: dict[str, object] = {"base_model": ids, "base_model_relation": "merge"} if ids else {}
    data |= {"library_name": "transformers", "tags": ["merge", "cart-hf", plan.method.name]}
    classes = [model.architecture.class_name for model in plan.models]
    for ending, pipeline in _PIPELINES.items():
        if any(name.endswith(ending) for name in classes):
            data["pipeline_tag"] = pipeline
    if plan.output_class == "CLIPModel":
        data["pipeline_tag"] = "zero-shot-image-classification"
    return data


def _source(checkpoint: Checkpoint) -> str:
    if checkpoint.reference.is_local:
        return f"{checkpoint.reference.default_name} (local folder)"
    link = f"[{checkpoint.reference}](https://huggingface.co/{checkpoint.reference.path})"
    return f"{link} at `{checkpoint.commit[:8]}`" if checkpoint.commit else link


def _public_recipe(plan: Plan) -> str:
    """Return the resolved recipe without the folders of the machine it ran on."""
    data = yaml.safe_load(resolved_recipe(plan).to_yaml())
    if plan.base is not None and plan.base.reference.is_local:
        data["base_model"] = plan.base.reference.default_name
    for entry, model in zip(data["models"], plan.models, strict=True):
        if model.reference.is_local:
            entry["model"] = model.reference.default_name
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)


def _loading(plan: Plan, title: str) -> str:
    lines = [f"from transformers import {plan.loader}", "", f'model = {plan.loader}.from_pretrained("{title}")']
    if plan.first_task:
        first, kind = plan.first_task
        lines = [
            f"from transformers import {kind}",
            "",
            "# the merged backbone with one task's own head",
            f'model = {kind}.from_pretrained("{title}", subfolder="tasks/{first}")',
            "",
            "# the backbone once, every task's head on it",
            "import cart_hf",
            "",
            f'model = cart_hf.MultiTaskModel.from_pretrained("{title}")',
        ]
    return "\n".join(lines)


def _limitations(plan: Plan) -> list[str]:
    lines = ["Merging costs accuracy on every task; measure yours before you rely on it."]
    if plan.heads:
        lines.append("Each task keeps its own head: the task must be known when the model is used.")
    return lines + [f"{warning[:1].upper()}{warning[1:]}." for warning in plan.warnings]
