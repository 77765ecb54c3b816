"""`cart-hf env`."""

from __future__ import annotations


def env() -> None:
    """Print the versions to paste into an issue.

    **Examples**

    ```text
    cart-hf env
    ```
    """
    import os
    import platform

    import torch

    from cart_hf import __version__
    from cart_hf.cli.console import out
    from cart_hf.output.record import versions
    from cart_hf.parallel import cores

    lines = {
        "cart-hf": __version__,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **versions(),
        "cores": str(cores()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "HF_ENDPOINT": os.environ.get("HF_ENDPOINT", "(default)"),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "(unset)"),
    }
    for name, value in lines.items():
        out.print(f"- {name}: {value}")
