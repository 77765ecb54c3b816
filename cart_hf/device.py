"""Which device does the arithmetic."""

from __future__ import annotations

import torch

from cart_hf.errors import UserError


def named_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is accelerate's choice (cuda, mps, xpu ... or cpu).

    :raises UserError: when the device does not exist here.
    """
    if name == "auto":
        if not torch.accelerator.is_available():  # spare the import, a second
            return torch.device("cpu")
        from accelerate import PartialState

        return torch.device(PartialState().device)
    try:
        device = torch.device(name)
    except RuntimeError as failure:
        raise UserError(f"--device: '{name}' is not a device; use auto, cpu, cuda, cuda:1 or mps") from failure
    try:
        float(torch.ones(1, device=device).sum())
    except Exception as failure:  # each kind of device that is absent raises an error of its own
        raise UserError(f"--device: '{name}' is not available on this machine; use auto or cpu") from failure
    return device
