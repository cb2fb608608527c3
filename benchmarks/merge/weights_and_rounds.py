"""Merge weights and rounds on the text demo's mixture: learned, kept, unseen and drift, over seeds.

    OMP_NUM_THREADS=1 python benchmarks/merge/weights_and_rounds.py --seeds 5

For every seed: joint training, and a conflict-aware (pca) and a random split into four groups, trained in R = 1, 2, 4, 8
rounds, all at the same budget of rows. The branches of R = 1 are also merged with other fixed weights and with searched
ones; the joint model gets WiSE-FT's α by the same search with the same number of points. Every figure is measured on rows
that chose nothing. Seeds that are done are kept in the output, so that a run can be stopped and gone on with. Writes
benchmarks/results/NAME.json, .md and .png (matplotlib: extra plots).

Everything happens in one process and in memory: gradients, split, row order, learning rates, loss, optimizer and search are
the package's own; the loop around them is written here, without checkpoints and files, which would take most of the time for
budgets as small as these. For the first seed one branch is also trained by ``merit.train_branch`` and compared.

Kept at equal learned: along the line θ0 + λ τ of every model, the kept loss where the learned loss has fallen by 20, 50, 75
and 90 % of what joint training learns (α = 1); interpolated between measured λ, never where the line does not get there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark import RESULTS, machine
from safetensors.torch import load_file
from transformers import PreTrainedModel

from merit.conflict.stage import measure_gradients
from merit.demo import write_demo
from merit.evaluation import drift
from merit.evaluation.fixed import FixedBatches
from merit.evaluation.forward import Forward
from merit.evaluation.halves import halves_of
from merit.evaluation.heldout import end_tokens
from merit.hf.base import Base, open_base
from merit.hf.batches import target_losses
from merit.hf.inplace import Direction, Held, InPlace, floating_tensors
from merit.hf.models import load_model, trainable_parameters
from merit.merge.search import search_weights
from merit.merge.weights import Losses
from merit.mixture import EncodedDataset, Mixture, draw, find_datasets
from merit.mixture.stage import encode_mixture
from merit.recipe.load import load_recipe
from merit.recipe.schema import Recipe
from merit.split.stage import split_mixture
from merit.train.batches import GroupRows, StepOrder
from merit.train.branch import train_branch
from merit.train.optimizers import make_optimizer, make_schedule
from merit.train.rounds import Round

SETTINGS = ("rows", "batch", "rate", "measured", "evaluations", "examples")
ROUNDS = (1, 2, 4, 8)
SCALES = (0.25, 0.5, 0.75, 1.0)
LEVELS = (0.2, 0.5, 0.75, 0.9)
FIXED = ("tokens", "target_tokens", "samples", "uniform")
State = dict[str, torch.Tensor]


# ---- training in memory ---------------------------------------------------------------------------------------------


@dataclass
class Branch:
    """One group in training: its rows, its optimizer's state between rounds, what it has been trained on."""

    rows: GroupRows
    optimizer: dict[str, Any] | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIXED, 0))
    state: State = field(default_factory=dict)


