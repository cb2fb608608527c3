"""The model card (README.md) of a merged checkpoint: lineage, weights, operator, licence of the base. Text only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from merit import __version__
from merit.hf.side_files import read_config
from merit.merge.plan import MergePlan

__all__ = ["base_licence", "model_card"]


def base_licence(folder: Path) -> str:
    """The base's licence: from its card's front matter, else its config, else ``unknown: see the base``."""
    readme = folder / "README.md"
    if readme.is_file():
        lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and lines[0].strip() == "---":
            end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), 0)
            try:
                front: Any = yaml.safe_load("\n".join(lines[1:end]))
            except yaml.YAMLError:
                front = None
            if isinstance(front, dict) and isinstance(front.get("license"), str):
                return str(front["license"])
    licence = read_config(folder).get("license") if (folder / "config.json").is_file() else None
    return licence if isinstance(licence, str) else "unknown: see the base"


def model_card(plan: MergePlan, fingerprints: Sequence[str]) -> str:
    """The card's text.

    Args:
        plan: The merge.
        fingerprints: Of the base and of each branch, in order.
    """
    licence = base_licence(plan.base.folder)
    known = licence if " " not in licence else "other"
    rows = [
        f"| {b.name} | {b.weight} | {w:.6f} | `{f[:16]}` |"
        for b, w, f in zip(plan.branches, plan.shares, fingerprints[1:], strict=True)
    ]
    options = ", ".join(f"{k} = {v}" for k, v in plan.options.items())
    notes = [f"- {warning}" for warning in plan.warnings]
    return "\n".join(
        [
            "---",
            f"license: {known}",
            "library_name: transformers",
            "tags: [merge, merit]",
            "---",
            "",
            f"# {plan.output.parent.name}/{plan.output.name}",
            "",
            f"Merged by MERIT {__version__}: {len(plan.branches)} branches, fine-tuned apart from one base, merged once.",
            "",
            f"- Operator: `{plan.operator.name}` ({plan.operator.source})" + (f"; {options}" if options else ""),
            f"- Scale λ: {float(plan.scale):g} (θ0 + λ τ; 1 is the plain merge)",
            f"- Base: `{plan.base.folder.name}`, fingerprint `{fingerprints[0][:16]}`",
            f"- Licence of the base: {licence}",
            "- Config, tokenizer and generation settings are the base's.",
            "",
            "| branch | tokens (weight) | share | fingerprint |",
            "|---|---|---|---|",
            *rows,
            "",
            *(["## Notes", "", *notes, ""] if notes else []),
        ]
    )
