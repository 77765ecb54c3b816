r"""The tables of docs/methods.md: every method over several seeds of fine-tuning, and what each merge costs.

    python scripts/compare_methods.py scores seed0/benchmark.json seed1/benchmark.json seed2/benchmark.json
    python scripts/compare_methods.py costs --base B --models M1 M2 ... [--only cart tsv_m] [--recipe recipe.yaml]

`scores` reads what `cart-hf benchmark` wrote, one folder for each seed, and prints each row's average score and its
share of the individual models': mean and standard deviation over the seeds. `costs` merges the models with each method
at its defaults, in turn, each in a process of its own, and prints CPU time (which a busy machine changes little), its
ratio to CART's, and peak memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge_commands import measured, merge_command

from cart_hf.methods import all_methods
from cart_hf.tables import Table, markdown


def scores(files: Sequence[Path]) -> str:
    """Return a Markdown table: rows by their mean over the files, the best first."""
    tables = [_rows(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    lines = []
    for name in sorted(names, key=lambda name: -statistics.fmean(table[name][0] for table in tables)):
        averages, shares = ([100 * table[name][part] for table in tables] for part in (0, 1))
        lines.append((name, _spread(averages), _spread(shares), tables[0][name][2]))
    return markdown(Table(("method", "average", "of the individual models", "settings"), lines, words=1))


def _rows(benchmark: dict[str, Any]) -> dict[str, tuple[float, float, str]]:
    """Return each row's average, its mean share of the individual models' scores, and its settings."""
    alone = next(row for row in benchmark["rows"] if row["name"] == "individual")["tasks"]
    found = {}
    for row in benchmark["rows"]:
        tasks = {name: task["score"] for name, task in row["tasks"].items()}
        share = statistics.fmean(score / alone[name]["score"] for name, score in tasks.items())
        settings = ", ".join(f"{name} {value}" for name, value in row["parameters"].items())
        found[row["name"]] = (statistics.fmean(tasks.values()), share, settings)
    return found


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def costs(base: Path, models: list[Path], only: Sequence[str], rounds: int) -> str:
    """Return a Markdown table of the least CPU time of ``rounds`` merges with each method, and of its peak memory."""
    found: dict[str, dict[str, float]] = {}
    chosen = [name for name in all_methods() if not only or name in only]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for _ in range(rounds):
            for name in chosen:
                if all_methods()[name].calibration or all_methods()[name].model_count:
                    continue  # they need data, or two models
                command = [*merge_command(base, models, ["--method", name]), f"{folder}/out", "--overwrite"]
                cost = measured(command)
                best = found.setdefault(name, cost)
                found[name] = {key: min(best[key], cost[key]) for key in cost}
                print(f"{name}: {cost}", file=sys.stderr, flush=True)
    one = found.get("cart", next(iter(found.values())))
    lines = [
        (
            all_methods()[name].title,
            f"{cost['cpu_seconds']:.0f}",
            f"{cost['cpu_seconds'] / one['cpu_seconds']:.1f}",
            f"{cost['peak_bytes'] / 1e9:.2f} GB",
        )
        for name, cost in found.items()
    ]
    return markdown(Table(("method", "CPU seconds", "of CART's", "peak memory"), lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("scores").add_argument("files", nargs="+", type=Path)
    cost = verbs.add_parser("costs")
    cost.add_argument("--base", type=Path, required=True)
    cost.add_argument("--models", type=Path, nargs="+", required=True)
    cost.add_argument("--only", nargs="*", default=[])
    cost.add_argument("--rounds", type=int, default=1)
    told = parser.parse_args()
    if told.verb == "scores":
        print(scores(told.files))
    else:
        print(costs(told.base, told.models, told.only, told.rounds))


if __name__ == "__main__":
    main()