class Trainer:
    """One loaded model, on which all branches are trained one after another."""

    def __init__(self, base: Base, recipe: Recipe) -> None:
        self.base, self.recipe, self.settings = base, recipe, recipe.train
        self.model = load_model(base, torch.device("cpu"), trainable=True)
        self.start = {name: p.detach().clone() for name, p in trainable_parameters(self.model).items()}

    @torch.no_grad()
    def put(self, state: State) -> None:
        for name, parameter in trainable_parameters(self.model).items():
            parameter.copy_(state[name])

    def rounds(self, groups: Sequence[Mapping[str, EncodedDataset]], count: int) -> tuple[State, list[Branch]]:
        """The merge after the last round (weighted by all tokens), and the branches as they went into it."""
        branches = [Branch(GroupRows(group)) for group in groups]
        start = self.start
        for number in range(1, count + 1):
            shares = [self.part(branch, start, Round(number, count)) for branch in branches]
            if number == count:
                shares = [branch.counts["tokens"] for branch in branches]
            weights = [share / sum(shares) for share in shares]
            pairs = list(zip(weights, branches, strict=True))
            start = {name: sum(w * b.state[name].double() for w, b in pairs).float() for name in start}  # type: ignore[union-attr]
        return start, branches

    def part(self, branch: Branch, start: State, one: Round) -> int:
        """One round of one branch; the tokens that it took."""
        settings, rows = self.settings, branch.rows
        self.put(start)
        self.model.train()
        optimizer = make_optimizer(self.model, settings)
        first, last, total = one.span(len(rows), settings.batch_size, settings.epochs)
        rates = self.rates(total)
        if branch.optimizer is not None:
            optimizer.load_state_dict(branch.optimizer)
        order = list(StepOrder(len(rows), settings.batch_size, self.recipe.seed, total))
        before = branch.counts["tokens"]
        for step in range(first, last):
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            batch = self.base.batcher([rows[i] for i in order[step]])
            losses, counts = target_losses(self.model, batch)
            (losses.sum() / counts.sum()).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            taken = {"tokens": int(batch["attention_mask"].sum()), "target_tokens": int(counts.sum())}
            for name, value in {**taken, "samples": len(order[step])}.items():
                branch.counts[name] += value
        branch.counts["uniform"] = 1
        branch.optimizer = optimizer.state_dict()
        branch.state = {name: p.detach().clone() for name, p in trainable_parameters(self.model).items()}
        self.model.eval()
        return branch.counts["tokens"] - before

    def rates(self, total: int) -> list[float]:
        optimizer = make_optimizer(self.model, self.settings)
        schedule, rates = make_schedule(optimizer, self.settings, total), []
        for _ in range(total):
            rates.append(float(schedule.get_last_lr()[0]))
            optimizer.step()
            schedule.step()
        return rates


def agreement(trainer: Trainer, group: Mapping[str, EncodedDataset], branch: Branch) -> float:
    """Largest difference between the loop here and ``train_branch``, over the largest change of a weight."""
    with tempfile.TemporaryDirectory() as folder:
        train_branch(group, trainer.base, Path(folder) / "b", trainer.settings, seed=trainer.recipe.seed)
        theirs = load_file(Path(folder) / "b" / "model" / "model.safetensors")
    moved = max(float((branch.state[n] - trainer.start[n]).abs().max()) for n in branch.state)
    return max(float((branch.state[n] - theirs[n].float()).abs().max()) for n in branch.state) / moved


# ---- measuring ------------------------------------------------------------------------------------------------------


