"""Merge methods: pure functions from the tensors of one name to the merged tensor, one file each."""

from cart_hf.methods.parameters import WEIGHT, Parameter
from cart_hf.methods.registry import Method, all_methods, get_method, method

__all__ = ["WEIGHT", "Method", "Parameter", "all_methods", "get_method", "method"]
