"""``python -m cart_hf`` is ``cart-hf``, so that launchers such as ``accelerate launch -m cart_hf`` work."""

from cart_hf.cli import main

if __name__ == "__main__":
    main()
