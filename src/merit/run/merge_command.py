"""What the words of `merit merge` mean, and merging checkpoints of one base outside a run. It loads no ML library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from merit.errors import MergeError, RecipeError
from merit.merge import Branch, MergeResult, merge_branches, merge_into_adapter
from merit.merge.operators import Options, operator_and_options
from merit.merge.stage import are_adapters
from merit.progress import Reporter, count
from merit.recipe.schema import MergeSettings


@dataclass(frozen=True)
class Words:
    """How to merge, as given on the command line; None where not given.

    Attributes:
        operator, weights, scale, options, dtype: As in the recipe's ``merge`` block; options as KEY=VALUE.
        adapter: full, concat or recompress.
        rank: For recompress.
    """

    operator: str | None = None
    weights: str | None = None
    scale: str | None = None
    options: tuple[str, ...] = ()
    dtype: str | None = None
    adapter: str = "full"
    rank: int | None = None

    def overrides(self) -> list[str]:
        """The words as overrides of a run's recipe.

        Raises:
            RecipeError: An option is only for checkpoints outside a run.
        """
        if self.adapter != "full" or self.rank is not None:
            raise RecipeError(
                "merge: --adapter and --rank need --base and --checkpoint; a run's merge is a full model."
            )
        given = {"operator": self.operator, "weights": self.weights, "scale": self.scale, "dtype": self.dtype}
        found = [f"merge.{key}={value}" for key, value in given.items() if value is not None]
        if self.operator is not None and not self.options:
            found.append("merge.options={}")  # the recipe's options belong to the recipe's operator
        return found + [f"merge.options.{option}" for option in self.options]

    def settings(self) -> MergeSettings:
        """The words as settings of a merge outside a run.

        Raises:
            MergeError: One is malformed, or they cannot be combined.
        """
        if self.weights is not None:
            raise MergeError("--weights needs a run; outside of one every --checkpoint DIR=WEIGHT has its own.")
        if self.scale == "auto":
            raise MergeError(
                "--scale auto needs held-out data, which only a run has.", "Give a number here, or merge a run folder."
            )
        if self.adapter not in ("full", "concat", "recompress"):
            raise MergeError(f"--adapter {self.adapter}: expected full, concat or recompress.")
        if (self.rank is not None) != (self.adapter == "recompress"):
            raise MergeError(
                "--rank R and --adapter recompress need each other.",
                "There is no good default: independent branches lose most of the merge at one branch's rank.",
            )
        if self.adapter != "full" and (self.operator not in (None, "average") or self.options or self.dtype):
            raise MergeError(
                f"--adapter {self.adapter} makes a weighted average in float32; --operator, --option and --dtype do not "
                "go with it.",
                "Leave them out, or use --adapter full.",
            )
        given = {"operator": self.operator, "scale": self.scale, "dtype": self.dtype}
        operator_and_options(self.operator or "average", options := _options(self.options))
        try:
            known = {key: value for key, value in given.items() if value is not None}
            return MergeSettings.model_validate({**known, "options": options})
        except ValidationError as error:
            first = error.errors()[0]
            word = str(first["loc"][0])
            raise MergeError(f"--{word} {given.get(word)}: {first['msg'][:1].lower()}{first['msg'][1:]}.") from None


def merge_checkpoints(
    reporter: Reporter, base: Path | None, checkpoints: Sequence[str], output: Path | None, words: Words
) -> MergeResult:
    """Merge checkpoint folders (or LoRA adapters) of one base with given weights, outside any run.

    Raises:
        MergeError: An option is missing or malformed, or the checkpoints are not compatible.
    """
    if base is None or not checkpoints or output is None:
        raise MergeError(
            "merge: give a recipe or run folder, or --base DIR, --checkpoint DIR=WEIGHT (one or more) and --output DIR.",
            "Example: merit merge --base BASE --checkpoint A=120000 --checkpoint B=80000 --output AB",
        )
    settings = words.settings()
    branches = [_branch(text) for text in checkpoints]
    adapters = are_adapters([branch.path for branch in branches])
    if words.adapter != "full" and not adapters:
        raise MergeError(f"--adapter {words.adapter} is for LoRA adapters; {branches[0].path} is a full checkpoint.")
    reporter.stage("merge", f"{count(len(branches), 'checkpoint')}, {settings.operator}")
    with reporter.progress("merge") as tick:
        if words.adapter == "full":
            return merge_branches(base, branches, output, settings, progress=tick)
        assert not isinstance(settings.scale, str)
        return merge_into_adapter(base, branches, output, rank=words.rank, scale=settings.scale, progress=tick)


def _branch(text: str) -> Branch:
    folder, separator, weight = text.rpartition("=")
    if not separator or not folder:
        raise MergeError(f"--checkpoint {text}: expected DIR=WEIGHT, such as branches/0/model=120000.")
    return Branch(path=Path(folder), weight=weight, name=folder)


def _options(words: Sequence[str]) -> Options:
    found: Options = {}
    for text in words:
        key, separator, value = text.partition("=")
        if not separator:
            raise MergeError(f"--option {text}: expected KEY=VALUE, such as density=0.2.")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise MergeError(f"--option {text}: {value!r} is not a valid value.") from None
    return found
