"""A merged folder made to look as if its coefficients had been learnt: the files that `cart-hf adapt` adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.numpy import save_file

from cart_hf.output.record import ADAPTATION_FOLDER, COEFFICIENTS_FILE, CURVES_FILE, INPUTS_FILE
from cart_hf.plan.coefficients import Coefficients


def pretend_adapted(folder: Path, sources: dict[str, str], **changes: Any) -> None:
    """Add the files, and say in ``merge.json`` and ``cart_hf.yaml`` how they came about.

    :param sources: for each task where its inputs came from.
    :param changes: of what ``merge.json`` says of the adaptation.
    """
    record, recipe = (
        json.loads((folder / "merge.json").read_text()),
        yaml.safe_load((folder / "cart_hf.yaml").read_text()),
    )
    tasks = {name: {"source": source, "split": "test", "inputs": 8, "held_out": 0} for name, source in sources.items()}
    record["adaptation"] = {
        **{"objective": "entropy", "granularity": "tensor", "steps": 500, "stopped_early": False, "lr": 0.001},
        **{
            "batch_size": 16,
            "optimizer": "adam",
            "dtype": "float32",
            "seed": 0,
            "mask_ratio": None,
            "head_lr": None,
            "held_out": 0.0,
        },
        **{"tasks": tasks, "tensors": {"learnt": 30, "fixed": 5}, "loss": {"first": 3.2, "last": 1.1}},
        **changes,
    }
    recipe |= {"coefficients": f"{ADAPTATION_FOLDER}/{COEFFICIENTS_FILE}", "adapt": {"steps": 500, "data": str(folder)}}
    (folder / "merge.json").write_text(json.dumps(record))
    (folder / "cart_hf.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    inside = folder / ADAPTATION_FOLDER
    inside.mkdir()
    values = {name: torch.full((len(sources),), 0.3) for name in list(record["tensors"])[:3]}
    learnt = Coefficients(record["method"], tuple(sources), values, {}, record=record["adaptation"])
    learnt.save(inside / COEFFICIENTS_FILE)
    save_file({name: np.arange(8) for name in sources}, inside / INPUTS_FILE)
    (inside / CURVES_FILE).write_text("step,loss," + ",".join(sources) + "\n")
    for name in ("coefficients.png", "curves.png"):
        Image.new("RGB", (2, 2)).save(inside / name)
