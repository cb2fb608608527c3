"""MERIT: measure gradient conflict, split the mixture, train branches apart, merge once.

The public API is loaded lazily, so that ``import merit`` costs milliseconds and no ML library::

    import merit
    recipe = merit.load_recipe(Path("recipe.yaml"))
    ...
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merit.conflict.stage import measure_gradients
    from merit.errors import MeritError, UserError
    from merit.evaluation.stage import evaluate
    from merit.hf.base import Base, open_base
    from merit.merge import Branch, merge_branches, plan_merge, run_merge
    from merit.mixture.found import find_datasets
    from merit.mixture.stage import encode_mixture
    from merit.recipe.load import load_recipe, parse_recipe
    from merit.recipe.schema import Recipe
    from merit.split.stage import split_mixture

__version__ = "0.1.0"

_HOME = {
    "Base": "merit.hf.base",
    "Branch": "merit.merge",
    "MeritError": "merit.errors",
    "Recipe": "merit.recipe.schema",
    "UserError": "merit.errors",
    "encode_mixture": "merit.mixture.stage",
    "evaluate": "merit.evaluation.stage",
    "find_datasets": "merit.mixture.found",
    "open_base": "merit.hf.base",
    "load_recipe": "merit.recipe.load",
    "measure_gradients": "merit.conflict.stage",
    "parse_recipe": "merit.recipe.load",
    "merge_branches": "merit.merge",
    "plan_merge": "merit.merge",
    "run_merge": "merit.merge",
    "split_mixture": "merit.split.stage",
}

__all__ = [
    "Base",
    "Branch",
    "MeritError",
    "Recipe",
    "UserError",
    "encode_mixture",
    "evaluate",
    "find_datasets",
    "load_recipe",
    "measure_gradients",
    "merge_branches",
    "open_base",
    "parse_recipe",
    "plan_merge",
    "run_merge",
    "split_mixture",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'merit' has no attribute {name!r}")
