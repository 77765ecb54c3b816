"""What was done, written down: `merge.json` for programs and the resolved recipe for running it again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cart_hf import __version__
from cart_hf.output.origin import Origin, local_origin, origins
from cart_hf.plan import Plan, Shard
from cart_hf.plan.model import ROLES
from cart_hf.processes import Processes
from cart_hf.recipe import Recipe
from cart_hf.recipe.calibration import Calibration
from cart_hf.sources import Checkpoint
from cart_hf.sources.download import sha256_in_cache

MERGE_FILE, RECIPE_FILE, COMPRESS_FILE = "merge.json", "cart_hf.yaml", "compress.json"
ADAPTERS_FOLDER = "adapters"
ADAPTATION_FOLDER = "adaptation"  # what was learnt on unlabelled inputs, and from which
COEFFICIENTS_FILE, INPUTS_FILE, CURVES_FILE = "coefficients.safetensors", "inputs.safetensors", "curves.csv"
_PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "scipy")


def resolved_recipe(plan: Plan) -> Recipe:
    """Return the recipe with every Hub reference pinned to the commit that was used."""

    models = tuple(
        entry.model_copy(update={"model": checkpoint.pinned})
        for entry, checkpoint in zip(plan.recipe.models, plan.models, strict=True)
    )
    base = plan.base.pinned if plan.base is not None else None
    update: dict[str, Any] = {"models": models, "base_model": base}
    if plan.coefficients is not None:
        update["coefficients"] = f"{ADAPTATION_FOLDER}/{COEFFICIENTS_FILE}"  # which the output has itself
    return plan.recipe.model_copy(update=update)


def record(
    plan: Plan, shards: Sequence[Shard], seconds: Mapping[str, float], processes: Processes, factors_found: int | None
) -> dict[str, Any]:
    """Return the contents of ``merge.json``.

    :param factors_found: how many matrices had factors; None when none were looked for.
    """
    return {
        "cart_hf": __version__,
        "method": plan.method.name,
        "summary": plan.method.summary,
        "equation": plan.method.equation,
        "citation": plan.method.citation,
        "parameters": plan.recipe.parameters,
        "calibration": _calibration(plan),
        "wrap": [
            {key: getattr(one.wrapper, key) for key in ("name", "title", "summary", "equation", "citation")}
            | {"parameters": one.parameters}
            for one in plan.wrappings
        ],
        "output_class": plan.output_class,
        "loader": plan.loader,
        **sources_of(plan),
        "counts": {role: plan.count(role) for role in ROLES} | {"heads": sum(map(len, plan.heads.values()))},
        "tensors": {
            tensor.name: {"key": tensor.key, "role": tensor.role, "reason": tensor.reason}
            | ({"rank": tensor.rank} if tensor.rank else {})
            | ({"energy": tensor.energy} if tensor.energy else {})
            for tensor in plan.tensors
        },
        "files": {shard.filename: shard.nbytes for shard in shards},
        "warnings": list(plan.warnings),
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "device": str(processes.device),
        "processes": processes.count,
        "factors_found": factors_found,
        "versions": versions(),
        **({"adaptation": plan.coefficients.record} if plan.coefficients is not None else {}),
    }


def _calibration(plan: Plan) -> dict[str, Any] | None:
    """Return on which examples statistics of the models were made, if any were."""
    if plan.method.calibration is None:
        return None
    return (plan.recipe.calibration or Calibration()).model_dump(mode="json")


def sources_of(plan: Plan) -> dict[str, Any]:
    """Return what is recorded of the base, if there is one, and of the models."""
    everyone = [c for c in (*plan.checkpoints, *(c.adapts for c in plan.checkpoints)) if c is not None]
    remote = list(dict.fromkeys((c.place.path, c.commit) for c in everyone if not c.place.is_local))
    known = dict(zip(remote, origins(remote), strict=True))

    def origin_of(checkpoint: Checkpoint) -> Origin:
        place = checkpoint.place
        return local_origin(checkpoint.folder) if place.is_local else known[place.path, checkpoint.commit]

    sources = [_source(checkpoint, origin_of) for checkpoint in plan.checkpoints]
    return {"base": sources[0] if plan.base else None, "models": sources[len(sources) - len(plan.models) :]}


def versions() -> dict[str, str]:
    """Return the versions of the packages a result depends on."""
    return {package: found for package in _PACKAGES if (found := _version(package)) is not None}


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _source(checkpoint: Checkpoint, origin_of: Callable[[Checkpoint], Origin]) -> dict[str, Any]:
    base, reference = checkpoint.adapts, checkpoint.reference
    if base is not None:
        reference = replace(base.place, adapter=checkpoint.place)
    is_public = not checkpoint.place.is_local and (base is None or not base.place.is_local)
    found = {
        "name": checkpoint.name,
        "reference": str(reference),
        "hub_id": checkpoint.place.path if is_public else None,
        "commit": checkpoint.commit,
        "class": checkpoint.architecture.class_name,
        "origin": origin_of(checkpoint).to_dict(),
        "ignored_tensors": list(checkpoint.ignored),
        "files": {name: identify(file.fetch()) for name, file in checkpoint.files.items()},
    }
    if base is not None:
        found["adapts"] = {
            "hub_id": None if base.place.is_local else base.place.path,
            "commit": base.commit,
            "class": base.architecture.class_name,
            "origin": origin_of(base).to_dict(),
        }
    return found


def identify(path: Path) -> dict[str, Any]:
    """Identify a weight file without reading it whole: its size, and a hash of its header.

    In the Hub's cache an LFS file is stored under its own SHA-256, which is then recorded as well.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little") if path.suffix == ".safetensors" else 2**16
        digest = hashlib.sha256(head + file.read(min(length, size))).hexdigest()
    found = {"bytes": size, "header_sha256": digest}
    sha256 = sha256_in_cache(path)
    if sha256 is not None:
        found["sha256"] = sha256
    return found


def write_record(
    folder: Path,
    plan: Plan,
    shards: Sequence[Shard],
    seconds: Mapping[str, float],
    processes: Processes,
    factors_found: int | None = None,
) -> None:
    """Write ``merge.json`` and the resolved recipe."""
    data = json.dumps(
        record(plan, shards, seconds, processes, factors_found), indent=2, ensure_ascii=False, default=str
    )
    (folder / MERGE_FILE).write_text(data + "\n", encoding="utf-8")
    (folder / RECIPE_FILE).write_text(resolved_recipe(plan).to_yaml(), encoding="utf-8")
    if plan.coefficients is not None:
        _keep_coefficients(folder / ADAPTATION_FOLDER, plan)


def _keep_coefficients(folder: Path, plan: Plan) -> None:
    """Keep the coefficients, and the list of the inputs that they were learnt on, beside the recipe that names them."""
    assert plan.coefficients is not None and plan.recipe.coefficients is not None
    folder.mkdir()
    plan.coefficients.save(folder / COEFFICIENTS_FILE)
    inputs = Path(plan.recipe.coefficients).with_name(INPUTS_FILE)
    if inputs.is_file():
        shutil.copyfile(inputs, folder / INPUTS_FILE)
