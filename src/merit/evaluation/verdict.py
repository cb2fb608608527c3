"""The verdict: learned, kept and unseen, side by side, in a few plain sentences. Pure: a summary in, text out.

The first sentence says what to use and how certain that is. "Better" and "worse" are used only where the comparison's
measures, corrected for their number, allow it: a false call in at most 5 % of comparisons. It never ranks by one column: a
merged model commonly has a higher loss on the training mixture than joint training and still does better elsewhere (Choi &
Kim 2026, §3 and Appendix B), so the mixture alone would mislead. One run has one seed: it is about this run's models, not
about the methods that made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merit.evaluation.calls import MIN_SEEDS, Advice, Comparison, Recommendation, Side, comparisons, recommend
from merit.evaluation.figures import Average, Averages, Difference, Metric, Part, Summary
from merit.evaluation.statistics import ERROR

__all__ = ["Verdict", "counted", "judge"]

_NAMES = {
    "base": "the base",
    "merged": "the merged model",
    "joint": "the jointly trained model",
    "random": "the random split's model",
    "kmeans": "the k-means split's model",
    "conflict_induced": "the conflict-induced split's model",
    "raw_pca": "the raw-gradient PCA split's model",
    "pca": "the PCA split's model",
}
_METRICS: dict[Metric, str] = {"loss": "loss", "exact_match": "exact match", "drift": "drift"}
_BY_CONFLICT = ("pca", "raw_pca", "kmeans")

_NO_LEARNED = (
    "Learned: not measured; give the mixture's datasets test files (test.jsonl next to train.jsonl, or a dataset's `test`) "
    "and leave evaluate.heldout on."
)
_NO_KEPT = (
    "Kept: not measured; give evaluate.kept_folder (what the base could already do). Drift from the base needs prompts, "
    "which it takes from test or kept rows: evaluate.drift.prompts of them, above 0."
)
_NO_UNSEEN = "Unseen: not measured; give evaluate.unseen_folder (tasks that nobody trains on)."
_DID: dict[Part, str] = {"mixture": "learned more", "kept": "kept more", "unseen": "did better on unseen tasks"}
_DID_OF: dict[Part, str] = {**_DID, "mixture": "learned more of the mixture", "kept": "kept more of the base"}
_WHERE: dict[Part, str] = {
    "mixture": "in what was learned",
    "kept": "in what was kept",
    "unseen": "on unseen tasks",
}


@dataclass(frozen=True)
class Verdict:
    """Conclusions about the merged model; ``print`` it for the sentences.

    Attributes:
        recommendation: Which model to use.
        comparisons: The merged model against every other one, measure by measure.
        sentences: The same in plain words, the recommendation first.
    """

    recommendation: Recommendation

    comparisons: tuple[Comparison, ...]
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.sentences)

    def against(self, other: str) -> Comparison | None:
        """The comparison with one other model; None if there is none."""
        return next((item for item in self.comparisons if item.other == other), None)


def judge(summary: Summary) -> Verdict:
    """What was learned, kept, and carried over to unseen tasks, how to read them together, and how certain that is."""
    found = comparisons(summary)
    advised = recommend(found)
    return Verdict(advised, found, tuple(_sentences(summary, found, advised)))


def _sentences(summary: Summary, found: Sequence[Comparison], advised: Recommendation) -> list[str]:
    averages, remark = summary.macro, summary.about.get("merged")
    opening = [f"merged is not the plain token-weighted average of all branches: {remark}."] if remark else []
    if summary.missing:
        absent = "; ".join(f"{name} ({why})" for name, why in summary.missing.items())
        opening.insert(0, f"Not measured: {absent}.")
    if not any(item.mixture or item.kept or item.unseen or item.drift for item in averages.values()):
        nothing = "Nothing was measured, so nothing can be said about what was learned or kept."
        return [*opening, nothing, _NO_LEARNED, _NO_KEPT, _NO_UNSEEN]
    if "merged" not in averages:
        return ["No merged model was measured, so nothing is compared.", *opening]
    base = next((item for item in found if item.other == "base"), Comparison("base", ()))
    baselines = [item for item in found if item.other != "base"]
    return [
        _advice(advised),
        *opening,
        _learned(averages, base),
        _kept(averages, base, ["base", *(item.other for item in baselines), "merged"]),
        _unseen(averages, base, ["base", *(item.other for item in baselines), "merged"]),
        _both_columns(averages),
        *(_against(item, summary.method) for item in baselines),
        _caution(summary),
    ]


def counted(n: int, what: str) -> str:
    """A number with its noun: 1 dataset, 2 datasets."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _advice(advised: Recommendation) -> str:
    """What to use, and how certain that is."""
    item = advised.against
    if item is None or advised.advice is Advice.UNKNOWN:
        return "No recommendation: too little was measured to compare the merged model with another."
    other = _NAMES.get(item.other, item.other)
    better, worse = ("merged", item.other) if advised.use == "merged" else (item.other, "merged")
    better, worse = _NAMES.get(better, better), _NAMES.get(worse, worse)
    did = f"Use {better}: it {_did(item, worse)}"
    words = {
        Advice.NOTHING_LEARNED: "Use the base: there is no clear sign that the merged model learned this mixture",
        Advice.BETTER: did,
        Advice.ONE_COLUMN: f"{did}; what was kept was not measured on enough data",
        Advice.TRADE: (
            f"A trade-off, no clear winner: the merged model {_columns(item, Side.MORE)}, "
            f"{other} {_columns(item, Side.LESS)}"
        ),
        Advice.EQUAL: f"Use either the merged model or {other}: there is no clear difference between them",
        Advice.MIXED: f"No recommendation: the measures disagree on whether the merged model or {other} did better",
    }
    budget = ", at different training budgets" if item.budgets else ""
    sure = f"at most {100 * ERROR:.0f} % risk of a false call over datasets like these; one training seed"
    return f"{words[advised.advice]} (these models of this run{budget}; {sure})."


