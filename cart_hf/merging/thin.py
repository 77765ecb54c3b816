"""LoRA adapters of one base: their centred matrices are decomposed as thin products, never as whole matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cart_hf.plan import Group, Plan
from cart_hf.sources.lora import Part

if TYPE_CHECKING:
    from cart_hf.linalg.low_rank import Factors
    from cart_hf.linalg.products import Product
    from cart_hf.methods.registry import Centre


@dataclass(frozen=True)
class Thin:
    """The matrices of one name as ``W + B_t A_t``.

    :param base: where W is read from.
    :param shape: its shape, (m, n).
    :param products: for each model B_t and A_t, float32.
    """

    base: Part
    shape: tuple[int, ...]
    products: Sequence[Product]

    def read_base(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W, on the CPU."""
        values = torch.empty(self.base.stored.elements, dtype=dtype)
        self.base.file.read_into(values, self.base.key, 0)
        return values.view(self.shape)


def find_thin(plan: Plan, group: Group, centre: Centre = "average") -> Thin | None:
    """Return the matrices of a name as products, or None where they are more than adapters of one base.

    That base must be the plan's, where the matrices are centred at it. Also None where the products together have so
    many directions that whole matrices are decomposed as fast.
    """
    tensor, *others = group.tensors
    parts = [plan.models[i].part(name) for i, name in tensor.inputs]
    if centre == "base" and plan.base is not None and tensor.base_input is not None:
        parts.append(plan.base.part(tensor.base_input))
    is_one_base = len({(id(part.file), part.key) for part in parts}) == 1
    if others or len(tensor.shape) != 2 or not is_one_base or not any(part.is_low_rank for part in parts):
        return None
    nothing = torch.zeros(tensor.shape[0], 0), torch.zeros(0, tensor.shape[1])
    products = [plan.models[i].factors(name) or nothing for i, name in tensor.inputs]
    directions = sum(left.shape[1] for left, _ in products)
    return Thin(parts[0], tensor.shape, products) if 2 * directions <= min(tensor.shape) else None


def factorize_thin(
    thin: Thin,
    base: torch.Tensor,
    weight: Sequence[float] | None,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[torch.Tensor, Factors]:
    """Return the same as :func:`cart_hf.methods.cart.centred_factors` for whole matrices.

    :param base: W, on the device and in the type of the arithmetic; overwritten.
    :param weight: of the average that they are centred at; None: at the base.
    """
    from cart_hf.linalg.products import factorize_products

    products = [(left.to(base), right.to(base)) for left, right in thin.products]
    centring = torch.eye(len(products), dtype=torch.float64)
    if weight is not None:
        shares = [w / sum(weight) for w in weight]
        for share, (left, right) in zip(shares, products, strict=True):
            base.addmm_(left, right, alpha=share)
        centring -= torch.tensor(shares, dtype=torch.float64)
    return base, factorize_products(products, centring, rank=rank, energy=energy)
