"""The merge operators by name: a dict literal. Each is a pure function in its own file, with its paper and limits.

Five kinds: ``linear`` operators are coefficients of θ0 and the θ_k (merged with exact rounding); ``entry`` operators work
elementwise, and so does the ``block`` operator, which first passes over the whole model; ``matrix`` operators need a whole
weight matrix and leave everything else to the uniform average; ``tensor`` operators need each tensor whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from merit.errors import MergeError, nearest
from merit.merge.operators import (
    average,
    dare,
    fisher,
    iso_cts,
    model_stock,
    star,
    task_arithmetic,
    ties,
    tsv,
    uniform,
)

__all__ = ["MOMENTS", "OPERATORS", "Operator", "Option", "Options", "operator_and_options", "uses_weights"]

Value = float | int | str | bool
Options = dict[str, Value]


@dataclass(frozen=True)
class Option:
    """One setting of an operator: its default, its check, and a description of valid values."""

    default: Value
    valid: Callable[[object], bool]
    expects: str


def _choice(*values: str) -> Option:
    return Option(values[0], lambda value: value in values, " or ".join(values))


def _number(default: float, low: float, high: float) -> Option:
    return Option(
        default,
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low < value <= high,
        f"a number above {low:g} and at most {high:g}",
    )


def _share(default: float) -> Option:
    return Option(
        default,
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1,
        "a number of at least 0 and below 1",
    )


def _seed() -> Option:
    return Option(
        0,
        lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31,
        "a whole number of at least 0",
    )


def _flag(default: bool) -> Option:
    return Option(default, lambda value: isinstance(value, bool), "true or false")


@dataclass(frozen=True)
class Operator:
    """One way to merge.

    Attributes:
        name: Its name in recipes and on the command line.
        kind: See the module docstring.
        source: The paper.
        function: ``linear``: (counts, scale, **options) → (c_0, [c_k]), exact. ``block``: see ``ties``. ``entry``: (entries,
            **options) → τ. ``matrix``, ``tensor``: (deltas, **options) → (τ, statistics), where ``deltas`` is a sequence of
            K float64 arrays θ_k − θ0, read when indexed.
        options: Its settings.
        weighted: Whether the branches' weights change the result, whatever its options.
    """

    name: str
    kind: Literal["linear", "block", "entry", "matrix", "tensor"]
    source: str
    function: Callable[..., Any]
    options: Mapping[str, Option] = field(default_factory=dict)
    weighted: bool = False


_SCOPE = _choice("linear2d", "all2d")

OPERATORS: dict[str, Operator] = {
    "average": Operator(
        "average", "linear", "Choi & Kim 2026, arXiv:2606.01717, §4", average.coefficients, weighted=True
    ),
    "uniform": Operator("uniform", "linear", "Wortsman et al. 2022, arXiv:2203.05482", uniform.coefficients),
    "task_arithmetic": Operator(
        "task_arithmetic",
        "linear",
        "Ilharco et al. 2023, arXiv:2212.04089; one checkpoint: Wortsman et al. 2022, arXiv:2109.01903",
        task_arithmetic.coefficients,
        {"normalize": _flag(True)},
    ),
    "ties": Operator(
        "ties",
        "block",
        "Yadav et al. 2023, arXiv:2306.01708",
        ties.merge_entries,
        {"density": _number(0.2, 0.0, 1.0), "trim": _choice("global", "local"), "weighted": _flag(False)},
    ),
    "star": Operator(
        "star",
        "matrix",
        "Lee et al. 2025, arXiv:2502.10339",
        star.merge_matrix,
        {"eta": _number(40.0, 0.0, 100.0), "matrix_scope": _SCOPE},
    ),
    "tsv": Operator(
        "tsv",
        "matrix",
        "Gargiulo et al. 2025, arXiv:2412.00081 (TSV-Merge)",
        tsv.merge_matrix,
        {"matrix_scope": _SCOPE},
    ),
    "iso_cts": Operator(
        "iso_cts",
        "matrix",
        "Marczak et al. 2025, arXiv:2502.04959",
        iso_cts.merge_matrix,
        {"common_fraction": _number(0.8, 0.0, 1.0), "matrix_scope": _SCOPE},
    ),
    "dare": Operator(
        "dare",
        "entry",
        "Yu et al. 2024, arXiv:2311.03099",
        dare.merge_entries,
        {"drop": _share(0.9), "seed": _seed()},
        weighted=True,
    ),
    "model_stock": Operator("model_stock", "tensor", "Jang et al. 2024, arXiv:2403.19522", model_stock.merge_tensor),
    "fisher": Operator(
        "fisher",
        "entry",
        "Matena & Raffel 2022, arXiv:2111.09832, with Adam's moments as in Li et al. 2025, arXiv:2507.18807",
        fisher.merge_entries,
        weighted=True,
    ),
}

MOMENTS = frozenset({"fisher"})
"""Operators that need the second moments of the branches' gradients."""


def uses_weights(operator: Operator, options: Options) -> bool:
    """Whether the branches' weights change the result; otherwise all count equally."""
    return operator.weighted or bool(options.get("weighted", options.get("normalize", False)))


def operator_and_options(name: str, given: Mapping[str, Value]) -> tuple[Operator, Options]:
    """Look an operator up and complete its options with their defaults.

    Raises:
        MergeError: Unknown operator or option, or an invalid value; the message names the nearest valid one.
    """
    if name not in OPERATORS:
        raise MergeError(
            f"There is no merge operator {name!r}.{nearest(name, list(OPERATORS))}",
            f"Operators: {', '.join(OPERATORS)}.",
        )
    operator = OPERATORS[name]
    for key, value in given.items():
        if key not in operator.options:
            known = ", ".join(operator.options) or "none"
            raise MergeError(
                f"Operator {name} has no option {key!r}.{nearest(key, list(operator.options))}",
                f"Its options: {known}.",
            )
        if not operator.options[key].valid(value):
            raise MergeError(f"Option {key} of operator {name} is {value!r}; expected {operator.options[key].expects}.")
    return operator, {key: given.get(key, option.default) for key, option in operator.options.items()}
