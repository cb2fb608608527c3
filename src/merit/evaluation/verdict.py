"""The verdict: a summary's figures as a few plain sentences, learned and kept side by side. Pure: a dict in, text out.

It says no more than the intervals allow: "better" and "worse" only where the 95 % interval leaves out zero, "no clear
difference" otherwise. It never ranks by one column: a merged model commonly has a higher loss on the training mixture than
joint training and still does better elsewhere (Choi & Kim 2026, §3 and Appendix B), so the mixture alone would mislead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["counted", "verdict"]

_NAMES = {
    "base": "the base",
    "joint": "joint training",
    "random": "the random split",
    "kmeans": "the k-means split",
    "conflict_induced": "the conflict-induced split",
    "raw_pca": "the raw-gradient PCA split",
    "pca": "the PCA split",
}
_METRICS = {"loss": "loss", "exact_match": "exact match", "drift": "drift"}
_BY_CONFLICT = ("pca", "raw_pca", "kmeans")

_NOT_PLAIN = "merged is not the plain token-weighted average of all branches: {}."
_NO_LEARNED = (
    "Learned: not measured; give the mixture's datasets test files (test.jsonl beside train.jsonl, or a dataset's `test`) "
    "and leave evaluate.heldout on."
)
_NO_KEPT = (
    "Kept: not measured; give evaluate.kept_folder (what the base could do before). Drift from the base needs prompts, "
    "which it takes from test or kept rows: evaluate.drift.prompts of them, above 0."
)

Items = Sequence[Mapping[str, Any]]
"""Entries of a summary's ``paired``."""


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """Short plain-language sentences: what was learned, what was kept, how the two go together, and how sure that is.

    Args:
        summary: From :func:`merit.evaluation.summary.summarise`, with or without its own ``verdict``.
    """
    averages, about = summary["macro"], summary.get("about") or {}
    sentences = [_NOT_PLAIN.format(about["merged"])] if "merged" in about else []
    if not any(_measured(average) for average in averages.values()):
        nothing = "Nothing was measured, so nothing can be said of what was learned or kept."
        return [*sentences, nothing, _NO_LEARNED, _NO_KEPT]
    if "merged" not in averages:
        return ["No merged model was measured, so nothing is compared."]
    others = list(dict.fromkeys(item["other"] for item in summary["paired"]))
    by_other = {name: [item for item in summary["paired"] if item["other"] == name] for name in others}
    baselines = [name for name in others if name != "base"]
    sentences += [
        _learned(averages, by_other.get("base", [])),
        _kept(averages, by_other.get("base", []), ["base", *baselines, "merged"]),
        _both_columns(averages),
    ]
    for name in baselines:
        budgets = averages["merged"]["trained_target_tokens"], averages[name]["trained_target_tokens"]
        sentences.append(_against(name, by_other[name], summary["method"], about.get(name), budgets))
    sentences.append(_caution(summary))
    return sentences


