"""The whole road on small real data, offline: pretrain, fine-tune, merge with every method, measure."""
