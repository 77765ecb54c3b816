"""Slurm without a launcher: `srun python -m cart_hf ...` starts the processes and numbers them in words of its own."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_PORTS = range(15_000, 30_000)  # below those that the system gives to anyone who asks


def adopt(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say in a launcher's words (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` ...) what Slurm says of a step of tasks.

    Nothing happens where a launcher has spoken, and in a batch script: its ``SLURM_NTASKS`` is what it may start, and
    it is one process itself.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in environment or int(tasks) == 1:
        return
    environment["WORLD_SIZE"] = tasks
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    # two steps of one job may run at a time, and two jobs on one machine
    step = 31 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault("MASTER_PORT", str(_PORTS[step % len(_PORTS)]))
    environment.setdefault("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1"))


def first_host(nodes: str) -> str:
    """Return the first machine of a Slurm list, such as ``node[003-010,12],login``."""
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return nodes.partition(",")[0]
    numbers, _, suffix = rest.partition("]")
    first = numbers.partition(",")[0].partition("-")[0]
    return first_host(f"{prefix}{first}{suffix}")  # a name may have several brackets
