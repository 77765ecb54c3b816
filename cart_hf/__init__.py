"""cart-hf: merge fine-tuned Hugging Face encoders into one multi-task model with CART."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cart_hf.analysis import Analysis, analyze
    from cart_hf.api import MergeResult, merge
    from cart_hf.benchmarking.run import BenchmarkResult, benchmark
    from cart_hf.compression import Compressed, Masked, compress, restore
    from cart_hf.errors import UserError
    from cart_hf.evaluation.api import evaluate
    from cart_hf.evaluation.results import Results
    from cart_hf.publishing import Pushed, push
    from cart_hf.recipe import Evaluation, Recipe
    from cart_hf.serving.multitask import MultiTaskModel
    from cart_hf.tuning import Tuned, tune

__all__ = [
    "Adapted",
    "Analysis",
    "BenchmarkResult",
    "Compressed",
    "Evaluation",
    "Masked",
    "MergeResult",
    "MultiTaskModel",
    "Pushed",
    "Recipe",
    "Results",
    "Tuned",
    "UserError",
    "__version__",
    "adapt",
    "analyze",
    "benchmark",
    "compress",
    "evaluate",
    "merge",
    "push",
    "restore",
    "tune",
]

_HOMES = {
    "adapt": "cart_hf.adaptation",
    "Adapted": "cart_hf.adaptation",
    "analyze": "cart_hf.analysis",
    "Analysis": "cart_hf.analysis",
    "benchmark": "cart_hf.benchmarking.run",
    "BenchmarkResult": "cart_hf.benchmarking.run",
    "compress": "cart_hf.compression",
    "Compressed": "cart_hf.compression",
    "Masked": "cart_hf.compression",
    "Evaluation": "cart_hf.recipe",
    "Results": "cart_hf.evaluation.results",
    "evaluate": "cart_hf.evaluation.api",
    "merge": "cart_hf.api",
    "MergeResult": "cart_hf.api",
    "MultiTaskModel": "cart_hf.serving.multitask",
    "push": "cart_hf.publishing",
    "Pushed": "cart_hf.publishing",
    "Recipe": "cart_hf.recipe",
    "restore": "cart_hf.compression",
    "tune": "cart_hf.tuning",
    "Tuned": "cart_hf.tuning",
    "UserError": "cart_hf.errors",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: ``import cart_hf`` must not cost a torch import."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cart_hf' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