def _did(item: Comparison, worse: str) -> str:
    """What the better model of a comparison did."""
    more = _joined([_DID[part] for part, side in item.columns.items() if side in (Side.MORE, Side.LESS)])
    same = [_WHERE[part] for part, side in item.columns.items() if side is Side.SAME]
    return f"{more} than {worse}{', with no clear difference ' + _joined(same, 'or') if same else ''}"


def _columns(item: Comparison, wanted: Side) -> str:
    """What the merged model did better (more) or the other did better (less)."""
    return _joined([_DID_OF[part] for part, side in item.columns.items() if side is wanted])


def _joined(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _learned(averages: Mapping[str, Averages], base: Comparison) -> str:
    ours, theirs = averages["merged"].mixture, averages["base"].mixture
    if not ours or not theirs:
        return _NO_LEARNED
    figures = [f"loss {theirs.loss:.3f} → {ours.loss:.3f} nats/token"]
    if ours.exact_match is not None and theirs.exact_match is not None:
        figures.append(f"exact match {theirs.exact_match:.3f} → {ours.exact_match:.3f}")
    text = (
        f"Learned ({_count(ours)}, base → merged): {', '.join(figures)}. Differences: {_outcomes(base.of('mixture'))}."
    )
    if base.learned in (Side.SAME, Side.LESS):
        text += " There is no clear sign that the merged model learned this mixture."
    elif base.learned is Side.MIXED:
        text += " The two measures disagree on whether the merged model learned this mixture."
    return text


def _kept(averages: Mapping[str, Averages], base: Comparison, shown: Sequence[str]) -> str:
    kept = {name: averages[name].kept for name in shown}
    columns = {
        "loss": {name: item.loss if item else None for name, item in kept.items()},
        "exact match": {name: item.exact_match if item else None for name, item in kept.items()},
    }
    figures = [f"{title} {_list(v, 3)}" for title, v in columns.items() if v["merged"] is not None]
    drifts = {name: averages[name].drift for name in shown if name != "base"}
    if drifts["merged"] is not None:
        moved = {name: item.kl if item else None for name, item in drifts.items()}
        figures.append(f"drift from the base {_list(moved, 4)} nats/token")
    if not figures:
        return _NO_KEPT
    ours = averages["merged"].kept
    text = f"Kept{f' ({_count(ours)})' if ours else ''}: {'; '.join(figures)}."
    items = base.of("kept")
    return text + (f" Differences from the base: {_outcomes(items)}." if items else "")


def _unseen(averages: Mapping[str, Averages], base: Comparison, shown: Sequence[str]) -> str:
    found = {name: averages[name].unseen for name in shown}
    ours = found["merged"]
    if ours is None:
        return _NO_UNSEEN
    figures = [f"loss {_list({name: item.loss if item else None for name, item in found.items()}, 3)}"]
    if ours.exact_match is not None:
        figures.append(
            f"exact match {_list({name: item.exact_match if item else None for name, item in found.items()}, 3)}"
        )
    text = f"Unseen ({_count(ours)}, nobody trains on them): {'; '.join(figures)}."
    items = base.of("unseen")
    return text + (f" Differences from the base: {_outcomes(items)}." if items else "")


def _both_columns(averages: Mapping[str, Averages]) -> str:
    merged = averages["merged"]
    both = bool(merged.mixture and (merged.kept or merged.drift))
    text = "Read them together: " if both else "Learned or kept was not measured, and one alone misleads: "
    text += (
        "a merged model commonly has a higher loss on the training mixture than joint training and still does better "
        "elsewhere (Choi and Kim 2026), while the base itself keeps everything and learns nothing"
    )
    text += "; no column decides alone." if both else "."
    joint, ours = averages["joint"].mixture if "joint" in averages else None, merged.mixture
    if joint and ours and joint.loss != ours.loss:
        gap = ours.loss - joint.loss
        side = "above" if gap > 0 else "below"
        text += f" Here the merged model's mixture loss is {abs(gap):.3f} nats/token {side} joint's."
    return text


def _against(item: Comparison, method: str) -> str:
    """One comparison: the conclusion, then the differences in every column."""
    parts: tuple[tuple[str, Part], ...] = (("learned", "mixture"), ("kept", "kept"), ("unseen", "unseen"))
    figures = "; ".join(f"{word}: {_outcomes(item.of(part))}" for word, part in parts if item.of(part))
    other = _NAMES.get(item.other, item.other)
    title = f"{other} ({item.remark})" if item.remark else other
    if item.budgets is None:
        return f"Against {title}: {_call(item, other, method)} ({figures})"
    ours, theirs = item.budgets
    return (
        f"Against {title}, at a different budget (merged {ours:,} target tokens, {item.other} {theirs:,}): "
        f"{_call(item, other, method)} A difference may come from the budget alone. ({figures})"
    )


def _call(item: Comparison, other: str, method: str) -> str:
    learned, kept, unseen = item.learned, item.kept, item.unseen
    if Side.UNKNOWN in (learned, kept) and not {learned, kept} & {Side.MORE, Side.LESS, Side.MIXED}:
        return "too little was measured to call a difference in what was learned and kept." + _on_unseen(unseen, other)
    no_reason = "" if unseen is Side.MORE else ": this run gives no reason to prefer the merged model"
    more, same, less = Side.MORE, Side.SAME, Side.LESS
    calls = {
        (more, more): "the merged model did better on both: it learned more and kept more.",
        (more, same): "the merged model learned more, with no clear difference in what was kept.",
        (same, more): "the merged model kept more, with no clear difference in what was learned.",
        (less, more): "a trade-off: the merged model learned less of the mixture and kept more of the base.",
        (more, less): "a trade-off: the merged model learned more of the mixture and kept less of the base.",
        (same, same): "no clear difference, either in what was learned or in what was kept.",
        (less, same): f"{other} learned more, with no clear difference in what was kept{no_reason}.",
        (same, less): f"{other} kept more, with no clear difference in what was learned{no_reason}.",
        (less, less): f"{other} did better on both, it learned more and kept more{no_reason}.",
    }
    undecided = f"{_words(learned, 'learned')}, and {_words(kept, 'kept')}; this does not decide for either."
    text = calls.get((learned, kept), undecided)
    if item.kept_by_drift_alone:
        sets = {entry.outcome for entry in item.of("kept") if entry.metric != "drift"}
        said = "show no clear difference" if "unclear" in sets else "are too few to compare"
        text += " What was kept is judged by drift alone" + (f"; the kept sets {said}." if sets else ".")
    text += _on_unseen(unseen, other)
    no_benefit = {learned, kept} <= {same, less} and unseen in (same, less, Side.UNKNOWN)
    if item.budgets is None and item.other == "random" and method in _BY_CONFLICT and no_benefit:
        text += (
            " So splitting by conflict gave this run no benefit over a random split; conclusions about the methods need at "
            f"least {MIN_SEEDS} seeds."
        )
    return text


def _on_unseen(side: Side, other: str) -> str:
    return {
        Side.MORE: " On unseen tasks the merged model did better.",
        Side.LESS: f" On unseen tasks {other} did better.",
        Side.SAME: " On unseen tasks there is no clear difference.",
        Side.MIXED: " On unseen tasks the measures disagree.",
        Side.UNKNOWN: "",
    }[side]


def _words(side: Side, what: str) -> str:
    return {
        Side.MORE: f"the merged model {what} more",
        Side.LESS: f"the merged model {what} less",
        Side.SAME: f"there is no clear difference in what was {what}",
        Side.MIXED: f"the measures of what was {what} disagree",
        Side.UNKNOWN: f"what was {what} was not measured on enough data to say",
    }[side]


def _outcomes(items: Sequence[Difference]) -> str:
    """Each measure's difference with its interval and outcome."""
    said = {"better": "better", "worse": "worse", "unclear": "no clear difference"}
    parts = []
    for item in items:
        digits, unit = (4, "answer") if item.metric == "drift" else (3, "dataset")
        text = f"{_METRICS[item.metric]} {item.difference:+.{digits}f}"
        if item.outcome == "few" or item.ci95 is None:
            text += f" ({counted(item.units, unit)}: too few to compare)"
        else:
            low, high = item.ci95
            text += f" [{low:+.{digits}f}, {high:+.{digits}f}] {said[item.outcome]}"
        parts.append(text)
    return ", ".join(parts)


def _count(average: Average) -> str:
    text = f"mean over {counted(average.datasets, 'held-out dataset')}"
    if average.exact_match is not None and average.exact_match_datasets != average.datasets:
        text += f", exact match over {average.exact_match_datasets}"
    return text


def _list(values: Mapping[str, float | None], digits: int) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in values.items() if value is not None)


def _caution(summary: Summary) -> str:
    units = {(item.part, item.metric): item.units for item in summary.paired if item.outcome != "few"}
    names: dict[tuple[Part, Metric], str] = {
        ("mixture", "loss"): "mixture dataset",
        ("kept", "loss"): "kept dataset",
        ("unseen", "loss"): "unseen task",
        ("kept", "drift"): "answer",
    }
    over = [counted(units[key], name) for key, name in names.items() if key in units]
    seed = f"one training seed, so it is about this run's models; conclusions about methods need at least {MIN_SEEDS} seeds"
    if not over:
        return f"Caution: {seed}. Too little was measured to call any difference."
    answers = " of the base" if ("kept", "drift") in units else ""
    return (
        f"Caution: {seed}. Differences are over {', '.join(over)}{answers}; the 95 % intervals in brackets are each "
        "measure's own, while better and worse are corrected for the number of measures (any false call: at most "
        f"{100 * ERROR:.0f} % per comparison)."
    )
