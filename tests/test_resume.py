"""A merge that was killed goes on with `--resume` and ends with the same bytes, or says why it cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_family
from commands import assert_absent, call, leftovers, refuse, succeed
from merge_children import (
    Whole,
    command,
    contents,
    merge_and_die,
    merge_and_wait,
    settings,
    start,
    start_slurm_step,
    undisturbed,
    wait_for,
    words,
)  # fmt: skip

import cart_hf
from cart_hf.cli.console import Bars
from cart_hf.output import unfinished

PIECES = 37  # one for each tensor of the small model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_family(folder, "roberta")
    return folder


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return undisturbed(models, tmp_path_factory.mktemp("whole"))


def kill(models: Path, output: Path, after: int = 10, **more: Any) -> Path:
    """Start a merge, kill it when so many pieces are done, and return the work folder that it left."""
    child = start(output.parent, merge_and_die, after, settings(models, output, **more))
    assert child.answer().code == -signal.SIGKILL
    (left,) = unfinished(output)
    return left


def lines(left: Path) -> list[Any]:
    return [json.loads(line) for path in left.glob("*.jsonl") for line in path.read_text().splitlines()]


def resume(models: Path, output: Path, method: str = "cart") -> int:
    """Continue, and return how many pieces that took."""
    taken = []

    def progress(step: str, advance: int, total: int) -> None:
        taken.append(step)

    cart_hf.merge(**settings(models, output, method), resume=True, progress=progress)
    assert not leftovers(output)
    return taken.count("merging")


@pytest.mark.parametrize(("method", "after"), [("cart", 1), ("cart", 20), ("cart", PIECES), ("ties", 5), ("dare", 36)])
def test_killed_at_any_moment(models: Path, whole: Whole, tmp_path: Path, method: str, after: int) -> None:
    """Down to the last piece, and with nothing but the rest left to do."""
    left = kill(models, tmp_path / "out", after, method=method)
    assert not (tmp_path / "out").exists()
    done = len(lines(left))
    assert done >= after
    assert resume(models, tmp_path / "out", method) == PIECES - done
    assert contents(tmp_path / "out") == whole(method)


def test_killed_again_and_again(models: Path, whole: Whole, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for _ in range(3):
        child = start(tmp_path, merge_and_die, 6, settings(models, output) | {"resume": True, "workers": 1})
        assert child.answer().code == -signal.SIGKILL
    (left,) = unfinished(output)
    assert len(list(left.glob("*.jsonl"))) == 3
    done = len(lines(left))
    assert 18 <= done < PIECES
    succeed(*words(models, output, "--resume", "--workers", 1))
    assert contents(output) == whole("cart")


def test_two_processes_go_on_where_one_was_killed(models: Path, whole: Whole, tmp_path: Path) -> None:
    """And one where two were."""
    kill(models, tmp_path / "out")
    answers = [
        child.answer() for child in start_slurm_step(tmp_path, command, *words(models, tmp_path / "out", "--resume"))
    ]
    assert [answer.code for answer in answers] == [0, 0], answers
    assert contents(tmp_path / "out") == whole("cart")

    again = tmp_path / "again" / "out"
    again.parent.mkdir()
    killed, bereft = (child.answer() for child in start_slurm_step(tmp_path, merge_and_die, 4, settings(models, again)))
    assert (killed.code, bereft.code) == (-signal.SIGKILL, 1)
    (left,) = unfinished(again)
    assert len([path for path in left.glob("*.jsonl") if path.stat().st_size]) == 2
    done = len(lines(left))
    assert resume(models, again) == PIECES - done
    assert contents(again) == whole("cart")


def test_what_the_disk_lost_is_done_again(models: Path, whole: Whole, tmp_path: Path) -> None:
    """After a loss of power: bytes that never reached the disk, a line cut off, and rubbish."""
    left = kill(models, tmp_path / "out", 20)
    done = {name for name, *_ in lines(left)}
    (journal,) = left.glob("*.jsonl")
    text = journal.read_bytes()
    cut = text.splitlines()[-1]
    journal.write_bytes(text[: -len(cut) // 2] + b"\0\0\0\n" + b'["no such tensor", 0, 5, 1]\n5\n["x"]\n')
    weights = left / "output" / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.seek(size - 4000)
        file.write(bytes(4000))
    assert resume(models, tmp_path / "out") > PIECES - len(done)
    assert contents(tmp_path / "out") == whole("cart")


def test_nothing_to_resume(models: Path, whole: Whole, tmp_path: Path) -> None:
    """A job that is queued again can always say --resume."""
    assert succeed(*words(models, tmp_path / "out", "--resume")).err == ""
    assert contents(tmp_path / "out") == whole("cart")


def test_a_changed_source_is_refused(models: Path, whole: Whole, tmp_path: Path) -> None:
    mine = tmp_path / "models"
    shutil.copytree(models, mine)
    output = tmp_path / "out"
    left = kill(mine, output)
    weights = mine / "task1" / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    os.utime(weights, ns=(times[0], times[1] + 1))
    answer = call(*words(mine, output, "--resume"))
    assert answer.code == 2
    assert answer.errors == [
        "--resume: task1: model.safetensors has changed since the merge was interrupted: bring it back, "
        "or leave out --resume to start afresh"
    ]
    assert left.is_dir()
    os.utime(weights, ns=times)
    assert resume(mine, output) < PIECES
    assert {k: v for k, v in contents(output).items() if k.endswith("safetensors")} == {
        k: v for k, v in whole("cart").items() if k.endswith("safetensors")
    }


def test_other_settings_are_refused(models: Path, tmp_path: Path) -> None:
    """All that differ, each with both values; how many workers does not matter."""
    output = tmp_path / "out"
    left = kill(models, output)
    answer = call(*words(models, output, "--resume", "--scale", 1.5, "--seed", 3, "--workers", 1))
    assert answer.code == 2
    assert answer.errors == [
        "--resume: parameters.scale was 1.0, is 1.5, seed was not given, is 3: give the same settings, "
        "or leave out --resume to start afresh"
    ]
    state = json.loads((left / "state.json").read_text())
    state["settings"]["torch"] = "1.0"
    (left / "state.json").write_text(json.dumps(state))
    answer = call(*words(models, output, "--resume"))
    assert "torch was 1.0, is" in answer.errors[0]
    assert left.is_dir()


def test_starting_afresh(models: Path, whole: Whole, tmp_path: Path) -> None:
    """What was left is told of, stays while the new merge may fail, and goes when that has succeeded."""
    output = tmp_path / "out"
    left = kill(models, output)
    refused = call(*words(models, output, "--scale", "1e38", "--out-dtype", "float16"))
    assert refused.code == 2
    assert leftovers(output) == [left]
    told = succeed(*words(models, output))
    assert "interrupted: --resume would continue it" in told.err
    assert not leftovers(output)
    assert contents(output) == whole("cart")


def test_a_living_merge_is_left_alone(models: Path, whole: Whole, tmp_path: Path) -> None:
    """Neither continued nor removed, nor are the leftovers of another target whose name begins alike."""
    output, ready, go = tmp_path / "out", tmp_path / "ready", tmp_path / "go"
    other = kill(models, tmp_path / "out.v2")
    living = start(tmp_path, merge_and_wait, ready, go, settings(models, output))
    wait_for(ready)
    (folder,) = set(leftovers(output)) - {other}
    succeed(*words(models, output, "--resume"))
    assert contents(output) == whole("cart")
    succeed(*words(models, output, "--overwrite"))
    assert set(leftovers(output)) == {folder, other}
    go.touch()
    answer = living.answer()
    assert "exists; choose another output" in answer.err
    assert leftovers(output) == [other]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError("a bug")])
def test_interrupted_after_some_pieces(
    models: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Any
) -> None:
    """What was finished is kept, and the last line says how to go on; before the first piece there is nothing to keep."""

    def fail_at(count: int) -> Callable[..., None]:
        calls = []

        def advance(*_: object) -> None:
            calls.append(1)
            if len(calls) == count:
                raise failure

        return advance

    with monkeypatch.context() as patch:
        patch.setattr(Bars, "__call__", fail_at(5))
        if failure is KeyboardInterrupt:
            answer = call(*words(models, tmp_path / "out"))
            assert (answer.code, answer.err) == (130, "interrupted; the same command with --resume continues\n")
        else:
            with pytest.raises(RuntimeError, match="a bug"):
                call(*words(models, tmp_path / "out"))
    assert unfinished(tmp_path / "out")
    succeed(*words(models, tmp_path / "out", "--resume"))
    assert contents(tmp_path / "out") == whole("cart")


def test_killed_at_the_very_end(models: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, links and configurations are written again."""

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr("cart_hf.api.write_card", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            cart_hf.merge(**settings(models, tmp_path / "out"))
    (left,) = unfinished(tmp_path / "out")
    assert (left / "output" / "tasks" / "task0" / "backbone.safetensors").is_file()
    assert resume(models, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == whole("cart")


def test_a_mistake_leaves_nothing(models: Path, tmp_path: Path) -> None:
    """The user's own mistakes are found again: there is nothing to continue."""
    arguments = words(models, tmp_path / "out", "--scale", "1e38", "--out-dtype", "float16", "--workers", 1)
    refuse(tmp_path / "out", *arguments, naming=["do not fit F16"])
    assert_absent(tmp_path / "out")
