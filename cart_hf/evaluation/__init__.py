"""Evaluation: a model and a list of tasks become results. Nothing here knows how the model was made."""
