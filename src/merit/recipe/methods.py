"""What the methods of a study are: their names, and what each changes in the recipe.

A name is ``SOURCE[@KEY=VALUE]...[+MERGE]...``: whose branches, what is trained differently, how they are merged. Pure:
names in, changes of the recipe out; what is done with them is decided elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from merit.errors import nearest
from merit.recipe.schema import MergeSettings, Recipe
from merit.recipe.train import TrainSettings

__all__ = ["Changes", "Method", "Own", "Source", "baseline_of", "methods_of", "own_of"]

Changes = tuple[tuple[str, Any], ...]
"""Recipe keys (``train.epochs``) and their values."""

_SPLITS = ("pca", "raw_pca", "random", "kmeans", "conflict_induced")
_PARTS = re.compile(r"(?P<word>[a-z_]+)(?:-(?P<size>\d+)(?P<axes>d)?)?")
_PLAIN: Changes = (("merge.operator", "average"), ("merge.weights", "uniform"), ("merge.scale", 1.0))
_ORDERS = 1_000_003
"""Distance between the data seeds of a soup's members, so that they do not meet those of other seeds."""

SETS: dict[str, tuple[str, ...]] = {
    "paper": (
        *(
            "base",
            "joint@budget=0.5",
            "joint",
            "joint@budget=2",
            "random-2",
            "random-4",
            "random-8",
            "conflict_induced",
        ),
        *("kmeans-2", "kmeans-4", "kmeans-8", "raw_pca-1d", "raw_pca-2d", "raw_pca-3d"),
        *("soup-2", "soup-3", "soup-4", "pca-1d", "pca-2d", "pca-3d"),
    ),
    "sceptics": ("wise_ft", "finch", "one_budget", "joint_matched"),
    "surgery": ("pcgrad", "gradnorm"),
    "searched": ("own+weights=auto", "random+weights=auto", "joint+weights=auto"),
    "operators": (),  # every merge operator on the recipe's own branches, see methods_of
}
"""Names that stand for several methods."""


@dataclass(frozen=True)
class Own:
    """The recipe's own method: its split, its axes, its epochs."""

    split: str
    axes: int
    epochs: float

    @property
    def name(self) -> str:
        """As a method's name."""
        if self.split in ("pca", "raw_pca"):
            return f"{self.split}-{self.axes}d"
        return self.split if self.split == "joint" else f"{self.split}-{2**self.axes}"


@dataclass(frozen=True)
class Source:
    """Branches that methods share: one split, trained in one way.

    Attributes:
        name: ``pca-2d``, ``joint@batch_size=8``.
        changes: Of the recipe.
        order: Members of a soup after the first are trained on the same rows in other orders: which.
    """

    name: str
    changes: Changes
    order: int = 0

    def data_seed(self, seed: int) -> int:
        """Seed of the order of the rows, where ``seed`` is that of order 0."""
        return (seed + self.order * _ORDERS) % 2**31


@dataclass(frozen=True)
class Method:
    """One line of a study's table.

    Attributes:
        name: Its name.
        sources: Whose branches are merged; none for the base.
        merge: Changes of the recipe's ``merge``; None: the one branch is the model.
        matched: ``joint_matched``: the scale is chosen so that the weights moved as far as the own method's.
    """

    name: str
    sources: tuple[Source, ...] = ()
    merge: Changes | None = ()
    matched: bool = False


def own_of(recipe: Recipe) -> Own:
    """The recipe's own method."""
    return Own(recipe.split.method, recipe.split.axes, recipe.train.epochs)


def baseline_of(recipe: Recipe) -> Method:
    """What the other methods are paired with.

    Raises:
        ValueError: Its name cannot be read.
    """
    return _read(recipe.study.baseline, own_of(recipe))


def methods_of(recipe: Recipe) -> list[Method]:
    """All methods, sets and grids written out, each once, in order; baseline and own method are always among them.

    Raises:
        ValueError: A name cannot be read.
    """
    settings, own = recipe.study, own_of(recipe)
    names = [name for given in settings.methods for name in _members(given, own)]
    names += [f"joint@batch_size={size}" for size in settings.batch_sizes]
    names += [f"{who}@learning_rate={rate:g}" for who in ("joint", "own") for rate in settings.learning_rates]
    names += [
        f"{who}@optimizer=sgd@learning_rate={rate:g}"
        for who in ("joint", "pca-1d", "pca-2d", "pca-3d")
        for rate in settings.sgd_learning_rates
    ]
    names += [f"own@rounds={number}" for number in settings.rounds]
    names += [f"own+weights={rule}" for rule in settings.weights]
    found = {method.name: method for method in (_read(name, own) for name in [settings.baseline, *names, "own"])}
    found |= {method.name: method for method in _searched_alike(list(found.values()), recipe)}
    first = [name for name in ("base", baseline_of(recipe).name) if name in found]
    return [found[name] for name in dict.fromkeys([*first, *found])]


def _searched_alike(methods: Sequence[Method], recipe: Recipe) -> list[Method]:
    """Those that search weights, each with as many points as the one with the most branches would have."""
    searched = [method for method in methods if ("merge.weights", "auto") in (method.merge or ())]
    if not searched or recipe.merge.search.evaluations is not None:
        return searched
    points = max(recipe.merge.search.points(_branches(method)) for method in searched)
    return [replace(method, merge=(*(method.merge or ()), ("merge.search.evaluations", points))) for method in searched]


