"""The ``merge`` block: how the branches become one model, and how their weights are searched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from merit.recipe.base import Settings

__all__ = ["DEFAULT_PATTERN", "MergeSettings", "SearchSettings", "WeightRule"]

WeightRule = Literal["tokens", "target_tokens", "samples", "uniform"]
DEFAULT_PATTERN = "default"
"""Key of ``merge.weights`` for the tensors that no pattern matches."""

_Listed = Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)]
_ListedHere = Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(min_length=1)]


class SearchSettings(Settings):
    """For ``merge.weights: auto``: what the search of weights and scale looks for, and how long."""

    objective: Literal["knee", "learned_under_kept", "learned_under_drift"] = "knee"
    """knee: the point farthest below the straight line from the base to the token-weighted merge, in the plane of learned
    and kept loss; learned_under_kept, learned_under_drift: lowest held-out loss on the mixture among points that cost at
    most ``bound`` on the kept sets, or drift at most ``bound`` from the base."""
    bound: Annotated[float, Field(ge=0, le=100)] = 0.05
    """For the objectives with a bound (nats per token): rise of the mean loss on the kept sets above the base's, or
    divergence from the base on its own answers."""
    evaluations: Annotated[int, Field(ge=8, le=100_000)] | None = None
    """Points to measure. Default: 16, and 12 more per branch; in a study all searches get as many as the largest."""
    rows: Annotated[int, Field(ge=1)] = 50
    """Maximum rows per dataset that a point is measured on; as many others report."""
    scale_range: tuple[Annotated[float, Field(ge=0, le=10)], Annotated[float, Field(gt=0, le=10)]] = (0.0, 1.5)
    """Lowest and highest λ; equal numbers fix it."""

    def points(self, branches: int) -> int:
        """Points to measure for so many branches."""
        return self.evaluations or 16 + 12 * branches

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.scale_range
        if low > high:
            raise ValueError(f"scale_range must be [low, high], found [{low:g}, {high:g}]")
        return self


class MergeSettings(Settings):
    """How the branches become one model (paper §4 step 6)."""

    operator: Literal[
        "average", "uniform", "task_arithmetic", "ties", "star", "tsv", "iso_cts", "dare", "model_stock", "fisher"
    ] = "average"
    """average: the paper's weighted average; docs/merge.md describes the others."""
    weights: WeightRule | Literal["auto"] | _Listed | dict[str, WeightRule | _ListedHere] = "tokens"
    """Branch weights w_k before normalisation. tokens: every trained token N_k, of prompt, image and answer (the paper's
    token budget); target_tokens: only those in the loss; samples: trained rows; uniform: 1/K; a list, one weight per
    branch; patterns of tensor names with a rule or a list each ({default: tokens, "layers.*.mlp": [0.2, 0.8]}); or auto:
    searched with λ on held-out rows (``search``)."""
    search: SearchSettings = SearchSettings()
    scale: Annotated[float, Field(ge=-10, le=10)] | Literal["auto"] = 1.0
    """λ of θ0 + λ τ; 1 is the plain merge, below 0 away from the branches; auto searches ``scales`` on held-out data. With
    weights: auto, λ is searched in ``search.scale_range``."""
    scales: list[Annotated[float, Field(ge=0, le=10)]] = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    """For scale: auto. The grid of λ."""
    rule: Literal["balanced", "learned", "keep"] = "balanced"
    """For scale: auto. learned: lowest held-out loss on the mixture; keep: the same among the λ that cost at most 0.05
    nats per token on what the base knew; balanced: smallest maximum of the two regrets, each scaled to the grid's
    range."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] | None = None
    """Dtype of the merged model. Default: the base's, and branches of another dtype are refused; base: the base's, whatever
    the branches have."""
    options: dict[str, float | int | str | bool] = {}
    """Operator options (density, trim, eta, ...; docs/merge.md lists them)."""

    @model_validator(mode="after")
    def _weights_are_usable(self) -> Self:
        if self.weights == "auto" and self.scale not in (1.0, "auto"):
            low = f"merge.search.scale_range: [{self.scale}, {self.scale}]"
            raise ValueError(
                f"scale {self.scale:g} cannot be combined with weights: auto, which searches λ; fix it with {low}"
            )
        if isinstance(self.weights, dict) and not self.weights:
            raise ValueError("weights lists no pattern; leave it out for the default, tokens")
        for pattern, listed in self.listed_weights():
            if not sum(listed) > 0:
                raise ValueError(f"weights of {pattern} sum to 0; at least one must be above 0")
        return self

    def listed_weights(self) -> Iterator[tuple[str, list[float]]]:
        """Every list of weights with the pattern it belongs to (``all tensors`` for a single list)."""
        if isinstance(self.weights, list):
            yield "all tensors", self.weights
        if isinstance(self.weights, dict):
            yield from ((name, value) for name, value in self.weights.items() if isinstance(value, list))
