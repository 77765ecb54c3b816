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

# the files that take longest come first, or one worker ends alone with one of them
LONGEST = ("adapt_runs", "bad_input", "merge_processes", "push", "adapt", "scripts", "demo", "benchmark", "tune")
ORDER = {f"test_{name}": place for place, name in enumerate(LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch
    from browser import find_browser

    reasons = {
        "hub": None if os.environ.get("CART_HF_TEST_HUB") == "1" else "needs the real Hub: set CART_HF_TEST_HUB=1",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA GPU, and this machine has none",
        "browser": None if find_browser() else "needs Chromium: install it, or set CART_HF_TEST_BROWSER to its program",
    }
    items.sort(key=lambda item: ORDER.get(item.path.stem, len(ORDER)))
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the caches of `cart_hf`, and all those of processes that are started, out of the user's home."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CART_HF_CACHE", str(folder / "cart_hf"))
        patch.setenv("HF_HOME", str(folder))  # this process has read it already
        yield folder


@pytest.fixture(scope="session")
def own_caches(cache_folder: Path) -> Iterator[None]:
    """Keep the caches of `datasets` and `evaluate` out of the user's home."""
    import datasets
    import evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_folder / "datasets")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", cache_folder / "metrics")
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", cache_folder / "modules")
        yield
