"""What may be done to the result of any merge method."""

from cart_hf.methods.wrappers.registry import Wrapper, all_wrappers, get_wrapper

__all__ = ["Wrapper", "all_wrappers", "get_wrapper"]
