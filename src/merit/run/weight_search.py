"""How merge weights are searched in a run: which held-out rows choose and which report, and a model that moves in memory.

The search itself is :mod:`merit.merge.search`. No checkpoint is written per point: one model is set in place to
θ0 + Σ c_k δ_k. Every measured point is appended to a file next to the output, so that a search that was killed goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from merit.errors import MergeError
from merit.evaluation import drift
from merit.evaluation.figures import Drift
from merit.evaluation.fixed import FixedBatches
from merit.evaluation.forward import Forward
from merit.evaluation.halves import halves_of, row_digest
from merit.files import appending, checksum, fingerprint, scratch, sealed, write_text
from merit.hf.inplace import Direction, Folder, Held, InPlace, TaskVector, blocks_of
from merit.hf.models import autocast, load_model, trainable_names
from merit.hf.rows import EncodedRow
from merit.merge.adapter import read_adapters
from merit.merge.agreement import match_tensors
from merit.merge.direction import AdapterDirection
from merit.merge.search import Objective, RowLosses, implied_ratios, rival_points, search_weights
from merit.merge.searched import WeightSearch
from merit.merge.stage import are_adapters
from merit.merge.weights import Branch, Losses
from merit.mixture import draw, load_split
from merit.progress import Progress, size
from merit.recipe.schema import Recipe
from merit.run.scale_search import drift_reference
from merit.run.session import Session

__all__ = ["hold", "log_file", "search_run_weights"]

_RIVALS = 24
"""Points that are measured on the reporting rows for the intervals."""


def log_file(output: Path) -> Path:
    """Where the points of a search for ``output`` are kept until it is merged."""
    return output.with_name(f".{output.name}.search.jsonl")


def search_run_weights(
    session: Session,
    recipe: Recipe,
    groups: Sequence[Mapping[str, int]],
    branches: Sequence[Branch],
    output: Path,
    progress: Progress,
) -> WeightSearch:
    """Search the weights of a run's branches together with λ.

    Learned: mean over datasets of the held-out loss per target token. Kept: the same on the kept sets; without such sets, or
    for ``learned_under_drift``, the divergence from the base on the base's own answers.

    Args:
        session: The command's session.
        recipe: The scope's.
        groups: Tokens by dataset of every branch.
        branches: The branches, weighted by tokens.
        output: Where the merge will be; the points are kept next to it.
        progress: In points.

    Raises:
        MergeError: There are too few held-out rows, or no point is within the bound.
    """
    settings, total = recipe.merge.search, sum(float(branch.weight) for branch in branches)
    start = [float(branch.weight) / total for branch in branches]
    model = load_model(session.base, session.device)
    moved, directions, memory = _in_memory(session, recipe, model, branches)
    with scratch(output) as folder, autocast(recipe.model, session.device):
        choosing, reporting, left_out = _halves(session, recipe, model, folder)
        log = _Log(log_file(output), _key(session, recipe, branches, start, choosing))
        count = settings.points(len(branches))
        with moved.moving() as move:

            def at(coefficients: Sequence[float]) -> PreTrainedModel:
                move(list(zip(coefficients, directions, strict=True)))
                return model

            def losses(coefficients: tuple[float, ...]) -> Losses:
                progress(len(log.known), count, f"λ = {sum(coefficients):.3f}")
                return log.measured(coefficients, lambda: choosing.losses(at(coefficients)))

            names = tuple(branch.name for branch in branches)
            found = search_weights(losses, start, settings, recipe.seed, names)
            points = found.points
            rivals = rival_points(points, found.chosen, Objective(settings, points[0], points[1]), _RIVALS)
            measured = []
            for number, rival in enumerate(rivals):
                progress(number, len(rivals), "reporting rows")
                measured.append(reporting.rows(at(rival.coefficients)))
    learned, kept = (_stacked([pair[side] for pair in measured]) for side in (0, 1))
    once = np.ones((1, learned.sums.shape[1])), np.ones((1, kept.sums.shape[1]))
    means = zip(learned.means(once[0])[0], kept.means(once[1])[0], strict=True)
    reported = [Losses(float(a), float(b)) for a, b in means]
    shown = [*reported[:2], reported[rivals.index(found.chosen)]]
    return replace(
        found,
        kept=choosing.words,
        reported=dict(zip(("base", "by tokens", "chosen"), shown, strict=True)),
        ratios=implied_ratios(found, groups, rivals, learned, kept, settings),
        rows={"choosing": choosing.size, "reporting": reporting.size},
        left_out=left_out,
        memory=memory,
        seconds=round(log.seconds, 3),
    )


# ---- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Half:
    """One half of the held-out rows, batched once.

    Attributes:
        learned: The mixture's.
        kept: The kept sets'; None if drift takes their place.
        reference: The base on its own answers to this half's prompts.
        forward: How rows go through the model.
    """

    learned: FixedBatches
    kept: FixedBatches | None
    reference: drift.Reference | None
    forward: Forward

    @property
    def words(self) -> str:
        """What ``kept`` is."""
        return (
            "held-out loss on the kept sets"
            if self.kept is not None
            else "divergence from the base on its own answers (nats per token)"
        )

    @property
    def size(self) -> int:
        """Number of rows and prompts."""
        prompts = len(self.reference.rows) if self.reference is not None else 0
        return len(self.learned.rows) + (len(self.kept.rows) if self.kept is not None else prompts)

    def losses(self, model: PreTrainedModel) -> Losses:
        """Learned and kept loss of a model."""
        learned = self.learned.losses(model).macro
        return Losses(learned, self._drift(model).kl if self.kept is None else self.kept.losses(model).macro)

    def rows(self, model: PreTrainedModel) -> tuple[RowLosses, RowLosses]:
        """The same row by row: one point each."""
        return _rows(self.learned, model), self._kept_rows(model)

    def _kept_rows(self, model: PreTrainedModel) -> RowLosses:
        if self.kept is not None:
            return _rows(self.kept, model)
        found = self._drift(model)
        counts = np.array(found.token_counts)
        return RowLosses(np.array([found.kl_sums]), counts, np.zeros(len(counts), dtype=np.int64))

    def _drift(self, model: PreTrainedModel) -> Drift:
        assert self.reference is not None
        return drift.measure_drift(model, self.reference, self.forward)


def _rows(batches: FixedBatches, model: PreTrainedModel) -> RowLosses:
    found = batches.losses(model)
    return RowLosses(found.sums[None], found.counts, found.owners)


def _stacked(parts: Sequence[RowLosses]) -> RowLosses:
    return RowLosses(np.concatenate([part.sums for part in parts]), parts[0].counts, parts[0].owners)


def _halves(
    session: Session, recipe: Recipe, model: PreTrainedModel, folder: Path
) -> tuple[_Half, _Half, tuple[str, ...]]:
    """Both halves, and the datasets that have no reporting rows."""
    sets = {part: load_split(session.run / "mixture", part) for part in ("test", "kept")}
    halves = halves_of(sets["test"], sets["kept"], session.recipe.seed)  # of the run: all seeds of a study report alike
    search = recipe.merge.search
    by_drift = search.objective == "learned_under_drift" or not sets["kept"]
    if search.objective == "learned_under_kept" and not sets["kept"]:
        raise MergeError(
            "merge.search.objective: learned_under_kept needs kept sets, and the run has none.",
            "Set evaluate.kept_folder, or use objective: learned_under_drift, which needs no data.",
        )

    def taken(part: str, half: Mapping[str, list[int]]) -> dict[str, list[EncodedRow]]:
        found = {}
        for name, dataset in sets[part].items():
            usable = [i for i in half[name] if dataset.target_counts[i] > 0]
            order = draw(len(usable), search.rows, recipe.seed, name, purpose=f"weight search {part}")
            if usable:
                found[name] = [dataset[usable[int(i)]] for i in np.sort(order)]
        return found

    def half(which: str) -> _Half:
        rows = {part: taken(part, getattr(halves[part], which)) for part in sets}
        if not rows["test"] or not (by_drift or rows["kept"]):
            raise MergeError(
                f"merge.weights: auto needs at least two different held-out rows, one to choose and one to report: none are "
                f"left for {which} in the {'mixture' if not rows['test'] else 'kept sets'}.",
                "Give the datasets test rows (test.jsonl), or list the weights.",
            )
        forward = Forward(session.base.batcher, session.device, recipe.evaluate.batch_tokens)
        reference = drift_reference(session, model, rows["test"], folder) if by_drift else None
        kept = None if by_drift else FixedBatches(rows["kept"], forward, model)
        return _Half(FixedBatches(rows["test"], forward, model), kept, reference, forward)

    used = ["test"] if by_drift else ["test", "kept"]
    left_out = [name for part in used for name in sets[part] if not halves[part].reporting[name]]
    return half("choosing"), half("reporting"), tuple(left_out)


# ---- weights --------------------------------------------------------------------------------------------------------


def _in_memory(
    session: Session, recipe: Recipe, model: PreTrainedModel, branches: Sequence[Branch]
) -> tuple[InPlace, list[Direction], str]:
    """The model with its base and task vectors, held in float32 if they take at most half of the free memory.

    Returns:
        The model, the branches' directions, and how they are kept, in words.
    """
    values = Folder(session.base.folder)
    if are_adapters([branch.path for branch in branches]):
        adapters, _ = read_adapters(values.head, branches)
        directions: list[Direction] = [AdapterDirection(adapter) for adapter in adapters]
        names = {name for part in adapters for name in (*part.pairs, *part.full, *part.shifts)}
    else:
        names = trainable_names(list(values.shapes), recipe.model.trainable, session.base.family)
        heads = [Folder(branch.path).head for branch in branches]
        directions = [
            TaskVector(Folder(branch.path, match_tensors(values.head, head, branch.name, any_float=True)[0]))
            for branch, head in zip(branches, heads, strict=True)
        ]
    place = InPlace(model, values, names)
    needed, free = 4 * place.size * (len(branches) + 1), int(psutil.virtual_memory().available)
    rule = f"{size(needed)} needed, {size(free)} free, at most half of it used"
    if 2 * needed > free:
        return place, directions, f"read from disk for every point ({rule})"
    moved, held = hold(place, directions)
    return moved, list(held), f"held in memory ({rule})"


def hold(place: InPlace, directions: Sequence[Direction]) -> tuple[InPlace, list[Held]]:
    """The same model with θ0 and the directions in memory, float32: K + 1 times the entries that move."""
    base = Held({name: tensor.clone() for name, tensor in place.tensors.items()})
    held = [_held(place, direction) for direction in directions]
    return InPlace(place.model, base, place.tensors), held


def _held(place: InPlace, direction: Direction) -> Held:
    tensors = {}
    for name, tensor in place.tensors.items():
        parts = []
        for block in blocks_of(name, tensor.shape):
            base = place.base.read(block).to("cpu", torch.float32)
            change = direction.change(block, base)
            parts.append(torch.zeros_like(base) if change is None else change)
        if parts:
            tensors[name] = torch.cat(parts).view(tensor.shape)
    return Held(tensors)


# ---- resuming -------------------------------------------------------------------------------------------------------


def _key(session: Session, recipe: Recipe, branches: Sequence[Branch], start: Sequence[float], choosing: _Half) -> str:
    """What determines a point's losses and which points are asked for."""
    rows = [row_digest(row, 0).hex() for row in choosing.learned.rows]
    rows += [row_digest(row, 0).hex() for row in (choosing.kept.rows if choosing.kept is not None else ())]
    return fingerprint(
        {
            "search": recipe.merge.search.model_dump(mode="json"),
            "seed": recipe.seed,
            "dtype": recipe.model.dtype,
            "base": session.base.fingerprint,
            "branches": [branch.fingerprint for branch in branches],
            "start": list(start),
            "rows": rows,
            "drift": None if choosing.reference is None else recipe.evaluate.drift.model_dump(mode="json"),
        }
    )


