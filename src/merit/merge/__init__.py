"""Merging branches into one checkpoint: ``plan`` checks everything, ``stream`` moves the bytes, ``stage`` does both."""

from merit.merge.lora import merge_into_adapter
from merit.merge.operators import OPERATORS
from merit.merge.plan import MergePlan, plan_merge
from merit.merge.result import MergeResult
from merit.merge.stage import merge_branches
from merit.merge.stream import run_merge
from merit.merge.weights import Branch

__all__ = [
    "OPERATORS",
    "Branch",
    "MergePlan",
    "MergeResult",
    "merge_branches",
    "merge_into_adapter",
    "plan_merge",
    "run_merge",
]
