r"""Time and memory of merges on checkpoints of real shape, beside their peers and the machine's floors.

    python scripts/benchmark_merge.py build --work DIR --shape vit-b32             # 8 fine-tunes, 3.4 GB of disk
    python scripts/benchmark_merge.py run --work DIR --shape vit-b32 --output vit.json
    python scripts/benchmark_merge.py run --work DIR --shape roberta-base --output roberta.json \
        --mergekit OTHER_VENV/bin/mergekit-yaml
    python scripts/benchmark_merge.py run --work DIR --shape mistral-7b --models 3 --layers 12 --rounds 1 \
        --rows cart average copy-models                                            # 40 GB of disk, bfloat16
    python scripts/benchmark_merge.py check --work DIR --shape vit-b32             # against a float64 SVD
    python scripts/benchmark_merge.py scaling --work DIR --output scaling.json     # and scaling.png
    python scripts/benchmark_merge.py calculate --work DIR --shape llama-70b --gpu-tflops 40

Checkpoints are built from configurations, with random weights; each fine-tune adds an update whose singular values fall
as i^-0.6 over a Gaussian bulk, 2 % of the weights' size, as real fine-tunes do. What is there already is used again.
`run` starts every command in a process of its own, in turns, forwards and backwards; the page cache is warm. Commands
get all cores: OMP_NUM_THREADS and its like are taken out of their environment. `calculate` measures nothing but this
machine's matrix products: it plans a merge from headers and divides.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import merge_checkpoints as checkpoints
import psutil
import yaml
from merge_check import check
from merge_commands import (
    CART,
    HERE,
    RATIO,
    SCALE,
    flops,
    machine,
    measured,
    merge_command,
    planned,
    product_rates,
    weight_files,
)
from merge_scaling import calculate, scaling
from weight_names import find

from cart_hf.cli.console import quiet_libraries, size
from cart_hf.tables import Table, markdown

TIES = ["--method", "ties", "--density", "0.2"]
OURS = {
    "cart": ("CART", "cart-hf", CART),
    "cart-exact": ("CART", "cart-hf, solver=exact", [*CART, "--set", "solver=exact"]),
    "cart-1-worker": ("CART", "cart-hf, 1 worker", [*CART, "--workers", "1"]),
    "cart-2-workers": ("CART", "cart-hf, 2 workers", [*CART, "--workers", "2"]),
    "cart-2-processes": ("CART", "cart-hf, 2 processes", [*CART, "--num-processes", "2"]),
    "average": ("average", "cart-hf", ["--method", "average"]),
    "task_arithmetic": ("task arithmetic", "cart-hf", ["--method", "task_arithmetic", "--scale", "0.3"]),
    "ties": ("TIES", "cart-hf", TIES),
    "ties-by-tensor": ("TIES, trimmed by tensor", "cart-hf", [*TIES, "--set", "per_tensor=true"]),
}
MERGEKIT = {
    "mergekit-linear": ("average", {"merge_method": "linear"}, {"weight": 1.0}),
    "mergekit-task_arithmetic": (
        "task arithmetic",
        {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.3}},
        {"weight": 1.0},
    ),
    "mergekit-ties": (
        "TIES, trimmed by tensor",
        {"merge_method": "ties", "parameters": {"normalize": True}},
        # it merges the heads, too, and refuses to keep a fifth of two numbers
        {"weight": 1.0, "density": [{"filter": "classifier", "value": 1.0}, {"value": 0.2}]},
    ),
}
FLOORS = {"copy-models": "reading the models once", "copy-all": "reading base and models once"}
ROWS = (*OURS, "official", *MERGEKIT, *FLOORS)


@dataclass
class Row:
    """A command and what it took.

    :param name: what ``--rows`` calls it.
    :param method: what it computes; rows of one method are compared.
    :param peer: who computes it.
    :param command: its words, but for the output, which is last.
    :param merging: of the seconds, those that cart-hf itself counts as merging.
    :param busy: percent of the cores that other processes used before each start.
    """

    name: str
    method: str
    peer: str
    command: list[str]
    seconds: list[float] = field(default_factory=list)
    merging: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)


def rows_for(arguments: argparse.Namespace, base: Path, models: list[Path], output_bytes: int) -> list[Row]:
    """Return the commands to measure, in the order of ``ROWS``."""
    rows = [Row(name, method, peer, merge_command(base, models, flags)) for name, (method, peer, flags) in OURS.items()]
    peers = [sys.executable, str(HERE / "merge_peers.py")]
    settings = ["--rank-ratio", str(RATIO), "--scale", str(SCALE)]
    official = [*peers, "official", "--base", str(base), "--models", *map(str, models), *settings, "--output"]
    rows.append(Row("official", "CART", "the authors' procedure, rebuilt", official))
    for name, (method, head, parameters) in MERGEKIT.items() if arguments.mergekit else ():
        entries = [{"model": str(model), "parameters": parameters} for model in models]
        recipe = arguments.folder / f"{name}.yaml"
        own = {"base_model": str(base)} if name != "mergekit-linear" else {}
        recipe.write_text(yaml.safe_dump({**head, **own, "models": entries, "dtype": "float32"}), encoding="utf-8")
        version = mergekit_version(arguments.mergekit)
        rows.append(
            Row(name, method, version, [str(arguments.mergekit), str(recipe), "--no-copy-tokenizer", "--quiet"])
        )
    inputs: dict[str, int] = {}
    for model in models:
        inputs |= weight_files(model)
    # what a merge without the base's weights still copies from it: parts that no model has, as CLIP's text tower
    rest = max(0, output_bytes - sum(weight_files(models[0]).values()))
    whole = weight_files(base)
    for name, extra in (("copy-models", {next(iter(whole)): rest}), ("copy-all", whole)):
        words = [f"{path}:{nbytes}" for path, nbytes in (inputs | extra).items()]
        command = [*peers, "copy", *words, "--write", str(output_bytes), "--output"]
        rows.append(Row(name, FLOORS[name], "pread and pwrite", command))
    return [row for row in rows if not arguments.rows or row.name in arguments.rows]


def mergekit_version(program: Path) -> str:
    """Return ``mergekit`` and its version, as its own environment knows it."""
    code = "import importlib.metadata as m; print('mergekit', m.version('mergekit'))"
    words = [str(program.with_name("python")), "-c", code]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def measure(row: Row, folder: Path) -> None:
    """Run a row's command once and note what it took."""
    output = folder / f"out-{row.name}"
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)
    row.busy.append(psutil.cpu_percent(interval=0.5))
    took = measured([*row.command, str(output)])
    row.seconds.append(took["seconds"])
    row.peak_bytes.append(int(took["peak_bytes"]))
    if row.name in OURS:
        record = json.loads((output / "merge.json").read_text(encoding="utf-8"))
        row.merging.append(record["seconds"]["merge"])


