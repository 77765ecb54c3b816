"""`benchmark_merge.py scaling` and `calculate`: how a merge grows, measured on small sets, planned on large ones."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import merge_checkpoints as checkpoints
from merge_commands import CART, flops, machine, measured, merge_command, planned, product_rates, weight_files

from cart_hf.cli.console import size
from cart_hf.figures.canvas import new_figure
from cart_hf.tables import Table, markdown

AXES = {"models": "fine-tuned models", "layers": "layers", "width": "hidden size"}


def scaling(arguments: argparse.Namespace) -> None:
    """Measure CART while one of three grows and the others stay, and write the numbers and a figure."""
    points: list[dict[str, Any]] = [
        *({"axis": "models", "models": count, "layers": 4, "width": 512} for count in arguments.counts),
        *({"axis": "layers", "models": 4, "layers": depth, "width": 256} for depth in arguments.depths),
        *({"axis": "width", "models": 3, "layers": 1, "width": width} for width in arguments.widths),
    ]
    flags = [*CART, "--workers", str(arguments.workers)]
    commands = []
    for point in points:
        size_ = {"layers": point["layers"], "width": point["width"]}
        base, models = checkpoints.build(arguments.work, "encoder", point["models"], **size_)
        commands.append((merge_command(base, models, flags), base.with_name("scaled")))
        point |= facts(planned(base, models, flags), models[0]) | {"seconds": [], "peak_bytes": []}
    found = {
        "machine": machine(),
        "workers": arguments.workers,
        "dry_run_peak_bytes": measured([*commands[0][0][:-1], "--dry-run"])["peak_bytes"],
        "points": points,
    }
    for _ in range(arguments.rounds):
        for point, (command, output) in zip(points, commands, strict=True):
            shutil.rmtree(output, ignore_errors=True)
            point["peak_bytes"].append(measured([*command, str(output)])["peak_bytes"])
            record = json.loads((output / "merge.json").read_text(encoding="utf-8"))
            point["seconds"].append(record["seconds"]["merge"])
            what = ", ".join(f"{point[axis]} {label}" for axis, label in AXES.items())
            print(f"{what}: {point['seconds'][-1]:.2f} s, {size(point['peak_bytes'][-1])}", flush=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    draw(found, arguments.output.with_suffix(".png"))


def facts(plan: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """Return what a plan says about a merge's size."""
    matrices = [group["shape"] for group in plan["groups"] if group["role"] == "low_rank"]
    return {
        "largest_matrix_bytes": max(4 * rows * columns for rows, columns in matrices),  # in the arithmetic's float32
        "planned_bytes": plan["memory_bytes"],
        "model_bytes": sum(weight_files(model).values()),
        "flops": flops(plan),
    }


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw time above memory for each of the three that grow."""
    start = found["dry_run_peak_bytes"] / 1e6
    fixed = ["4 layers of width 512", "4 models of width 256", "3 models of 1 layer"]
    with new_figure(10, 5.6, [path]) as figure:
        panels = figure.subplots(2, 3, sharex="col")
        for panel in panels[0][1:]:
            panel.sharey(panels[0][0])
        for (axis, label), title, above, below in zip(AXES.items(), fixed, *panels, strict=True):
            points = [point for point in found["points"] if point["axis"] == axis]
            where = [point[axis] for point in points]
            stacks = [start + found["workers"] * p["models"] * p["largest_matrix_bytes"] / 1e6 for p in points]
            above.plot(where, [median(p["seconds"]) for p in points], "o-", color="#0b5394")
            below.plot(where, [max(p["peak_bytes"]) / 1e6 for p in points], "o-", color="#0b5394", label="measured")
            below.plot(where, stacks, "--", color="#b45f06", label="libraries + T x largest matrix")
            below.plot(where, [start] * len(points), ":", color="#777777", label="libraries (a dry run)")
            above.set_title(title, fontsize=10)
            above.set_yscale("log")
            above.yaxis.set_major_formatter("{x:g}")
            above.yaxis.set_minor_formatter("")
            below.set_ylim(0, 1.15 * max(*stacks, *(max(p["peak_bytes"]) / 1e6 for p in points)))
            below.set_xlabel(label)
            for panel in (above, below):
                panel.set_xscale("log", base=2)
                panel.set_xticks(where, [str(value) for value in where])
                panel.grid(color="#dddddd", linewidth=0.6)
        panels[0][0].set_ylabel("merging, s")
        panels[1][0].set_ylabel("peak memory, MB")
        handles, labels = panels[1][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=3, frameon=False, fontsize=9)
        figure.align_ylabels()


def calculate(arguments: argparse.Namespace) -> None:
    """Print what a merge needs, from the plan that cart-hf makes of headers, and the rates of this machine."""
    base, models = checkpoints.build(
        arguments.work, arguments.shape, arguments.models, layers=arguments.layers, empty=True
    )
    plan = planned(base, models, CART)
    work = flops(plan)
    read = sum(group["bytes"] * group["models"] for group in plan["groups"])
    each = plan["memory_bytes"] // plan["workers"]
    rates = product_rates()
    rows = [
        ["model", size(plan["output_bytes"])],
        ["bytes read", size(read)],
        ["bytes written", size(plan["output_bytes"])],
        ["matrices decomposed", str(sum(g["count"] for g in plan["groups"] if g["role"] == "low_rank"))],
        ["arithmetic", f"{work / 1e15:.3g} PFLOP"],
        ["memory for tensors, a worker", size(each)],
    ]
    for name, rate in (("float32", rates["float32"]), ("float64", rates["float64"])):
        hours = arguments.factor * work / rate / 3600
        rows.append([f"hours here, {name} products at {rate / 1e9:.0f} GFLOP/s", f"{hours:.2f}"])
    if arguments.gpu_tflops:
        hours = arguments.factor * work / arguments.gpu_tflops / 1e12 / 3600
        rows.append([f"hours on a GPU that reaches {arguments.gpu_tflops:g} TFLOP/s", f"{hours:.3f}"])
    print(markdown(Table([f"{len(models)} x {base.parent.name}, CART at rank ratio 0.08", ""], rows)))
    print(
        f"Calculated, not measured, at {arguments.factor:g} times the arithmetic floor; reading and writing come on "
        f"top. Memory is cart-hf's own estimate, besides 0.4 GB of libraries.\n{', '.join(machine().values())}"
    )
