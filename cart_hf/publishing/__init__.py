"""Model card and push: a merged folder as others see it."""

from cart_hf.publishing.card import write_card
from cart_hf.publishing.run import Pushed, check_push, push

__all__ = ["Pushed", "check_push", "push", "write_card"]
