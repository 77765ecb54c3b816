"""What every test needs: no network, and the markers' reasons for skipping."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    reasons = {
        "hub": None if os.environ.get("CART_HF_TEST_HUB") == "1" else "needs the real Hub: set CART_HF_TEST_HUB=1",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA GPU, and this machine has none",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the cache of `cart_hf` out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CART_HF_CACHE", str(tmp_path_factory.mktemp("cart_hf")))
        yield


@pytest.fixture(scope="session")
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the caches of `datasets` and `evaluate` out of the user's home."""
    import datasets
    import evaluate

    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder))  # for processes that are started; this one has read it already
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        yield
