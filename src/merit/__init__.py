"""MERIT: measure gradient conflict, split the mixture, train branches independently, merge once.

The public names are loaded on first use, so that ``import merit`` takes milliseconds and imports no ML library::

    import merit

    base = merit.open_base("Qwen/Qwen2.5-0.5B")
    mix = merit.encode_mixture(merit.find_datasets("data/"), base, max_length=2048)
    geometry = merit.measure_gradients(mix.train, base)

docs/python-api.md has the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merit.conflict.result import Geometry
    from merit.conflict.stage import measure_gradients
    from merit.errors import MeritError, UserError
    from merit.evaluation.results import Evaluation
    from merit.evaluation.stage import evaluate
    from merit.hf.base import Base, open_base
    from merit.merge.result import MergeResult
    from merit.merge.stage import merge_branches
    from merit.merge.weights import Branch
    from merit.mixture.found import find_datasets
    from merit.mixture.result import Mixture
    from merit.mixture.stage import encode_mixture
    from merit.recipe.load import load_recipe
    from merit.recipe.schema import Recipe
    from merit.split.result import Split
    from merit.split.stage import split_mixture
    from merit.train.branch import train_branch
    from merit.train.result import BranchResult

__version__ = "0.3.0.dev0"

__all__ = [
    "Base",
    "Branch",
    "BranchResult",
    "Evaluation",
    "Geometry",
    "MergeResult",
    "MeritError",
    "Mixture",
    "Recipe",
    "Split",
    "UserError",
    "encode_mixture",
    "evaluate",
    "find_datasets",
    "load_recipe",
    "measure_gradients",
    "merge_branches",
    "open_base",
    "split_mixture",
    "train_branch",
]

_HOME = {
    "Base": "merit.hf.base",
    "Branch": "merit.merge.weights",
    "BranchResult": "merit.train.result",
    "Evaluation": "merit.evaluation.results",
    "Geometry": "merit.conflict.result",
    "MergeResult": "merit.merge.result",
    "MeritError": "merit.errors",
    "Mixture": "merit.mixture.result",
    "Recipe": "merit.recipe.schema",
    "Split": "merit.split.result",
    "UserError": "merit.errors",
    "encode_mixture": "merit.mixture.stage",
    "evaluate": "merit.evaluation.stage",
    "find_datasets": "merit.mixture.found",
    "load_recipe": "merit.recipe.load",
    "measure_gradients": "merit.conflict.stage",
    "merge_branches": "merit.merge.stage",
    "open_base": "merit.hf.base",
    "split_mixture": "merit.split.stage",
    "train_branch": "merit.train.branch",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'merit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
