"""The commands that `benchmark_merge.py` runs: how they are started and measured, and what cart-hf plans to do."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from cart_hf import __version__
from cart_hf.cli.console import size
from cart_hf.output.record import versions
from cart_hf.parallel import cores

HERE = Path(__file__).parent
RATIO, SCALE = 0.08, 1.5
CART = ["--method", "cart", "--rank-ratio", str(RATIO), "--scale", str(SCALE)]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def surroundings() -> dict[str, str]:
    """Return the environment, but for what would keep a command from all cores."""
    return {name: value for name, value in os.environ.items() if name not in THREADS}


def measured(command: list[str]) -> dict[str, float]:
    """Run a command with all cores from a small process; return ``seconds`` and ``peak_bytes``."""
    words = [sys.executable, str(HERE / "measure_command.py"), *command]
    done = subprocess.run(words, env=surroundings(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-4000:]}\nended with exit code {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def merge_command(base: Path, models: list[Path], flags: list[str]) -> list[str]:
    """Return the command line of a merge; the output is to follow."""
    merge = [sys.executable, "-m", "cart_hf", "merge", "--base", str(base), "--models", *map(str, models)]
    return [*merge, *flags, "--output"]


def product_rates() -> dict[str, float]:
    """Return this machine's rates of matrix products in float32 and float64, operations a second, on all cores."""
    words = [sys.executable, str(HERE / "merge_peers.py"), "products"]
    done = subprocess.run(words, env=surroundings(), check=True, stdout=subprocess.PIPE, text=True)
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


def planned(base: Path, models: list[Path], flags: list[str]) -> dict[str, Any]:
    """Return the plan that a dry run prints."""
    command = [*merge_command(base, models, flags)[:-1], "--dry-run", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def flops(plan: Mapping[str, Any]) -> float:
    """Return the operations that CART needs by Gram matrices: product, tridiagonal form, eigenvectors, projections."""
    total = 0.0
    for group in plan["groups"]:
        if group["role"] == "low_rank":
            n, m = sorted(group["shape"])
            k = int(group["rank"].partition("-")[0])
            total += group["count"] * group["models"] * (n * n * m + 4 / 3 * n**3 + 2 * n * n * k + 4 * n * m * k)
    return total


def weight_files(folder: Path) -> dict[str, int]:
    """Return a checkpoint's weight files and their bytes."""
    return {str(path): path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def machine() -> dict[str, str]:
    """Return what this was measured on, for people."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": f"{cores()} cores",
        "memory": size(psutil.virtual_memory().total),
        "cart-hf": f"cart-hf {__version__}",
        **{name: f"{name} {version}" for name, version in versions().items()},
    }