def run(arguments: argparse.Namespace) -> None:
    """Measure every row in turns; print the table after the last round, write what is known after each."""
    base, models = build(arguments)
    arguments.folder = base.parent
    if arguments.mergekit:
        base = checkpoints.base_as_classifier(base, models[0])
    plan = planned(base, models, CART)
    rows = rows_for(arguments, base, models, plan["output_bytes"])
    found: dict[str, Any] = {
        "machine": machine(),
        "shape": base.parent.name,
        "models": len(models),
        "model_bytes": sum(weight_files(models[0]).values()),
        "output_bytes": plan["output_bytes"],
        "cart_flops": flops(plan),
        "products": [],
    }
    for folder in (base, *models):
        for path in weight_files(folder):
            with Path(path).open("rb") as file:  # warms the page cache up
                while file.read(2**24):
                    pass
    for turn in range(arguments.rounds):
        found["products"].append(product_rates())
        for row in rows if turn % 2 == 0 else rows[::-1]:
            measure(row, base.parent)
            print(f"round {turn + 1}: {row.method}, {row.peer}: {row.seconds[-1]:.2f} s", file=sys.stderr, flush=True)
        found["rows"] = [vars(row) for row in rows]
        save(found, arguments.output)
    found["agreement"] = agreement(rows, base.parent)
    save(found, arguments.output)
    print(report(found))


def agreement(rows: list[Row], folder: Path) -> dict[str, float]:
    """Return, for each peer, the largest difference of a tensor from cart-hf's, relative to the tensor's norm."""
    ours = {row.method: row.name for row in reversed(rows) if row.name in OURS}
    worst = {}
    for row in rows:
        if row.method not in ours or ours[row.method] == row.name:
            continue
        left = checkpoints.open_weights(folder / f"out-{ours[row.method]}")
        right = checkpoints.open_weights(folder / f"out-{row.name}")
        differences = []
        for name in right:
            if find(left, name):
                mine, other = checkpoints.read(left, name), checkpoints.read(right, name)
                differences.append(float((mine - other).norm() / mine.norm().clamp_min(1e-30)))
        worst[row.name] = max(differences)
    return worst


