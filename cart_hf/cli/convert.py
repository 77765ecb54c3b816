"""`cart-hf convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def convert(
    sources: Annotated[list[str], Parameter(consume_multiple=True, negative=())],
    /,
    *,
    output: Path,
    base: str | None = None,
    vision_only: Annotated[bool, Parameter(negative=())] = False,
    activation: Literal["quick_gelu", "gelu"] | None = None,
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    format: Literal["human", "json"] = "human",
) -> None:
    """Convert open_clip checkpoints to transformers' CLIP, ready to merge.

    For the files of the papers (Task Arithmetic, TALL-masks, CART): pickles of an image encoder, whole modules or
    state dicts. They are read by a restricted unpickler: nothing in them is run.

    **Examples**

    ```text
    cart-hf convert MNISTVal/nonlinear_finetuned.pt --output mnist --base openai/clip-vit-base-patch32
    cart-hf convert checkpoints/ViT-B-32 --output converted --base openai/clip-vit-base-patch32
    cart-hf convert nik-dim/tall_masks/single_task/ViT-B-32 --output tall --base openai/clip-vit-base-patch32
    cart-hf merge --base openai/clip-vit-base-patch32 --models tall/{mnist,svhn,dtd} --fuse-qkv --output merged
    ```

    Parameters
    ----------
    sources:
        Files, folders, or Hub repositories (`org/name`, `org/name/folder`, `org/name/folder/file.pt`).
    output:
        The folder to write: the model itself for one file, else one folder per file, named after the data set.
    base:
        The pretrained CLIP: gives configuration, processor, tokenizer, and the text tower that image encoders lack.
    vision_only:
        Write vision towers and projections only: smaller, faster to merge; `merge` takes the rest from its base.
    activation:
        For state dicts, which do not say: quick_gelu (default, OpenAI's weights) or gelu (weights open_clip trained).
    dtype:
        Type of the output's tensors; default: the file's.
    overwrite:
        Replace earlier conversions.
    format:
        What stdout gets: a line per model, or JSON.
    """
    import cart_hf.conversion
    from cart_hf.cli.console import out, progress_bars, quiet_libraries, warn

    quiet_libraries()
    with progress_bars() as bars:
        converted = cart_hf.conversion.convert(
            sources,
            output,
            base,
            vision_only=vision_only,
            activation=activation,
            dtype=dtype,
            overwrite=overwrite,
            progress=bars,
        )
    for model in converted:
        for warning in model.warnings:
            warn(warning)
    if format == "json":
        models = [{"folder": str(model.folder), **model.record} for model in converted]
        print(json.dumps(models, indent=2, ensure_ascii=False))  # noqa: T201
        return
    for model in converted:
        out.print(f"{model.record['source']['file']} -> {model.folder} ({model.record['class']})")
    first = converted[0]
    out.print(f'load it: transformers.{first.record["class"]}.from_pretrained("{first.folder}")')
