"""One model in memory that answers every task: shared backbones, heads, adapters, zero-shot heads."""
