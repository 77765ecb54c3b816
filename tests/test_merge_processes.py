"""Several processes write what one writes, and fail together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import make_family
from commands import assert_absent, call, succeed
from merge_children import (
    Whole,
    command,
    contents,
    fork_launched,
    merge_and_look,
    start_slurm_step,
    undisturbed,
    words,
)
from safetensors.torch import load_file, save_file

from cart_hf.api import plan_merge
from cart_hf.errors import UserError
from cart_hf.merging import run
from cart_hf.merging.shares import pieces, share_of
from cart_hf.output.state import State, check_alike
from cart_hf.plan import Plan, lay_out
from cart_hf.processes import Processes, StoppedError
from cart_hf.recipe import recipe_from_flags
from cart_hf.slurm import adopt, first_host


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_family(folder, "roberta")
    return folder


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return undisturbed(models, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def plan(models: Path) -> Plan:
    folders = [str(models / f"task{i}") for i in range(3)]
    return plan_merge(recipe_from_flags({"base": str(models / "base"), "models": folders}, {}))


def spoil(folder: Path) -> None:
    """Put NaN into the last tensor of a model."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["roberta.embeddings.word_embeddings.weight"][-1, -1] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def test_num_processes(models: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command itself, with the summary printed once. (`test_torchrun` starts its processes afresh.)"""
    fork_launched(monkeypatch)
    answer = succeed(*words(models, tmp_path / "out", "--num-processes", 2))
    assert contents(tmp_path / "out") == whole("cart")
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["processes"] == 2
    assert answer.out.count("low-rank: 12 of 37 tensors") == 1
    assert answer.err == ""


def test_torchrun(models: Path, whole: Whole, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "cart_hf"]
    arguments = words(models, tmp_path / "out", "--method", "ties", "--format", "json", "--resume")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == whole("ties")
    assert json.loads(done.stdout)["processes"] == 2  # printed once


@pytest.mark.parametrize("method", ["cart", "ties", "dare"])
def test_a_step_of_slurm(models: Path, whole: Whole, tmp_path: Path, method: str) -> None:
    """``srun -n 2`` without a launcher."""
    children = start_slurm_step(tmp_path, command, *words(models, tmp_path / "out", "--method", method))
    main, other = (child.answer() for child in children)
    assert (main.code, other.code) == (0, 0), (main, other)
    assert contents(tmp_path / "out") == whole(method)
    assert "wrote" in main.out
    assert (main.err, other.out, other.err) == ("", "", "")


@pytest.mark.parametrize("method", ["cart", "ties"])
def test_a_mistake_that_one_process_finds(models: Path, tmp_path: Path, method: str) -> None:
    """All of them exit with 2, the first one says why, and nothing is left - whether in the merge or in a survey."""
    shutil.copytree(models, tmp_path / "models")
    spoil(tmp_path / "models" / "task1")
    arguments = words(tmp_path / "models", tmp_path / "out", "--method", method)
    main, other = (child.answer() for child in start_slurm_step(tmp_path, command, *arguments))
    assert (main.code, other.code) == (2, 2), (main, other)
    (message,) = main.errors
    assert "tensor 'embeddings.word_embeddings.weight' of task1" in message or "word_embeddings" in message
    assert "holds NaN" in message
    assert (main.out, other.out, other.err) == ("", "", "")
    assert_absent(tmp_path / "out")


def test_processes_that_read_different_files(models: Path, tmp_path: Path) -> None:
    """One path, another file or another version of a package on another machine; copies may be of different age."""
    shutil.copytree(models, tmp_path / "models")
    folders = [str(tmp_path / "models" / f"task{i}") for i in range(3)]
    path = tmp_path / "models" / "task2" / "model.safetensors"

    def state() -> State:
        plan = plan_merge(recipe_from_flags({"base": str(models / "base"), "models": folders}, {}))
        return State.of(plan, lay_out(plan), tmp_path / "out", {"device": "cpu"})

    first = state()
    os.utime(path)
    check_alike([first, state(), state()])
    save_file(load_file(path), path)  # without the metadata: another header
    with pytest.raises(UserError, match=r"task2: model.safetensors differs between processes 0 and 2"):
        check_alike([first, first, state()])
    older = replace(first, settings={**first.settings, "torch": "2.6.0"})
    with pytest.raises(UserError, match=r"process 0 has torch .*, process 1 has 2.6.0"):
        check_alike([first, older])


def test_a_dry_run_is_printed_once(models: Path, tmp_path: Path) -> None:
    children = start_slurm_step(tmp_path, command, *words(models, tmp_path / "out", "--dry-run"))
    main, other = (child.answer() for child in children)
    assert (main.code, other.code) == (0, 0), (main, other)
    assert "dry run: nothing was written" in main.out
    assert (other.out, other.err) == ("", "")


def test_a_launcher_and_num_processes(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = call(*words(models, tmp_path / "out", "--num-processes", 2))
    assert answer.code == 2
    assert "a launcher has started several processes already" in answer.errors[0]


def test_work_is_divided_by_cost(plan: Plan) -> None:
    """Every piece once, whatever the number of processes, and no process far behind."""
    work = list(pieces(plan))
    for count in (1, 2, 3, 50):
        shares = [share_of(work, rank, count) for rank in range(count)]
        assert sorted(span for share in shares for piece in share for span in piece.spans) == sorted(
            span for piece in work for span in piece.spans
        )
        loads = [sum(piece.cost for piece in share) for share in shares]
        assert max(loads) - min(loads) <= max(piece.cost for piece in work)


def test_the_others_stop_soon(plan: Plan) -> None:
    """A process that learns of another's failure leaves the rest of its share."""
    written: list[str] = []

    def check() -> None:
        if len(written) >= 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(
            plan,
            Processes(0, 1, torch.device("cpu")),
            lambda tensor, *_: written.append(tensor.name),
            workers=1,
            check=check,
        )
    assert len(written) == 3


STEP = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "node[003-010]"}


def test_what_slurm_says() -> None:
    """A step of several tasks is several processes; a batch script, a step of one and a launcher's child are not."""
    environment = dict(STEP)
    adopt(environment)
    said = {key: environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert said == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node003"}
    ports = set()
    for job, step in ((4711, 0), (4711, 1), (4712, 0)):
        environment = STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        adopt(environment)
        ports.add(int(environment["MASTER_PORT"]))
    assert len(ports) == 3
    assert all(1024 < port < 32768 for port in ports)
    for other in ({"SLURM_NTASKS": "8"}, STEP | {"SLURM_STEP_NUM_TASKS": "1"}, STEP | {"WORLD_SIZE": "2"}):
        environment = dict(other)
        adopt(environment)
        assert environment == other
    environment = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    adopt(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[003-010,12]", "node003"),
        ("node[7,9]-ib,login", "node7-ib"),
        ("login,node[1-3]", "login"),
        ("rack[2-3]n[08,10]", "rack2n08"),
    ],
)
def test_the_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_from_python(models: Path, whole: Whole, tmp_path: Path) -> None:
    """Every process calls it, and every process returns when the folder is there."""
    children = start_slurm_step(tmp_path, merge_and_look, models, tmp_path / "out")
    main, other = (child.answer() for child in children)
    assert (main.code, other.code) == (0, 0), (main, other)
    assert main.out == other.out == "37 True\n"
    assert contents(tmp_path / "out") == whole("cart")