class _Log:
    """Every measured point, one JSON line each with its checksum; the first line says of what. A damaged line is ignored.

    Args:
        path: The file; removed if it is of another search.
        key: Of this search.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self.known: dict[tuple[float, ...], Losses] = {}
        self.seconds = 0.0
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        good = [json.dumps({"search": key})]
        if lines and lines[0] == good[0]:
            for line in lines[1:]:
                with suppress(ValueError, KeyError, TypeError):
                    item = json.loads(line)
                    if item["checksum"] != checksum(item):
                        continue
                    point = tuple(float(c) for c in item["coefficients"])
                    self.known[point] = Losses(float(item["learned"]), float(item["kept"]))
                    self.seconds += float(item["seconds"])
                    good.append(line)
        write_text(path, "\n".join(good) + "\n")

    def measured(self, coefficients: tuple[float, ...], measure: Callable[[], Losses]) -> Losses:
        """A point's losses: remembered, or measured now and appended."""
        if coefficients not in self.known:
            started = time.perf_counter()
            found = measure()
            seconds = round(time.perf_counter() - started, 6)
            line = json.dumps(sealed({"coefficients": coefficients, **asdict(found), "seconds": seconds}))
            with appending(self._path) as file:
                file.write(line.encode() + b"\n")
            self.known[coefficients] = found
            self.seconds += seconds
        return self.known[coefficients]
