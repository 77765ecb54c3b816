"""What to do, declared: the recipe schema, read from YAML or from flags."""

from cart_hf.recipe.adaptation import Adaptation
from cart_hf.recipe.benchmark import Benchmark, Selection, Trial
from cart_hf.recipe.compression import Compression
from cart_hf.recipe.evaluation import Evaluation, with_examples
from cart_hf.recipe.flags import recipe_from_flags, refuse_flags
from cart_hf.recipe.reference import Reference
from cart_hf.recipe.schema import ModelEntry, Recipe
from cart_hf.recipe.tuning import Tuning

__all__ = [
    "Adaptation",
    "Benchmark",
    "Compression",
    "Evaluation",
    "ModelEntry",
    "Recipe",
    "Reference",
    "Selection",
    "Trial",
    "Tuning",
    "recipe_from_flags",
    "refuse_flags",
    "with_examples",
]
