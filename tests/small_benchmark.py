"""A small world for what compares merges: three tasks, a model for each, examples and a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from checkpoints import make_family
from datasets import ClassLabel, Dataset, Features, Value
from small_tasks import save_tokenizer

TASKS = ("red", "green", "blue")
WORDS = ("one", "two", "three", "four", "five", "six", "seven")


def make_world(folder: Path) -> dict[str, Path]:
    """Make a base, a model for each task, and examples whose labels the models half agree with; return the models."""
    base, models = make_family(folder, "roberta")
    save_tokenizer("roberta", base, *models)
    for number, task in enumerate(TASKS):
        names = [f"label {i}" for i in range(number + 2)]
        features = Features({"sentence": Value("string"), "label": ClassLabel(names=names)})
        for split, count in (("validation", 12), ("test", 25)):
            texts = [" ".join(WORDS[(i * j + number) % 7] for j in range(1, 2 + i % 5)) for i in range(count)]
            rows = {"sentence": texts, "label": [(i * 7 + number) % (number + 2) for i in range(count)]}
            (folder / "data" / task).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / task / f"{split}.parquet")
    task = {"kind": "text-classification", "text": ["sentence"], "label_mapping": "index"}
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {name: dict(task) for name in TASKS}}))
    return {"base": base, **dict(zip(TASKS, models, strict=True))}


def recipe_of(folder: Path, family: Mapping[str, Path]) -> dict[str, Any]:
    """Return a recipe of CART for the three models, which is evaluated on the test split."""
    return {
        "merge_method": "cart",
        "base_model": str(family["base"]),
        "models": [{"model": str(family[name]), "name": name} for name in TASKS],
        "parameters": {"rank": 2},
        "evaluation": {
            "tasks": list(TASKS),
            "tasks_file": str(folder / "tasks.yaml"),
            "data": str(folder / "data"),
            "split": "test",
        },
    }
