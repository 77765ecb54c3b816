"""Merge 8 checkpoints of real size, load the result in plain transformers, and compare it with a float64 SVD.

    python scripts/check_real_size.py --work /tmp/real-size            # both shapes, about 8 GB of disk
    python scripts/check_real_size.py --work /tmp/real-size --shape vit-b32 --models 4

The checkpoints are built from the configurations of openai/clip-vit-base-patch32 and FacebookAI/roberta-base with
random weights; each fine-tune adds an update whose singular values fall as i^-0.6 over a Gaussian bulk, about 2 % of
the weights' norm, as real fine-tunes do. Prints a Markdown row for each merge: wall time, the process's peak memory,
and the worst error of the merged update over sampled matrices.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

RATIO, SCALE = 0.08, 1.5
METHODS = {
    "cart": ["--method", "cart", "--rank-ratio", str(RATIO), "--scale", str(SCALE)],
    "average": ["--method", "average"],
    "task_arithmetic": ["--method", "task_arithmetic", "--scale", "0.3"],
    "ties": ["--method", "ties", "--density", "0.2"],
}
SAMPLED = {
    "vit-b32": [
        f"vision_model.encoder.layers.{layer}.{module}.weight"
        for layer in (0, 7)
        for module in ("self_attn.q_proj", "mlp.fc1", "mlp.fc2")
    ],
    "roberta-base": [
        f"encoder.layer.{layer}.{module}.weight"
        for layer in (2, 11)
        for module in ("attention.self.value", "intermediate.dense", "output.dense")
    ],
}
# A child's peak memory as the kernel counts it starts at its parent's: measure from a parent that is small.
MEASURE = """
import resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def main() -> None:
    """Build, merge, load and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and merges")
    parser.add_argument("--shape", choices=[*SAMPLED, "all"], default="all")
    parser.add_argument("--models", type=int, default=8)
    arguments = parser.parse_args()
    print("| shape | method | wall s | peak RSS MB | worst error of the update |")
    print("|---|---|---|---|---|")
    for shape in SAMPLED if arguments.shape == "all" else [arguments.shape]:
        base, models = build(arguments.work / shape, shape, arguments.models)
        for method, flags in METHODS.items():
            output = arguments.work / shape / f"merged-{method}"
            seconds, peak = timed_merge(base, models, output, flags)
            error = f"{worst_error(shape, base, models, output):.1e}" if method == "cart" else ""
            print(f"| {shape} | {method} | {seconds:.1f} | {peak:.0f} | {error} |", flush=True)


def build(folder: Path, shape: str, count: int) -> tuple[Path, list[Path]]:
    """Write the base and the fine-tuned models, unless they are there."""
    base, models = folder / "base", [folder / f"task{i}" for i in range(count)]
    torch.manual_seed(0)
    if shape == "vit-b32":
        whole = CLIPModel(CLIPConfig())
        save(whole, base)
        backbone: PreTrainedModel = whole.vision_model
    else:
        masked = RobertaForMaskedLM(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1))
        save(masked, base)
        backbone = masked.roberta
    for task, path in enumerate(models):
        if not (path / "model.safetensors").exists():
            save(fine_tuned(backbone, task), path)
    return base, models


def save(model: PreTrainedModel, path: Path) -> None:
    """Save a checkpoint unless it exists."""
    if not (path / "model.safetensors").exists():
        model.save_pretrained(path)


def fine_tuned(backbone: PreTrainedModel, task: int) -> PreTrainedModel:
    """Return a model of its task class whose backbone is the base's plus a realistic update."""
    if isinstance(backbone, CLIPVisionModel):
        model: PreTrainedModel = CLIPVisionModel(backbone.config)
        target: PreTrainedModel = model
    else:
        model = RobertaForSequenceClassification(backbone.config.__class__(**backbone.config.to_dict()))
        target = model.base_model
    target.load_state_dict(backbone.state_dict())
    generator = torch.Generator().manual_seed(task + 1)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(update(parameter.shape, generator), alpha=0.02 * float(parameter.std(correction=0)))
    return model


def update(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return a random update of unit root mean square: a power law over a Gaussian bulk for matrices."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) != 2 or min(shape) < 64:
        return noise
    k = 128
    left, right = torch.randn(shape[0], k, generator=generator), torch.randn(k, shape[1], generator=generator)
    signal = (left * torch.arange(1, k + 1) ** -0.6) @ right
    return 0.95 * signal / signal.std() + 0.3 * noise


def timed_merge(base: Path, models: list[Path], output: Path, flags: list[str]) -> tuple[float, float]:
    """Run the command line as a user does; return wall seconds and the process's peak memory in MB."""
    merge = [sys.executable, "-m", "cart_hf", "merge", "--base", str(base), "--models", *map(str, models)]
    command = [sys.executable, "-c", MEASURE, *merge, "--output", str(output), "--overwrite", *flags]
    seconds, peak = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    unit = 1 if sys.platform == "darwin" else 1024
    return float(seconds), float(peak) * unit / 1e6


def worst_error(shape: str, base: Path, models: list[Path], output: Path) -> float:
    """Compare sampled matrices with the definition in float64; the merge must also load cleanly."""
    merged, info = AutoModel.from_pretrained(output, output_loading_info=True)
    unexpected = [key for key in (*info["missing_keys"], *info["unexpected_keys"]) if "pooler" not in key]
    if unexpected:
        raise SystemExit(f"the merged folder does not load cleanly: {unexpected}")
    prefix = "vision_model." if shape == "vit-b32" else ""
    states = [AutoModel.from_pretrained(path).state_dict() for path in models]
    errors = []
    for name in SAMPLED[shape]:
        stack = np.stack([state[name.removeprefix(prefix)].double().numpy() for state in states])
        centre = stack.mean(axis=0)
        k = max(1, int(RATIO * min(centre.shape)))
        truth = SCALE * sum(truncated(matrix - centre, k) for matrix in stack)
        got = merged.state_dict()[name].double().numpy() - centre
        errors.append(np.linalg.norm(got - truth) / np.linalg.norm(truth))
    return float(max(errors))


def truncated(matrix: np.ndarray, k: int) -> np.ndarray:
    """Return the best rank-k approximation by a full SVD."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    result: np.ndarray = (u[:, :k] * s[:k]) @ vt[:k]
    return result


if __name__ == "__main__":
    main()