def counted(n: int, what: str) -> str:
    """A number with its noun: 1 dataset, 2 datasets."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _measured(average: Mapping[str, Any]) -> bool:
    return any(average[part] for part in ("mixture", "kept", "drift"))


def _learned(averages: Mapping[str, Any], against_base: Items) -> str:
    ours, base = averages["merged"]["mixture"], averages["base"]["mixture"]
    if not ours or not base:
        return _NO_LEARNED
    figures = [f"loss {base['loss']:.3f} → {ours['loss']:.3f} nats/token"]
    if ours["exact_match"] is not None and base["exact_match"] is not None:
        figures.append(f"exact match {base['exact_match']:.3f} → {ours['exact_match']:.3f}")
    items = [item for item in against_base if item["part"] == "mixture"]
    text = f"Learned ({_count(ours)}, base → merged): {', '.join(figures)}. Differences: {_outcomes(items)}."
    if _side(items) in "=-":
        text += " There is no clear sign that the merged model learned this mixture."
    elif _side(items) == "±":
        text += " The two measures disagree on whether the merged model learned this mixture."
    return text


def _kept(averages: Mapping[str, Any], against_base: Items, shown: Sequence[str]) -> str:
    figures = []
    for metric, label in (("loss", "loss"), ("exact_match", "exact match")):
        values = {name: (averages[name]["kept"] or {}).get(metric) for name in shown}
        if values["merged"] is not None:
            figures.append(f"{label} {_list(values, 3)}")
    moved = {name: (averages[name]["drift"] or {}).get("kl") for name in shown if name != "base"}
    if moved["merged"] is not None:
        figures.append(f"drift from the base {_list(moved, 4)} nats/token")
    if not figures:
        return _NO_KEPT
    kept = averages["merged"]["kept"]
    where = f" ({_count(kept)})" if kept else ""
    text = f"Kept{where}: {'; '.join(figures)}."
    items = [item for item in against_base if item["part"] == "kept"]
    return text + (f" Differences from the base: {_outcomes(items)}." if items else "")


def _both_columns(averages: Mapping[str, Any]) -> str:
    merged = averages["merged"]
    both = bool(merged["mixture"] and (merged["kept"] or merged["drift"]))
    text = "Read both together: " if both else "Only one of the two columns was measured, and one alone misleads: "
    text += (
        "a merged model commonly has a higher loss on the training mixture than joint training and still does better "
        "elsewhere (Choi and Kim 2026), while the base itself keeps everything and learns nothing"
    )
    text += "; neither column decides alone." if both else "."
    joint, ours = (averages.get(name, {}).get("mixture") for name in ("joint", "merged"))
    if joint and ours and joint["loss"] != ours["loss"]:
        gap = ours["loss"] - joint["loss"]
        side = "above" if gap > 0 else "below"
        text += f" Here the merged model's mixture loss is {abs(gap):.3f} nats/token {side} joint's."
    return text


def _against(name: str, items: Items, method: str, remark: str | None, budgets: tuple[int | None, int | None]) -> str:
    """One comparison: what it comes to, then the differences in both columns.

    Args:
        name: The other model.
        items: The differences.
        method: The run's own split method.
        remark: How the other model was made, where that is not the plain way.
        budgets: Target tokens that merged and the other model were trained on, where known.
    """
    columns = {part: [item for item in items if item["part"] == part] for part in ("mixture", "kept")}
    figures = [
        f"{word}: {_outcomes(columns[part])}"
        for part, word in (("mixture", "learned"), ("kept", "kept"))
        if columns[part]
    ]
    other, (ours, theirs) = _NAMES.get(name, name), budgets
    title = f"{other} ({remark})" if remark else other
    if ours is None or theirs is None or ours == theirs:
        return f"Against {title}: {_call(name, other, columns, method)} ({'; '.join(figures)})"
    return (
        f"Against {title}, at another budget (merged {ours:,} target tokens, {name} {theirs:,}): "
        f"{_call(name, other, columns, method, same_budget=False)} A difference may come from the budget alone. "
        f"({'; '.join(figures)})"
    )


def _call(name: str, other: str, columns: Mapping[str, Items], method: str, same_budget: bool = True) -> str:
    learned, kept = _side(columns["mixture"]), _side(columns["kept"])
    if "?" in (learned, kept) and not {learned, kept} & {"+", "-", "±"}:
        return "too little was measured in one of the two columns to call a difference."
    what = "merging" if name == "joint" else _NAMES.get(method, f"the run's own split, {method}")
    no_reason = f"nothing here speaks for {what}."
    calls = {
        "++": "the merged model did better on both: it learned more and kept more.",
        "+=": "the merged model learned more, with no clear difference in what was kept.",
        "=+": "the merged model kept more, with no clear difference in what was learned.",
        "-+": "a trade: the merged model learned less of the mixture and kept more of the base.",
        "+-": "a trade: the merged model learned more of the mixture and kept less of the base.",
        "==": "no clear difference, neither in what was learned nor in what was kept.",
        "-=": f"{other} learned more, with no clear difference in what was kept: {no_reason}",
        "=-": f"{other} kept more, with no clear difference in what was learned: {no_reason}",
        "--": f"{other} did better on both, it learned more and kept more: {no_reason}",
    }
    undecided = f"{_words(learned, 'learned')}, and {_words(kept, 'kept')}; this is no verdict for either."
    text = calls.get(learned + kept, undecided)
    if kept in "+-" and {item["metric"] for item in columns["kept"] if item["outcome"] in ("better", "worse")} == {
        "drift"
    }:
        sets = {item["outcome"] for item in columns["kept"] if item["metric"] != "drift"}
        said = "show no clear difference" if "unclear" in sets else "are too few to compare"
        text += " What was kept is judged by drift alone" + (f"; the kept sets {said}." if sets else ".")
    if same_budget and name == "random" and method in _BY_CONFLICT and {learned, kept} <= {"=", "-"}:
        text += (
            " Splitting by conflict did not help here: the random split did better."
            if "-" in (learned, kept)
            else " Splitting by conflict did not matter here: as far as these figures tell, the random split did as well."
        )
    return text


def _words(side: str, what: str) -> str:
    return {
        "+": f"the merged model {what} more",
        "-": f"the merged model {what} less",
        "=": f"there is no clear difference in what was {what}",
        "±": f"the measures of what was {what} disagree",
        "?": f"what was {what} was not measured on enough data to say",
    }[side]


def _side(items: Items) -> str:
    """One column's measures together: + (merged better in one, worse in none), -, ± (they disagree), =, ? (no data)."""
    outcomes = {item["outcome"] for item in items}
    if {"better", "worse"} <= outcomes:
        return "±"
    if "better" in outcomes:
        return "+"
    if "worse" in outcomes:
        return "-"
    return "=" if "unclear" in outcomes else "?"