class Measures:
    """One seed's rows in halves, and a model that moves."""

    def __init__(self, trainer: Trainer, mixture: Mixture, rows: int) -> None:
        recipe, base = trainer.recipe, trainer.base
        sets: dict[str, Mapping[str, EncodedDataset]] = {
            "test": mixture.test,
            "kept": mixture.kept,
            "unseen": mixture.unseen,
        }
        halves = halves_of(sets["test"], sets["kept"], recipe.seed)
        self.model = load_model(base, torch.device("cpu"))
        self._forward = Forward(base.batcher, torch.device("cpu"), recipe.evaluate.batch_tokens)

        def batches(part: str, half: str) -> FixedBatches:
            chosen = {}
            for name, dataset in sets[part].items():
                numbers = getattr(halves[part], half)[name] if part in halves else range(len(dataset))
                chosen[name] = [dataset[i] for i in list(numbers)[:rows]]
            return FixedBatches({name: part for name, part in chosen.items() if part}, self._forward, self.model)

        self.choosing = batches("test", "choosing"), batches("kept", "choosing")
        self.reporting = {"learned": batches("test", "reporting"), "kept": batches("kept", "reporting")}
        if sets["unseen"]:
            self.reporting["unseen"] = batches("unseen", "reporting")
        prompts = {name: [dataset[i] for i in halves["test"].reporting[name]] for name, dataset in sets["test"].items()}
        self._scratch = tempfile.TemporaryDirectory()
        self._reference = self._sample(prompts, base, recipe.seed)
        tensors = floating_tensors(self.model)
        self.place = InPlace(self.model, Held({name: tensor.clone() for name, tensor in tensors.items()}))
        self._start = trainer.start

    def _sample(self, rows: Mapping[str, list[Any]], base: Base, seed: int) -> drift.Reference:
        chosen = drift.choose_prompts({name: len(part) for name, part in rows.items()}, 16, seed)
        prompts = [rows[name][i].prompt() for name, i in chosen]
        answers = drift.sample_answers(self.model, prompts, 24, end_tokens(rows, base.tokenizer), self._forward, seed)
        pairs = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if len(answer)]
        return drift.Reference.of_base(
            self.model, [p for p, _ in pairs], [a for _, a in pairs], Path(self._scratch.name), self._forward
        )

    def direction(self, state: State) -> Direction:
        """δ of a state, in memory."""
        return Held({name: state[name] - start for name, start in self._start.items()})

    def choose(self, terms: Sequence[tuple[float, Direction]]) -> Losses:
        with self.place.at(*terms) as model:
            return Losses(*(part.losses(model).macro for part in self.choosing))

    def report(self, terms: Sequence[tuple[float, Direction]], *, all_of_them: bool = True) -> dict[str, float]:
        names = list(self.reporting) if all_of_them else ["learned", "kept"]
        with self.place.at(*terms) as model:
            found = {name: self.reporting[name].losses(model).macro for name in names}
            if all_of_them:
                found["drift"] = self._drift(model)
        return found

    def _drift(self, model: PreTrainedModel) -> float:
        return drift.measure_drift(model, self._reference, self._forward).kl


@dataclass(frozen=True)
class Data:
    """The demo's base and rows, encoded once for all seeds."""

    recipe: Path
    base: Base
    mixture: Mixture

    @classmethod
    def of(cls, folder: Path) -> Data:
        file = write_demo(folder / "demo")
        recipe = load_recipe(file)
        base, found = open_base(recipe.model), find_datasets(recipe.mixture, recipe.evaluate)
        return cls(file, base, encode_mixture(found, base, folder / "mixture", max_length=recipe.train.max_length))


def say(what: str) -> None:
    print(f"  {time.process_time():.0f} CPU s: {what}", flush=True)


def one_seed(data: Data, seed: int, words: argparse.Namespace) -> dict[str, Any]:
    """Train everything for one seed and measure it."""
    with tempfile.TemporaryDirectory() as place:
        changes = [f"seed={seed}", f"train.batch_size={words.batch}", f"train.learning_rate={words.rate}"]
        changes += [f"conflict.examples={words.examples}", "train.threads=1", "train.save_dtype=float32"]
        recipe, base, mixture = load_recipe(data.recipe, changes), data.base, data.mixture
        train = {
            name: rows.take(np.sort(draw(len(rows), words.rows, seed, name, purpose="show")))
            for name, rows in mixture.train.items()
        }
        sizes = {name: len(rows) for name, rows in train.items()}
        geometry = measure_gradients(train, base, recipe.conflict, seed, Path(place) / "conflict")
        say(f"seed {seed}: gradients")
        trainer = Trainer(base, recipe)
        measures = Measures(trainer, mixture, words.measured)
        models = {"base": measures.report([])}
        lines: dict[str, list[dict[str, float]]] = {}
        searches: dict[str, Any] = {}
        agreed = None

        def measure(name: str, direction: Direction) -> None:
            models[name] = measures.report([(1.0, direction)])
            ends = {0.0: models["base"], 1.0: models[name]}
            lines[name] = [
                {"scale": scale, **(ends.get(scale) or measures.report([(scale, direction)], all_of_them=False))}
                for scale in (0.0, *SCALES)
            ]

        def search(name: str, directions: Sequence[Direction], start: Sequence[float]) -> None:
            settings = recipe.merge.search.model_copy(update={"evaluations": words.evaluations})
            result = search_weights(
                lambda c: measures.choose(list(zip(c, directions, strict=True))), start, settings, seed
            )
            searches[name] = {"scale": result.scale, "weights": list(result.weights), "points": len(result.points)}
            models[name] = measures.report(list(zip(result.chosen.coefficients, directions, strict=True)))

        joint, _ = trainer.rounds([train], 1)
        measure("joint", measures.direction(joint))
        say("joint")
        search("joint wise-ft", [measures.direction(joint)], [1.0])
        for method in ("pca", "random"):
            split = split_mixture(method, 2, weights=sizes, geometry=geometry if method == "pca" else None, seed=seed)
            groups = [{name: train[name] for name in group} for group in split.groups]
            for rounds in ROUNDS:
                merged, branches = trainer.rounds(groups, rounds)
                measure(f"{method}-{rounds}", measures.direction(merged))
                say(f"{method}, {rounds} rounds")
                if rounds > 1:
                    continue
                if seed == 0 and method == "pca":
                    agreed = agreement(trainer, groups[0], branches[0])
                directions = [measures.direction(branch.state) for branch in branches]
                for rule in FIXED:
                    total = sum(branch.counts[rule] for branch in branches)
                    shares = [branch.counts[rule] / total for branch in branches]
                    models[f"{method} {rule}"] = measures.report(list(zip(shares, directions, strict=True)))
                    if rule == "tokens":
                        search(f"{method} auto", directions, shares)
        return {"seed": seed, "agreement": agreed, "models": models, "lines": lines, "searches": searches}


