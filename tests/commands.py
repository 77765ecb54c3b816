"""The command line called in this process, so that a test does not pay for importing torch again; and in another one."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from warm_python import run_python

from cart_hf.cli import main

# Runs every command line of argv[1] as `cart-hf` would, with KEY=VALUE words before the verb in its environment.
# Nobody waits long between two tries to reach a hub.
DRIVER = """
import io, json, os, sys, time, traceback
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 50)
sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
from cart_hf.cli import main
answers = []
for words in json.loads(sys.argv[1]):
    while "=" in words[0]:
        key, _, value = words.pop(0).partition("=")
        os.environ[key] = value
    sys.argv = ["cart-hf", *words]
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    answers.append([code, sys.stdout.getvalue(), sys.stderr.getvalue()])
    for stream in (sys.stdout, sys.stderr):
        stream.seek(0)
        stream.truncate()
print(json.dumps(answers), file=sys.__stdout__)
"""


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Its error messages, one per line."""
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def call(*args: object, terminal: bool = False) -> Answer:
    """Run ``cart-hf ARGS``: exit code, stdout and stderr. An exception that would be a traceback is raised.

    :param terminal: whether stderr is a terminal.
    """
    out, err = io.StringIO(), Terminal() if terminal else io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["cart-hf", *map(str, args)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit_:
            return Answer(int(exit_.code or 0), out.getvalue(), err.getvalue())


def succeed(*args: object) -> Answer:
    """Run a command that must exit with 0 and report no error."""
    answer = call(*args)
    assert answer.code == 0, answer
    assert not answer.errors, answer
    return answer


def refuse(output: Path, *args: object, naming: tuple[str, ...] | list[str] = (), count: int = 1) -> list[str]:
    """Run a command that must refuse: exit 2, ``count`` messages of one line each, and nothing written.

    :param output: the output folder; it must not appear, nor a work folder beside it.
    :param naming: what the messages, joined, must say.
    """
    answer = call(*args)
    assert answer.code == 2, answer
    assert len(answer.errors) == count, answer
    assert all(line.startswith("error: ") for line in answer.err.splitlines()), f"not one line each: {answer.err}"
    assert answer.out == "", answer
    text = "\n".join(answer.errors)
    assert not [words for words in naming if words not in text], text
    assert_absent(output)
    return answer.errors


def assert_absent(output: Path) -> None:
    """Assert that neither ``output`` nor a work folder beside it exists."""
    assert not output.exists()
    assert not leftovers(output)


def leftovers(output: Path) -> list[Path]:
    """Return the work folders that a merge to ``output`` left behind."""
    return [path for path in output.parent.glob(".*") if path.suffix in (".partial", ".old")]


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """Return an environment whose Hub is ``endpoint`` and whose caches are in ``home``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    ours |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1"}
    return kept | ours | {"PYTHONPATH": str(Path(__file__).parents[1])} | more


def run_cli(commands: list[list[str]], endpoint: str, home: Path, **more: str) -> list[Answer]:
    """Run command lines one after the other in one new process."""
    done = run_python(DRIVER, json.dumps(commands), environment=environment(endpoint, home, **more), cwd=home.parent)
    assert done.returncode == 0, done.stderr
    return [Answer(*answer) for answer in json.loads(done.stdout.splitlines()[-1])]