def _branches(method: Method) -> int:
    return sum(int(2 ** dict(source.changes).get("split.axes", 0)) for source in method.sources)


def _members(name: str, own: Own) -> Iterable[str]:
    if name == "operators":
        listed = get_args(MergeSettings.model_fields["operator"].annotation)
        return [f"own+{operator}" for operator in listed if operator != "average"]
    return SETS.get(name, (name,))


def _read(name: str, own: Own) -> Method:
    """A method by its name.

    Raises:
        ValueError: The name cannot be read; the message says what was expected.
    """
    text = name.replace("own", own.name, 1) if re.match(r"own\b", name) else name
    head, *merges = text.split("+")
    word, *trained = head.split("@")
    if word == "base":
        if trained or merges:
            raise ValueError(f"{name!r}: the base is neither trained nor merged")
        return Method("base")
    alone = _alone(text, own)
    if alone is not None:
        return alone
    changes = tuple(_trained(item, name, own) for item in trained)
    merge = tuple(change for item in merges for change in _merged(item, name))
    if match := re.fullmatch(r"soup-([2-9]|[1-9]\d)", word):
        sources = tuple(_joint(trained, changes, order) for order in range(int(match[1])))
        return Method(text, sources, _PLAIN + merge)
    source = Source("@".join([_canonical(word, own, name), *trained]), (*_split(word, own, name), *changes))
    if word == "joint":
        return Method(text, (source,), _PLAIN + merge if merge else None)
    return Method("+".join([source.name, *merges]), (source,), merge)


def _alone(text: str, own: Own) -> Method | None:
    """The methods with names of their own."""
    if text == "wise_ft":
        return Method(text, (_joint((), (), 0),), (*_PLAIN, ("merge.scale", 0.5)))
    if text == "joint_matched":
        return Method(text, (_joint((), (), 0),), _PLAIN, matched=True)
    if text == "finch":
        return Method(text, (_joint(("scheduler=finch",), (("train.scheduler", "finch"),), 0),), None)
    if text in SETS["surgery"]:
        return Method(text, (_joint((f"balancing={text}",), (("train.balancing", text),), 0),), None)
    if text == "one_budget":
        share = 1 if own.split == "joint" else 1 / 2**own.axes
        return Method(text, (_joint((f"budget={share:g}",), (("train.epochs", own.epochs * share),), 0),), None)
    return None


def _joint(trained: Sequence[str], changes: Changes, order: int) -> Source:
    name = "@".join(["joint", *trained, *([f"order={order}"] if order else [])])
    return Source(name, (("split.method", "joint"), *changes), order)


def _split(word: str, own: Own, name: str) -> Changes:
    if word == "joint":
        return (("split.method", "joint"),)
    method, axes = _method_and_axes(word, own, name)
    return (("split.method", method), ("split.axes", axes))


def _canonical(word: str, own: Own, name: str) -> str:
    if word == "joint":
        return word
    method, axes = _method_and_axes(word, own, name)
    return Own(method, axes, own.epochs).name


def _method_and_axes(word: str, own: Own, name: str) -> tuple[str, int]:
    match = _PARTS.fullmatch(word)
    if match is None or match["word"] not in _SPLITS:
        known = [
            "base",
            "joint",
            "own",
            *_SPLITS,
            "soup-2",
            "wise_ft",
            "finch",
            "one_budget",
            "joint_matched",
            *SETS["surgery"],
            *SETS,
        ]
        raise ValueError(f"there is no method {name!r}.{nearest(word, known)} Methods: {', '.join(known)}")
    method, size = match["word"], match["size"]
    if size is None:
        return method, 1 if method == "conflict_induced" else own.axes
    axes = int(size) if match["axes"] else int(size).bit_length() - 1
    if not 1 <= axes <= 6 or not (match["axes"] or 2**axes == int(size)):
        raise ValueError(
            f"{name!r}: expected the number of axes ({method}-2d) or of groups, a power of two ({method}-4)"
        )
    return method, axes


def _trained(item: str, name: str, own: Own) -> tuple[str, Any]:
    key, separator, text = item.partition("=")
    if key == "budget" and separator:
        return "train.epochs", float(text) * own.epochs
    if not separator or key not in TrainSettings.model_fields:
        known = ["budget", *TrainSettings.model_fields]
        raise ValueError(f"{name!r}: @{item} is not of the form @KEY=VALUE with a key of train.{nearest(key, known)}")
    return f"train.{key}", _value(text)


def _merged(item: str, name: str) -> Changes:
    key, separator, text = item.partition("=")
    if not separator:
        if key not in get_args(MergeSettings.model_fields["operator"].annotation):
            raise ValueError(f"{name!r}: +{item} is neither a merge operator nor of the form +KEY=VALUE")
        return (("merge.operator", key),)
    if key not in MergeSettings.model_fields:
        raise ValueError(
            f"{name!r}: +{item}: merge has no key {key!r}.{nearest(key, list(MergeSettings.model_fields))}"
        )
    return ((f"merge.{key}", _value(text)),)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "null": None}.get(text, text)
