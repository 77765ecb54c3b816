"""Python code run in a process of its own that need not import torch again.

A server, started once, imports the large libraries that read none of the Hub's settings, and forks for each piece of code;
cart_hf and what it asks the Hub with (huggingface_hub, transformers, datasets, PEFT) are imported by the new process, as in
any other, under its own environment.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

SERVER = """
import gc, importlib.util, json, os, signal, sys
# each is a part of a second, or two, of every process that works with models
LARGE = ["torch._dynamo", "torch.distributed.tensor", "pandas", "pyarrow.dataset", "sklearn.metrics", "scipy.stats"]
for name in [*LARGE, "jinja2", "cyclopts", "pydantic", "requests", "fsspec", "PIL.Image", "tokenizers"]:
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)
readers = {"cart_hf", "huggingface_hub", "transformers", "datasets", "evaluate", "accelerate", "peft"} & set(sys.modules)
assert not readers, f"imported before the settings are known: {readers}"
gc.freeze()  # or every child, when it ends, looks for garbage in all of this for more than a second
for line in sys.stdin:
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
job = json.loads(line)
for place, path in enumerate((os.devnull, job["out"], job["err"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), place)
sys.stdin = open(os.devnull)
signal.alarm(300)
os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["environment"])
sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
sys.argv = ["-c", *job["arguments"]]
exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
"""


@cache
def server() -> subprocess.Popen[str]:
    """Start the server; it ends when this process does, or lets go of its end of the pipe."""
    # a process that has looked for GPUs by CUDA itself cannot be forked into one that uses them
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = subprocess.Popen([sys.executable, "-c", SERVER], env=settings, **pipes)
    atexit.register(started.communicate)
    return started


def run_python(
    code: str, *arguments: str, environment: Mapping[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run ``python -c CODE ARGUMENTS`` in a new process with nothing but this environment.

    :return: its exit code and what it printed; after 300 seconds SIGALRM ends it.
    """
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        job = {"code": code, "arguments": arguments, "environment": dict(environment), "cwd": str(cwd)}
        print(json.dumps(job | {"out": str(out), "err": str(err)}), file=server().stdin, flush=True)
        answer = server().stdout.readline()
        return subprocess.CompletedProcess(code, int(answer), out.read_text(), err.read_text())
