"""Merging branches into one checkpoint: plan and check everything (``plan``), then stream (``stream``)."""

from merit.merge.operators import OPERATORS
from merit.merge.plan import Branch, MergePlan, plan_merge
from merit.merge.stream import MergeResult, run_merge

__all__ = ["OPERATORS", "Branch", "MergePlan", "MergeResult", "plan_merge", "run_merge"]