def report(found: Mapping[str, Any]) -> str:
    """Return the measurement as Markdown."""
    rows = {row["name"]: row for row in found["rows"]}
    rate = max(rates["float32"] for rates in found["products"])
    arithmetic = found["cart_flops"] / rate
    ours = {row["method"]: row for row in reversed(found["rows"]) if row["name"] in OURS}
    lines = []
    for row in found["rows"]:
        took, floor = median(row["seconds"]), floor_of(row["method"], rows, arithmetic)
        mine = ours.get(row["method"])
        merging = f"{median(row['merging']):.2f}" if row["merging"] else ""
        against = f"{took / median(mine['seconds']):.2f}" if mine and mine is not row else ""
        lines.append(
            [
                row["method"],
                row["peer"],
                f"{took:.2f} ({min(row['seconds']):.2f}-{max(row['seconds']):.2f})",
                merging,
                size(max(row["peak_bytes"])),
                against,
                f"{took / floor:.1f}" if floor else "",
                f"{median(row['merging']) / floor:.1f}" if floor and merging else "",
            ]
        )
    lines.append(["CART", "arithmetic floor (calculated)", f"{arithmetic:.2f}", "", "", "", "", ""])
    header = ["method", "", "wall s", "merging s", "peak memory", "x cart-hf", "x floor", "merging x floor"]
    title = f"{found['models']} x {found['shape']}, {size(found['model_bytes'])} each; medians of "
    title += f"{len(found['products'])} rounds in turns, warm page cache.\n"
    notes = (
        f"\nx floor: CART's is its arithmetic, {found['cart_flops'] / 1e12:.3g} TFLOP at the {rate / 1e9:.0f} GFLOP/s "
        "that float32 products reached here on all cores; the others' is reading their inputs and writing the output "
        "once on all cores.\n"
    )
    apart = ", ".join(f"{name} {value:.1e}" for name, value in found.get("agreement", {}).items())
    if apart:
        notes += f"Largest difference of a merged tensor from cart-hf's, relative to its norm: {apart}.\n"
    busy = [value for row in found["rows"] for value in row["busy"]]
    notes += f"Other processes used {median(busy):.0f} % of the cores before the starts, {max(busy):.0f} % at most.\n"
    return title + "\n" + markdown(Table(header, lines)) + notes + "\n" + ", ".join(found["machine"].values())


def floor_of(method: str, rows: Mapping[str, Any], arithmetic: float) -> float | None:
    """Return the least time for a method: calculated for CART, measured for what moves bytes only."""
    if method == "CART":
        return arithmetic
    copied = rows.get("copy-models" if method == "average" else "copy-all")
    return median(copied["seconds"]) if copied and method not in FLOORS.values() else None


def save(found: Mapping[str, Any], output: Path | None) -> None:
    """Write what was found, if there is a place for it."""
    if output is not None:
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def build(arguments: argparse.Namespace) -> tuple[Path, list[Path]]:
    """Build the checkpoints that a command asks for, or find them."""
    return checkpoints.build(arguments.work, arguments.shape, arguments.models, layers=arguments.layers)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, call: Callable[[argparse.Namespace], None], help: str, shape: str | None) -> Any:
        sub = verbs.add_parser(name, help=help)
        sub.set_defaults(call=call)
        sub.add_argument("--work", type=Path, required=True, help="folder for checkpoints and merges")
        if shape:
            sub.add_argument("--shape", choices=checkpoints.SIZES, default=shape)
            sub.add_argument("--models", type=int, default=8)
            sub.add_argument("--layers", type=int, help="blocks; default: the shape's own number")
        return sub.add_argument

    verb("build", lambda arguments: print(build(arguments)[0].parent), "write checkpoints", "vit-b32")
    add = verb("run", run, "time and memory beside peers and floors", "vit-b32")
    add("--rounds", type=int, default=3, help="times that each command is measured")
    add("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"what to measure, of {', '.join(ROWS)}")
    add("--mergekit", type=Path, help="mergekit-yaml of another environment; for shapes roberta-base and -large")
    add("--output", type=Path, help="JSON file for every measured number")
    add = verb("check", check, "merged updates against a float64 SVD", "vit-b32")
    add("--powers", type=float, nargs="+", default=[checkpoints.POWER], help="how fast singular values fall, i^-power")
    add("--solvers", nargs="+", default=["fast", "exact"])
    add("--matrices", type=int, default=6, help="how many of them are compared")
    add("--output", type=Path, help="JSON file for every error")
    add = verb("scaling", scaling, "time and memory by models, layers and width", None)
    add("--counts", type=int, nargs="+", default=[2, 4, 8, 16], help="fine-tuned models, of 4 layers of width 512")
    add("--depths", type=int, nargs="+", default=[4, 8, 16, 32, 48], help="layers, of width 256; 4 models")
    add("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="hidden sizes; 1 layer, 3 models")
    add("--workers", type=int, default=1)
    add("--rounds", type=int, default=1)
    add("--output", type=Path, required=True, help="JSON file; the figure gets its name with .png")
    add = verb("calculate", calculate, "what a merge of any size needs, by its plan", "mistral-7b")
    add("--gpu-tflops", type=float, help="rate of a GPU's float32 products, as you know it")
    add("--factor", type=float, default=1.0, help="how many times its arithmetic floor a merge takes, as `run` found")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    quiet_libraries()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
