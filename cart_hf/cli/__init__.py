"""The command line: one file per verb, each a typed function of the Python API."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import NoReturn

import cyclopts

from cart_hf import __version__, slurm

# The verbs' modules import torch and transformers inside their functions: `--help` must not wait for them.
from cart_hf.cli.adapt import adapt
from cart_hf.cli.analyze import analyze
from cart_hf.cli.benchmark import benchmark
from cart_hf.cli.compress import compress
from cart_hf.cli.convert import convert
from cart_hf.cli.demo import demo
from cart_hf.cli.env import env
from cart_hf.cli.evaluate import evaluate
from cart_hf.cli.merge import merge
from cart_hf.cli.push import push
from cart_hf.cli.recipes import recipes
from cart_hf.cli.restore import restore
from cart_hf.cli.tasks import tasks
from cart_hf.cli.tune import tune
from cart_hf.errors import UserError

app = cyclopts.App(
    name="cart-hf",
    help="Merge fine-tuned Hugging Face models into one with CART, measure it, and keep every task's head.",
    help_epilogue="`cart-hf VERB --help` shows a verb's options and examples; start with `cart-hf demo`.",
    version=__version__,
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)
for verb in (
    merge,
    adapt,
    compress,
    restore,
    evaluate,
    benchmark,
    tune,
    analyze,
    push,
    convert,
    recipes,
    tasks,
    demo,
    env,
):
    app.command(verb)


def main() -> NoReturn:
    """Run the command line: exit 0 when done, 2 for the user's mistakes, 1 for anything else."""
    slurm.adopt()
    atexit.register(gc.freeze)  # Python's last look for garbage in torch takes a second, and finds nothing
    first = os.environ.get("RANK", "0") == "0"  # one of several processes speaks
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except UserError as failure:
        for problem in failure.problems if first else ():
            print(f"error: {problem}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except cyclopts.CycloptsError as failure:
        print(f"error: {' '.join(str(failure).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        if first:
            print("interrupted; nothing was written", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    sys.exit(0)
