"""Names of tensors in a base, a merge and a fine-tuned model; imports nothing that would count as a peer's time."""

from __future__ import annotations

from collections.abc import Container


def find(weights: Container[str], name: str) -> str | None:
    """Return the name that a tensor of a fine-tuned model has in a base or a merge: a vision model's gets a prefix."""
    return next((found for found in (name, f"vision_model.{name}") if found in weights), None)
