"""Commands in processes of their own, which may be killed: forked from one that has imported everything, they start at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from commands import Answer

import cart_hf

Whole = Callable[[str], dict[str, Any]]
CHILDREN = multiprocessing.get_context("forkserver")
PRELOADED = """
cart_hf.api cart_hf.cli.merge cart_hf.cli.console cart_hf.methods.cart accelerate.utils huggingface_hub.hf_api
transformers.models.roberta.modeling_roberta transformers.conversion_mapping
cart_hf.adaptation cart_hf.evaluation.api cart_hf.evaluation.metrics
"""
CHILDREN.set_forkserver_preload(PRELOADED.split())


def settings(models: Path, output: Path, method: str = "cart") -> dict[str, Any]:
    """Return a merge of the three models in ``models``, as arguments of ``cart_hf.merge``."""
    folders = [str(models / f"task{i}") for i in range(3)]
    return {"base": str(models / "base"), "models": folders, "output": output, "method": method, "device": "cpu"}


def words(models: Path, output: Path, *more: object) -> list[object]:
    """Return the same as a command line."""
    folders = [models / f"task{i}" for i in range(3)]
    return ["merge", "--base", models / "base", "--models", *folders, "--output", output, "--device", "cpu", *more]


def undisturbed(models: Path, folder: Path) -> Whole:
    """Return a function that tells what one process writes that nobody disturbs, by method."""

    @cache
    def merged(method: str) -> dict[str, Any]:
        output = folder / method / "out"  # the card says its name
        cart_hf.merge(**settings(models, output, method))
        return contents(output)

    return merged


@dataclass(frozen=True)
class Child:
    """A process that was started.

    :param out, err: where its output goes.
    """

    process: Any
    out: Path
    err: Path

    def answer(self) -> Answer:
        """Wait for its end. The exit code is negative when a signal was it."""
        self.process.join(60)
        assert self.process.exitcode is not None, "it is still running"
        return Answer(self.process.exitcode, self.out.read_text(), self.err.read_text())


def start(folder: Path, work: Callable[..., None], *arguments: Any, **environment: object) -> Child:
    """Start ``work(*arguments)`` in a process whose output goes into ``folder``."""
    number = len(list(folder.glob("*.err")))
    out, err = folder / f"{number}.out", folder / f"{number}.err"
    err.touch()
    caches = {key: os.environ[key] for key in ("HF_HOME", "CART_HF_CACHE") if key in os.environ}
    settings = {"OMP_NUM_THREADS": "1"} | caches | {key: str(value) for key, value in environment.items()}
    process = CHILDREN.Process(target=_run, args=(work, arguments, settings, out, err))
    process.start()
    return Child(process, out, err)


def start_slurm_step(folder: Path, work: Callable[..., None], *arguments: Any) -> list[Child]:
    """Start two processes as ``srun -n 2`` does."""
    job = time.time_ns() // 1_000_000  # the port that they meet at is made from it
    shared = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_NODELIST": "localhost"}
    return [start(folder, work, *arguments, **shared, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in (0, 1)]


def fork_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``--num-processes`` fork its processes from that one, too, where it would start each afresh."""
    from torch.distributed.launcher import api

    config = api.LaunchConfig
    monkeypatch.setattr(api, "LaunchConfig", lambda **given: config(**given | {"start_method": "forkserver"}))


def command(*words: object) -> None:
    """Be ``cart-hf WORDS``."""
    from cart_hf.cli import main

    sys.argv = ["cart-hf", *map(str, words)]
    main()


def merge_and_look(models: Path, output: Path) -> None:
    """Merge, and print what is known of it afterwards."""
    import cart_hf

    folders = [str(models / f"task{i}") for i in range(3)]
    result = cart_hf.merge(base=str(models / "base"), models=folders, output=output, device="cpu")
    print(len(result.plan.tensors), (result.output / "README.md").is_file(), flush=True)  # noqa: T201


def merge_and_die(after: int, arguments: dict[str, Any]) -> None:
    """Merge, and be killed when so many pieces are done."""
    import cart_hf

    done = 0

    def progress(step: str, advance: int, total: int) -> None:
        nonlocal done
        done += step == "merging"
        if done == after:
            os.kill(os.getpid(), signal.SIGKILL)

    cart_hf.merge(progress=progress, **arguments)


def merge_and_wait(ready: Path, go: Path, arguments: dict[str, Any]) -> None:
    """Merge, and stop at the third piece until a file appears."""
    import cart_hf

    done = 0

    def progress(step: str, advance: int, total: int) -> None:
        nonlocal done
        done += 1
        if done == 3:
            ready.touch()
            wait_for(go)

    cart_hf.merge(progress=progress, **arguments)


def wait_for(path: Path) -> None:
    """Wait until ``path`` exists."""
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise TimeoutError(path)


def contents(folder: Path) -> dict[str, Any]:
    """Return what lies in an output folder, without what may differ between two merges that wrote the same."""
    found: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
    record = json.loads(found["merge.json"])
    return found | {"merge.json": {key: record[key] for key in record if key not in ("seconds", "processes")}}


def _run(work: Callable[..., None], arguments: Any, settings: dict[str, str], out: Path, err: Path) -> None:
    os.environ.update(settings)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    work(*arguments)
