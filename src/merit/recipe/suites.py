"""The ``evaluate.harness`` block: how benchmark suites are run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from merit.recipe.base import Settings

OWN_TASK = (".jsonl", ".yaml", ".yml")
"""Endings of the user's own tasks among the suites."""


class HarnessSettings(Settings):
    """How the benchmarks of ``evaluate.suites`` are run."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Requests per batch. Recorded: greedy answers can depend on it."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many examples per task; for trying it out, never for figures to be compared with others'."""
    chat_template: bool = True
    """Put every prompt through the base's chat template, as in training."""
    run_code: bool = False
    """Let benchmarks run code that the model wrote (HumanEval does), on this machine and with your rights."""
    lmms_python: str | None = None
    """For suites of lmms-eval: the Python of an environment of its own in which lmms-eval is installed."""
    judge: str | None = None
    """For benchmarks that a judge scores: its model's name, recorded next to every score."""
    judge_url: str | None = None
    """Where the judge answers: an OpenAI-compatible URL, on this machine or elsewhere."""
