"""Best low-rank approximations and exact order statistics, knowing nothing of models.

Import what you need from its files: order statistics do without SciPy, which takes a while to load.
"""