# ---- tables ---------------------------------------------------------------------------------------------------------


def kept_at(line: list[dict[str, float]], base: float, gain: float, level: float) -> float | None:
    """Kept loss where the line first reaches a learned loss; None where it does not within its scales."""
    wanted = base - level * gain
    for one, two in pairwise(line):
        if one["learned"] >= wanted >= two["learned"]:
            part = (one["learned"] - wanted) / (one["learned"] - two["learned"])
            return one["kept"] + part * (two["kept"] - one["kept"])
    return None


def cell(values: Sequence[float | None]) -> str:
    good = [value for value in values if value is not None]
    if not good:
        return "never"
    spread = f" ± {statistics.stdev(good):.3f}" if len(good) > 1 else ""
    missing = f" ({len(good)} of {len(values)})" if len(good) < len(values) else ""
    return f"{statistics.mean(good):.3f}{spread}{missing}"


def write(seeds: list[dict[str, Any]], words: argparse.Namespace) -> None:
    """Table and plot of the seeds so far."""
    order = ["base", "joint", "joint wise-ft"]
    for method in ("pca", "random"):
        order += [f"{method} {rule}" for rule in (*FIXED, "auto")] + [f"{method}-{rounds}" for rounds in ROUNDS[1:]]
    columns = [c for c in ("learned", "kept", "unseen", "drift") if c in seeds[0]["models"]["base"]]
    host = machine()
    lines = [
        "# Merge weights and rounds on the text demo's mixture",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/merge/weights_and_rounds.py --seeds {len(seeds)} "
        + " ".join(f"--{name} {getattr(words, name)}" for name in (*SETTINGS, "name"))
        + "`",
        "",
        f"{len(seeds)} seeds; {words.rows} training rows per dataset, one epoch in batches of {words.batch}, peak rate "
        f"{words.rate:g}, K = 4; every figure on up to {words.measured} rows per dataset that chose nothing; "
        f"{words.evaluations} points per search. Means ± standard deviation over seeds; nats per target token, means over "
        "datasets; lower is better everywhere.",
        "",
        "| model | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in order:
        cells = [cell([seed["models"][name][column] for seed in seeds]) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "`pca tokens`, `random tokens` are the paper's merge (R = 1); `-2`, `-4`, `-8` are rounds; `auto`, `wise-ft`: the",
        "knee, searched on the other half of the rows.",
        "",
        "Kept loss at equal learned loss, along each model's line θ0 + λ τ (λ from 0 to 1): where the learned loss has",
        "fallen by that part of what joint training learns.",
        "",
        "| model | " + " | ".join(f"{level:.0%}" for level in LEVELS) + " |",
        "|---|" + "---|" * len(LEVELS),
    ]
    for name in ["joint", *(f"{method}-{rounds}" for method in ("pca", "random") for rounds in ROUNDS)]:
        cells = []
        for level in LEVELS:
            values = []
            for seed in seeds:
                base, joint = seed["models"]["base"]["learned"], seed["models"]["joint"]["learned"]
                values.append(kept_at(seed["lines"][name], base, base - joint, level))
            cells.append(cell(values))
        lines.append(f"| {name.replace('joint', 'joint (WiSE-FT)')} | {' | '.join(cells)} |")
    searches = [seed["searches"] for seed in seeds]
    lines += ["", "Searched λ and weights by seed:", ""]
    for name in searches[0]:
        found = [f"λ {s[name]['scale']:.2f}, w {', '.join(f'{w:.2f}' for w in s[name]['weights'])}" for s in searches]
        lines.append(f"- {name}: {'; '.join(found)}")
    lines += ["", f"{host['cores']} cores ({host['cpu']}), {host['memory_gib']} GiB; {datetime.date.today()}.", ""]
    out = RESULTS / words.name
    out.with_suffix(".md").write_text("\n".join(lines))
    settings = {name: getattr(words, name) for name in SETTINGS}
    values = {"date": str(datetime.date.today()), "machine": host, "settings": settings, "seeds": seeds}
    out.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n")
    plot(seeds, out.with_suffix(".png"))


def plot(seeds: list[dict[str, Any]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axis, method in zip(axes, ("pca", "random"), strict=True):
        names = ["joint", *(f"{method}-{rounds}" for rounds in ROUNDS)]
        for number, name in enumerate(names):
            learned = np.mean([[p["learned"] for p in seed["lines"][name]] for seed in seeds], axis=0)
            kept = np.mean([[p["kept"] for p in seed["lines"][name]] for seed in seeds], axis=0)
            style = {"color": "black", "linestyle": "--"} if name == "joint" else {"color": f"C{number}"}
            label = "joint, WiSE-FT line" if name == "joint" else f"R = {name.rpartition('-')[2]}"
            axis.plot(learned, kept, marker="o", markersize=3, label=label, **style)
        for mark, rule in zip("s^vDP*", (*FIXED, "auto"), strict=False):
            points = [seed["models"][f"{method} {rule}"] for seed in seeds]
            x, y = (statistics.mean(p[c] for p in points) for c in ("learned", "kept"))
            axis.plot(x, y, mark, color="C1", markersize=10 if rule == "auto" else 6, label=rule)
        axis.set(
            title={"pca": "conflict-aware split", "random": "random split"}[method], xlabel="learned (mixture loss) ↓"
        )
        axis.legend(fontsize=7)
    axes[0].set_ylabel("kept (loss on kept sets) ↓")
    figure.suptitle(f"Means of {len(seeds)} seeds; lines: λ from 0 (base) to 1")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="Training rows per dataset.")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=8e-6)
    parser.add_argument(
        "--measured", type=int, default=2, help="Rows per dataset and half that a point is measured on."
    )
    parser.add_argument("--evaluations", type=int, default=20, help="Points per search.")
    parser.add_argument("--examples", type=int, default=6, help="Calibration examples per dataset.")
    parser.add_argument("--name", default="merge_weights_and_rounds", help="Of the files in benchmarks/results.")
    words = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: getattr(words, name) for name in SETTINGS}
    seeds: list[dict[str, Any]] = []
    file = RESULTS / f"{words.name}.json"
    if file.is_file():
        stored = json.loads(file.read_text())
        seeds = stored["seeds"] if stored["settings"] == settings else []
    with tempfile.TemporaryDirectory() as place:
        data = Data.of(Path(place))
        for seed in range(words.seeds):
            if seed not in [done["seed"] for done in seeds]:
                seeds.append(one_seed(data, seed, words))
                write(seeds, words)


if __name__ == "__main__":
    main()
