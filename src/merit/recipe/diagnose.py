"""The ``diagnose`` block: how closely merge-readiness is looked at."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from merit.recipe.base import Settings


class DiagnoseSettings(Settings):
    """Rows, points and noise of the merge-readiness diagnostics (`merit diagnose`)."""

    examples: Annotated[int, Field(ge=1)] = 32
    """Training rows, and test rows, per dataset on which losses are measured, drawn by seed."""
    points: Annotated[int, Field(ge=3)] = 21
    """Points on every path between two models, ends included (paper: 21)."""
    sigmas: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = [0.01, 0.05, 0.1]
    """Standard deviations of the weight noise (paper: 0.01, 0.05, 0.1): as they are, and relative to each tensor's root mean
    square."""
    noise_seeds: Annotated[int, Field(ge=2)] = 4
    """Draws of the weight noise per standard deviation."""
    surface_points: Annotated[int, Field(ge=5)] = 11
    """Points per side of the loss surface."""
    hessian_examples: Annotated[int, Field(ge=1)] = 200
    """Training rows over all datasets for products with the Hessian (paper: 200)."""
    lanczos_steps: Annotated[int, Field(ge=2)] = 50
    """Lanczos steps (paper: 50)."""
    eigenvectors: Annotated[int, Field(ge=1)] = 10
    """Leading eigenvectors of the Hessian to compare with (paper: 10)."""
    task_examples: Annotated[int, Field(ge=1)] = 50
    """Training rows per dataset for the gradients of the alignment (paper: 50)."""
    products: Literal["auto", "exact", "difference"] = "auto"
    """Hessian-vector products: exact by double backward, or central differences of gradients at two step sizes. auto: exact
    where memory allows."""
    batch_tokens: Annotated[int, Field(ge=1)] = 8192
    """Padded tokens per batch of the losses; figures do not depend on it beyond float rounding."""
    probe_steps: Annotated[int, Field(ge=1)] = 32
    """Optimizer steps per group of `merit diagnose --probe`."""
