"""`benchmark_merge.py check`: merged updates against their definition, by a full SVD in float64."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import merge_checkpoints as checkpoints
import numpy as np
import numpy.typing as npt
import torch
import transformers
from merge_commands import CART, RATIO, SCALE, machine, measured, merge_command
from merge_peers import MATRIX

from cart_hf.tables import Table, markdown

Matrix = npt.NDArray[np.float64]
WIDER = ["--dtype", "float64", "--out-dtype", "float64"]


def check(arguments: argparse.Namespace) -> None:
    """Merge by each solver on each spectrum, load the result in plain transformers, and print the worst errors."""
    rows: list[dict[str, Any]] = []
    for power in arguments.powers:
        base, models = checkpoints.build(
            arguments.work, arguments.shape, arguments.models, layers=arguments.layers, power=power
        )
        names = sampled(models[0], arguments.matrices)
        truths = {name: truth(models, name) for name in names}
        for solver in arguments.solvers:
            for kind, more in (("as stored", []), ("float64", WIDER)):
                output = base.with_name(f"checked-{solver}-{kind.replace(' ', '-')}")
                shutil.rmtree(output, ignore_errors=True)
                chosen = [] if solver == "fast" else ["--set", f"solver={solver}"]  # fast is the default
                measured([*merge_command(base, models, [*CART, *chosen, *more]), str(output)])
                check_loads(output)
                merged = checkpoints.open_weights(output)
                errors = {}
                for name, (centre, update) in truths.items():
                    errors[name] = relative(checkpoints.read(merged, name).double().numpy() - centre, update)
                rows.append({"power": power, "solver": solver, "output": kind, "errors": errors})
        stored = checkpoints.open_weights(models[0])[names[0]].get_tensor(names[0]).dtype
        errors = {name: relative(rounded(a + update, stored) - a, update) for name, (a, update) in truths.items()}
        rows.append({"power": power, "solver": "none: the truth, rounded", "output": "as stored", "errors": errors})
    if arguments.output is not None:
        arguments.output.write_text(
            json.dumps({"machine": machine(), "shape": arguments.shape, "rows": rows}, indent=2) + "\n"
        )
    cells = [
        [f"i^-{row['power']:g}", row["solver"], row["output"], f"{max(row['errors'].values()):.1e}"] for row in rows
    ]
    print(f"{arguments.models} x {arguments.shape}, CART {RATIO:g}, scale {SCALE:g}; {len(names)} matrices compared\n")
    print(markdown(Table(["singular values", "solver", "output", "worst error of the update"], cells)))


def sampled(model: Path, count: int) -> list[str]:
    """Return names of matrices in the blocks: one kind of module after the other, from the first layer to the last."""
    kinds: dict[str, list[str]] = {}
    for name, file in checkpoints.open_weights(model).items():
        found = MATRIX.search(name)
        if found and len(file.get_slice(name).get_shape()) == 2:
            kinds.setdefault(found["kind"], []).append(name)
    names = list(kinds.values())
    chosen = [names[i % len(names)] for i in range(count)]
    return [layers[i * (len(layers) - 1) // max(1, count - 1)] for i, layers in enumerate(chosen)]


def check_loads(folder: Path) -> None:
    """Load a merge as its configuration says, in plain transformers: every tensor must have found its place."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    loader = getattr(transformers, config["architectures"][0])
    info = loader.from_pretrained(folder, dtype="auto", output_loading_info=True)[1]
    wrong = [key for key in (*info["missing_keys"], *info["unexpected_keys"]) if "pooler" not in key]
    if wrong:
        raise SystemExit(f"{folder} does not load cleanly: {wrong}")


def truth(models: list[Path], name: str) -> tuple[Matrix, Matrix]:
    """Return the centre and CART's update of one matrix, float64."""
    stack = [checkpoints.read(checkpoints.open_weights(model), name).double().numpy() for model in models]
    centre: Matrix = np.mean(stack, axis=0)
    k = max(1, int(RATIO * min(centre.shape)))
    return centre, SCALE * sum(truncated(matrix - centre, k) for matrix in stack)


def truncated(matrix: Matrix, k: int) -> Matrix:
    """Return the best rank-k approximation by a full SVD."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    result: Matrix = (u[:, :k] * s[:k]) @ vt[:k]
    return result


def rounded(matrix: Matrix, dtype: torch.dtype) -> Matrix:
    """Return what is left of a matrix that is stored with ``dtype``."""
    kept: Matrix = torch.from_numpy(matrix).to(dtype).double().numpy()
    return kept


def relative(got: Matrix, wanted: Matrix) -> float:
    """Return the error of a matrix, relative to its Frobenius norm."""
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