def _outcomes(items: Items) -> str:
    """Each measure's difference with its interval and what may be said of it."""
    parts = []
    for item in items:
        digits = 4 if item["metric"] == "drift" else 3
        text = f"{_METRICS[item['metric']]} {item['difference']:+.{digits}f}"
        unit = "answer" if item["metric"] == "drift" else "dataset"
        if item["outcome"] == "few":
            text += f" ({counted(item['units'], unit)}: too few to compare)"
        else:
            low, high = item["ci95"]
            said = {"better": "better", "worse": "worse", "unclear": "no clear difference"}[item["outcome"]]
            text += f" [{low:+.{digits}f}, {high:+.{digits}f}] {said}"
        parts.append(text)
    return ", ".join(parts)


def _count(average: Mapping[str, Any]) -> str:
    n = average["datasets"]
    text = f"mean over {counted(n, 'held-out dataset')}"
    if average["exact_match"] is not None and average["exact_match_datasets"] != n:
        text += f", exact match over {average['exact_match_datasets']}"
    return text


def _list(values: Mapping[str, float | None], digits: int) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in values.items() if value is not None)


def _caution(summary: Mapping[str, Any]) -> str:
    units = {(item["part"], item["metric"]): item["units"] for item in summary["paired"] if item["outcome"] != "few"}
    names = {
        ("mixture", "loss"): "mixture dataset",
        ("kept", "loss"): "kept dataset",
        ("kept", "drift"): "answer",
    }
    over = [counted(units[key], name) for key, name in names.items() if key in units]
    if not over:
        return (
            "Caution: one training seed, and too little was measured for intervals. Another seed or mixture can differ."
        )
    answers = " of the base" if ("kept", "drift") in units else ""
    return (
        f"Caution: one training seed. The 95 % intervals in brackets are over {', '.join(over)}{answers}; "
        "another seed or another mixture can differ by more than they show."
    )
