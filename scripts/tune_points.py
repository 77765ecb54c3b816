"""What the merges of a search cost: all points of a grid as `cart-hf tune` makes them, beside one merge; unmeasured.

    python scripts/tune_points.py recipe.yaml --rounds 3

Each round starts the same program for one merge at each rank of the grid (the recipe's `tune:` key, or what its method
suggests), and once for every point: libraries are loaded each time, models are not scored.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from merge_commands import machine, measured

import cart_hf
from cart_hf.cli.console import size
from cart_hf.tuning.merges import Merges, kept_factors
from cart_hf.tuning.search import search_grid


def make(recipe: cart_hf.Recipe, only: int | None, folder: Path) -> None:
    """Make all points of a grid, or one merge, below ``folder``.

    :param only: the place of that one point.
    """
    trial = recipe.tuned()
    if only is not None:
        cart_hf.merge(recipe.variant(trial.method, trial.points[only]), output=folder / "merged", device="cpu")
        return
    merges = Merges(folder / "work", kept_factors([trial], folder / "factors"), "cpu", None)
    made: set[str] = set()

    def score(point: dict[str, Any]) -> float:
        if str(point) not in made:
            made.add(str(point))
            merges.make(recipe.variant(trial.method, point))
        return 0.0

    search_grid(trial, score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the models are made; default: a temporary folder")
    parser.add_argument("--make", help="a point's place, or all: used by the script itself")
    arguments = parser.parse_args()
    recipe = cart_hf.Recipe.load(arguments.recipe)
    if arguments.make:
        make(recipe, int(arguments.make) if arguments.make.isdigit() else None, arguments.folder)
        return
    trial = recipe.tuned()
    ranks = trial.grid.get("rank_ratio", (None,))
    places = {str(rank): next(i for i, p in enumerate(trial.points) if p.get("rank_ratio") == rank) for rank in ranks}
    seconds: dict[str, list[float]] = {name: [] for name in (*places, "all")}
    for _ in range(arguments.rounds):
        for name, times in seconds.items():
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                what = str(places.get(name, "all"))
                run = measured([sys.executable, __file__, str(arguments.recipe), "--make", what, "--folder", folder])
            times.append(run["seconds"])
            print(f"{name}: {times[-1]:.1f} s, {size(run['peak_bytes'])}", file=sys.stderr, flush=True)
    found = {name: median(times) for name, times in seconds.items()}
    one = mean(found[name] for name in places)
    told = {
        "machine": machine(),
        "points": len(trial.points),
        "seconds": found,
        "all / mean of one": found["all"] / one,
    }
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
