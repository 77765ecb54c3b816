"""Benchmarking (the function is `cart_hf.benchmark`): every method merged, tuned on one split, scored on another."""
