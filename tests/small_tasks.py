"""Small tasks for the tests: texts of random letters, random images, and tokenizers and processors to read them."""

from __future__ import annotations

import io
import random
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from PIL import Image
from transformers import BertTokenizer, CLIPTokenizer, GPT2Tokenizer, RobertaTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

LETTERS = string.ascii_lowercase
datasets.disable_progress_bars()


def save_tokenizer(family: str, *folders: Path | str) -> None:
    """Write a tokenizer that reads letter by letter and fits the checkpoints of ``make_family`` and ``make_clip``.

    Like many a tokenizer on the Hub it says nothing of the longest text that the model can read.
    """
    if family == "bert":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
        tokenizer = BertTokenizer(vocab=_numbered(words))
    elif family == "roberta":
        words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *LETTERS]
        tokenizer = RobertaTokenizer(vocab=_numbered(words), merges=[])
    elif family == "gpt2":
        tokenizer = GPT2Tokenizer(vocab=_numbered(["<|endoftext|>", "Ġ", *LETTERS]), merges=[])
    else:
        words = ["!", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
        tokenizer = CLIPTokenizer(vocab=_numbered(words) | {"<|startoftext|>": 57, "<|endoftext|>": 58}, merges=[])
    for folder in folders:
        tokenizer.save_pretrained(folder)


def save_processor(family: str, *folders: Path | str) -> None:
    """Write an image processor for the 16 x 16 images that the small checkpoints read."""
    size = {"height": 16, "width": 16}
    if family == "clip":
        processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    else:
        processor = ViTImageProcessorPil(size=size)
    for folder in folders:
        processor.save_pretrained(folder)


def texts(count: int, seed: int, longest: int = 4) -> list[str]:
    """Return texts of one to ``longest`` words of random letters."""
    rng = random.Random(seed)
    return [
        " ".join("".join(rng.choices(LETTERS, k=rng.randint(1, 4))) for _ in range(rng.randint(1, longest)))
        for _ in range(count)
    ]


def numbers(count: int, below: int, seed: int) -> list[int]:
    """Return random labels, each of which occurs."""
    rng = random.Random(seed)
    return [*range(below), *(rng.randrange(below) for _ in range(count - below))]


def image_bytes(seed: int, size: tuple[int, int] = (20, 18)) -> bytes:
    """Return a PNG file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def images(count: int, seed: int, broken: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Return encoded images, those in ``broken`` cut off in the middle."""
    files = [image_bytes(seed * 1000 + i) for i in range(count)]
    return [{"bytes": file[:60] if i in broken else file, "path": None} for i, file in enumerate(files)]


def dataset(columns: Mapping[str, Sequence[Any]], **features: Any) -> datasets.Dataset:
    """Return a dataset; ``features`` are those that `datasets` would not guess: names of labels, an image."""
    found = datasets.Dataset.from_dict(dict(columns))
    given = {
        key: datasets.ClassLabel(names=value) if isinstance(value, list) else value for key, value in features.items()
    }
    return found.cast(datasets.Features(dict(found.features) | given))


def write_split(folder: Path, split: str, columns: Mapping[str, Sequence[Any]], **features: Any) -> Path:
    """Write ``folder/SPLIT.parquet``."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset(columns, **features).to_parquet(folder / f"{split}.parquet")
    return folder / f"{split}.parquet"


def write_tasks(path: Path, **tasks: Mapping[str, Any]) -> Path:
    """Write a tasks file."""
    path.write_text(yaml.safe_dump({"tasks": tasks}, sort_keys=False), encoding="utf-8")
    return path


def _numbered(words: Sequence[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}
