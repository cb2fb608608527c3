"""The model card (README.md) of a merged checkpoint: lineage, weights, operator, licence of the base. Text only.

It is published with the model, so it contains no local paths.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from merit import __version__
from merit.hf.side_files import read_config
from merit.merge.plan import MergePlan
from merit.progress import count

__all__ = ["base_licence", "base_model", "made_from", "model_card"]

_LICENCE = ("license", "license_name", "license_link")


def base_licence(folder: Path) -> dict[str, str | list[str]]:
    """The base's licence from its card (license, license_name, license_link); else from its config; else unknown."""
    card = _front_matter(folder)
    known = {key: value for key in _LICENCE if isinstance(value := card.get(key), str | list)}
    if "license" not in known:
        config = read_config(folder).get("license") if (folder / "config.json").is_file() else None
        known = {"license": config if isinstance(config, str) else "unknown", **known}
    return known


def _front_matter(folder: Path) -> dict[str, object]:
    """The YAML block at the top of a folder's card; empty if there is none that can be read."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    text = readme.read_text(encoding="utf-8", errors="replace")
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, RecursionError):
        front = None
    return front if isinstance(front, dict) else {}


def made_from(folder: Path) -> list[str]:
    """What a checkpoint was made from, by its own card's ``base_model``; local paths are left out."""
    value = _front_matter(folder).get("base_model")
    names = value if isinstance(value, list) else [value]
    return [name for name in names if isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]


def _hub_id(folder: Path) -> str | None:
    """The hub id of a folder in the hub's cache."""
    parts = [part for part in folder.absolute().parts if part.startswith("models--")]
    return parts[-1].removeprefix("models--").replace("--", "/") if parts else None


def base_model(folder: Path) -> str:
    """The base's hub id if its folder or its config shows it, else its folder's name."""
    known = _hub_id(folder)
    if known is not None:
        return known
    name = read_config(folder).get("_name_or_path") if (folder / "config.json").is_file() else None
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else folder.absolute().name


def model_card(plan: MergePlan, fingerprints: Sequence[str]) -> str:
    """The card's text.

    Args:
        plan: The merge.
        fingerprints: Of the base and of each branch, in order.
    """
    licence, base = base_licence(plan.base.folder), base_model(plan.base.folder)
    merged = [known for known in map(_hub_id, (branch.path for branch in plan.branches)) if known is not None]
    ancestors = ", ".join(f"`{name}`" for name in made_from(plan.base.folder))
    front = {
        **licence,
        "library_name": "transformers",
        "base_model": [base, *merged] if merged else base,
        "base_model_relation": "merge",
        "tags": ["merge", "merit"],
    }
    rows = [
        f"| {_public(b.name)} | {b.weight} | {w:.6f} | `{f[:16]}` |"
        for b, w, f in zip(plan.branches, plan.shares, fingerprints[1:], strict=True)
    ]
    options = ", ".join(f"{k} = {v}" for k, v in plan.options.items())
    notes = [f"- {_public(warning)}" for warning in plan.warnings]
    output = plan.output.absolute()
    terms = ", ".join(str(value) for value in licence.values())
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {output.parent.name}/{output.name}",
            "",
            f"Merged by MERIT {__version__}: {count(len(plan.branches), 'branch')}, fine-tuned independently from one base.",
            "",
            f"- Operator: `{plan.operator.name}` ({plan.operator.source})" + (f"; {options}" if options else ""),
            f"- Scale λ: {float(plan.scale):g} (θ0 + λ τ; 1 is the plain merge)",
            f"- Base: `{base}`, fingerprint `{fingerprints[0][:16]}`"
            + (f"; made from {ancestors}, by its own card" if ancestors else ""),
            f"- Licence of the base: {terms}" + (" (see the base)" if terms == "unknown" else ""),
            "- Config, tokenizer and generation settings are the base's.",
            "",
            f"| branch | weight ({plan.branches[0].counted or 'given'}) | share | fingerprint |",
            "|---|---|---|---|",
            *rows,
            "",
            *(
                f"- Shares of tensors that match `{pattern}`: {', '.join(f'{w:.6f}' for w in shares)}"
                for pattern, shares in plan.shares_by_pattern.items()
            ),
            *([""] if plan.shares_by_pattern else []),
            *(["## Notes", "", *notes, ""] if notes else []),
        ]
    )


_PATH = re.compile(r"(?<![\w./])/(?:(?:[^/\n;,:'\"`()]+/)*(?=[^/\s;,:'\"`()]+/[^/\s;,:'\"`()]+)|(?=\w))")


def _public(text: str) -> str:
    """Text with every absolute path shortened to its last two parts."""
    return _PATH.sub("", text)
