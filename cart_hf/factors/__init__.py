"""The singular factors of the centred weights, kept on disk: computed once, read at any rank and scale."""

from cart_hf.factors.store import FactorStore, open_store

__all__ = ["FactorStore", "open_store"]
