"""Run a command and print its wall time, CPU time and peak memory as JSON.

    {"seconds": 40.1, "cpu_seconds": 76.2, "peak_bytes": 892000000}

    python scripts/measure_command.py cart-hf merge recipe.yaml out

What the command prints goes to stderr. A process's peak memory as the kernel counts it starts at the peak of the one
that started it: start this with `subprocess`, not from a program that has grown, and its own few megabytes are all that
counts. Where a command starts processes of its own, the peaks of those that live together are added up (Linux).
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

INTERVAL = 0.1


def family(pid: int) -> list[int]:
    """Return a process and its descendants, as far as the kernel tells."""
    found = [pid]
    for threads in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            for child in threads.read_text().split():
                found += family(int(child))
    return found


def peak(pid: int) -> int:
    """Return the highest resident memory of a living process in bytes, 0 where the kernel does not tell."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def watch(pid: int, ended: threading.Event, sums: list[int]) -> None:
    """Note the summed peaks of the processes that a command started, until it ends."""
    while not ended.wait(INTERVAL):
        members = family(pid)
        if len(members) > 1:
            sums.append(sum(map(peak, members)))


def main() -> None:
    ended, sums = threading.Event(), [0]
    started = time.perf_counter()
    running = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
    watcher = threading.Thread(target=watch, args=(running.pid, ended, sums))
    watcher.start()
    code = running.wait()
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, largest = used.ru_utime + used.ru_stime, used.ru_maxrss * unit
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": max(largest, *sums)}))
    sys.exit(code)


if __name__ == "__main__":
    main()
