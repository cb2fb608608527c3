"""The stages of training in rounds: where each round's files lie, and what decides them. No models, nothing is written.

::

    rounds/I/branches/K/      as branches/K, in float32, with what the branch's next round goes on from (state/)
    rounds/I/merged/model/    what round I + 1 starts from; momentum/ next to it, if the outer step has any
    rounds/I/conflict, split  with train.between.resplit, from round 2 on

The last round's branches and merge are the run's own: ``branches/K`` and ``merged``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from merit.errors import RunFolderError
from merit.recipe.schema import Recipe
from merit.run import key
from merit.run.scope import Scope
from merit.run.store import Stage, split_of

STATE = "state"
"""What a branch's next round goes on from, in its folder."""


@dataclass(frozen=True)
class RoundStages:
    """The rounds of a run or a baseline.

    Attributes:
        recipe: The scope's recipe.
        scope: Whose.
        base: Content of the base; empty if it is not known.
        rows: Content of every dataset's training rows.
    """

    recipe: Recipe
    scope: Scope
    base: str
    rows: Mapping[str, str]

    @property
    def last(self) -> int:
        """R."""
        return self.recipe.rounds

    def folder(self, number: int) -> Path:
        """Folder of a round that is not the last; the run's or baseline's own for the last."""
        return self.scope.root if number == self.last else self.scope.root / "rounds" / str(number)

    def split_folder(self, number: int) -> Path:
        """Folder with the ``split`` whose groups a round trains."""
        again = self.recipe.train.between.resplit and number > 1
        return self.scope.root / "rounds" / str(number) if again else self.scope.root

    def groups(self, number: int) -> list[list[str]]:
        """Groups of a round.

        Raises:
            RunFolderError: They are not made yet, or damaged.
        """
        return split_of(self.split_folder(number)).groups

    def branches(self, number: int) -> dict[int, Stage]:
        """A round's branches, as requested now."""
        return {k: self.branch(number, k, group) for k, group in enumerate(self.groups(number))}

    def branch(self, number: int, k: int, group: list[str]) -> Stage:
        """One of them."""
        stage = key.branch_stage(self.recipe, self.scope, k, group, base=self.base, rows=self.rows)
        if self.last == 1:
            return stage
        inputs = dict(stage.inputs)
        if number > 1:
            inputs["start"] = self.content(number)
        if (before := self.carrier(number, k)) is not None:
            inputs["round before"] = key.model_content(before)
        title = stage.title if number == self.last else self.scope.name(f"round {number} branch {k}")
        path = self.folder(number) / "branches" / str(k)
        return replace(stage, path=path, title=title, inputs=inputs, settings={**stage.settings, "round": number})

    def carrier(self, number: int, k: int) -> Stage | None:
        """The last earlier round's branch ``k`` that was trained."""
        for earlier in range(number - 1, 0, -1):
            stage = self.unchecked(earlier, k)
            if stage.begun:
                return stage
        return None

    def unchecked(self, number: int, k: int) -> Stage:
        """A branch's folder, without what is requested of it."""
        return Stage("branch", self.folder(number) / "branches" / str(k))

    def made(self, number: int) -> Stage:
        """The folder of a round's merge, without what is requested of it."""
        return Stage("round", self.folder(number) / "merged", title=self.scope.name(f"round {number} merged"))

    def merged(self, number: int, taking: Mapping[int, Stage] | None = None) -> Stage:
        """The merge of a round that is not the last: of the branches ``taking`` part, or as made."""
        if taking is None:
            made = self.made(number)
            used = [int(name.removeprefix(key.BRANCH)) for name in made.record().inputs if name.startswith(key.BRANCH)]
            taking = {k: self.unchecked(number, k) for k in used}
        contents = {k: key.model_content(stage) for k, stage in taking.items()}
        start = self.content(number)
        return key.round_stage(self.recipe, self.scope, number, start=start, branches=contents)

    def content(self, number: int) -> str:
        """Content of the model that a round starts from; empty if it is not there yet."""
        if number == 1:
            return self.base
        before = self.made(number - 1)
        return key.model_content(before) if before.begun else ""

    def start(self, number: int) -> Path | None:
        """The checked folder of the model that a round starts from; None: the base.

        Raises:
            RunFolderError: It is not made yet, damaged, or removed.
        """
        if number == 1:
            return None
        stage = self.made(number - 1)
        if not stage.begun:
            raise RunFolderError(
                f"{stage.path}: round {number} starts from the merge of round {number - 1}, which is not made yet.",
                f"`merit merge {self.scope.run} --round {number - 1}` makes it from that round's branches; `merit run` does "
                "everything.",
            )
        if not (stage.path / "model").is_dir():
            raise RunFolderError(
                f"{stage.path / 'model'} was removed when the next round was merged, and is needed again.",
                f"Remove the folder {self.scope.root / 'rounds'} and run the same command again: the rounds are trained "
                "again. train.between.keep_files keeps every round's files.",
            )
        stage.verify()
        return stage.path / "model"

    def changes(self, number: int) -> list[str]:
        """What differs between the request and the records of a merged round."""
        found = []
        for stage in (*self.branches(number).values(), self.merged(number)):
            if stage.begun:
                found += [f"{stage.name}: {change}" for change in stage.changes()]
        return found

    def open_round(self) -> int:
        """The first round that is not merged yet; the last if all others are."""
        return next((n for n in range(1, self.last) if not self.made(n).begun), self.last)


@dataclass(frozen=True)
class RoundLine:
    """What a finished round moved.

    Attributes:
        number: Of the round.
        merged: Branches merged.
        missing: Numbers of branches that were not there.
        bytes_in: Weights brought to the merge.
        bytes_out: Weights handed out for the next round; 0 after the last.
        seconds: Training of its branches, one after another, and the merge.
    """

    number: int
    merged: int
    missing: tuple[int, ...]
    bytes_in: int
    bytes_out: int
    seconds: float


def round_lines(scope: Scope) -> list[RoundLine]:
    """The finished rounds of a run or baseline, from their records; none where there was one round only.

    Raises:
        RunFolderError: A record is damaged.
    """
    between = sorted(int(file.parts[-3]) for file in (scope.root / "rounds").glob("*/merged/record.json"))
    folders = [(number, scope.root / "rounds" / str(number)) for number in between]
    if folders:
        folders.append((between[-1] + 1, scope.root))
    return [_line(number, folder) for number, folder in folders if (folder / "merged" / "record.json").is_file()]


def _line(number: int, folder: Path) -> RoundLine:
    record = Stage("merged", folder / "merged").record()
    branches = [Stage("branch", path.parent) for path in (folder / "branches").glob("*/record.json")]
    used = {int(name.removeprefix(key.BRANCH)) for name in record.inputs if name.startswith(key.BRANCH)}
    mine = [stage for stage in branches if int(stage.path.name) in used]
    return RoundLine(
        number=number,
        merged=len(used),
        missing=tuple(record.facts.get("missing") or record.settings.get("excluded") or ()),
        bytes_in=sum(map(weight_bytes, mine)),
        bytes_out=int(record.facts.get("bytes_out", 0)),
        seconds=record.seconds + sum(stage.record().seconds for stage in mine),
    )


def weight_bytes(stage: Stage) -> int:
    """Bytes of a stage's model weights, from its record: they may be removed."""
    outputs = stage.record().outputs
    return sum(
        facts.bytes for name, facts in outputs.items() if name.startswith("model/") and name.endswith(".safetensors")
    )
