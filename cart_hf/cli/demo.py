"""`cart-hf demo`."""


def demo() -> None:
    """The whole road."""
