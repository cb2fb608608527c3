"""What a command opens once and all its steps share: recipe, run folder, base, datasets, device.

A :class:`Session` is one command's view of a run; nothing in it changes once it is opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from merit.errors import MixtureError, RunFolderError
from merit.files import read_json, write_json, write_text
from merit.hf.base import Base, open_base
from merit.hf.models import pick_device
from merit.mixture import Found, find_datasets
from merit.prepare import with_prepared_base
from merit.progress import Reporter
from merit.recipe.load import dump_recipe
from merit.recipe.schema import Recipe
from merit.run.key import SOURCE
from merit.run.scope import Scope, recipe_of, scopes_of, study_scopes
from merit.run.store import Stage, is_run_folder

HASHES = ".hashes.json"
"""Known hashes of the user's big files by path, size and modification time. A cache: it is rebuilt if missing."""


@dataclass(frozen=True, eq=False)
class Session:
    """One command at work on one run.

    Attributes:
        given: The recipe as it was given.
        run: The run folder; made when the first stage writes.
        reporter: Where progress is shown.
        jobs: Parallel processes.
        redo: Rerun stages whose record no longer matches, instead of stopping.
    """

    given: Recipe
    run: Path
    reporter: Reporter
    jobs: int = 1
    redo: bool = False

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe as seen by the stages after a preparation."""
        return with_prepared_base(self.given, self.run)

    @cached_property
    def base(self) -> Base:
        """The base.

        Raises:
            RunFolderError: The recipe prepares its base, and that has not been done; or a file of it was changed since.
        """
        if not self.base_stands:
            raise RunFolderError(
                f"{self.run}: the base is not prepared yet.", "`merit prepare` makes it; `merit run` does everything."
            )
        if self.given.prepare is not None:
            Stage("prepared", self.run / "prepared").verify()
        with self.hashes() as known:
            base = open_base(self.recipe.model, known)
            _ = base.fingerprint
        return base

    @property
    def base_stands(self) -> bool:
        """Whether the base exists: always, unless the recipe prepares it."""
        return self.given.prepare is None or (self.run / "prepared" / "record.json").is_file()

    @cached_property
    def device(self) -> torch.device:
        """Where this process computes."""
        return pick_device(self.recipe.train.device)

    @cached_property
    def found(self) -> Found:
        """The mixture's datasets, found once.

        Raises:
            MixtureError: A source is missing or cannot be used.
        """
        return find_datasets(self.recipe.mixture, self.recipe.evaluate)

    @cached_property
    def sources(self) -> dict[str, str]:
        """Content of every dataset's source files; as recorded, if they are gone and the encoded rows are not.

        Raises:
            MixtureError: A source is missing, and no finished mixture stage replaces it.
        """
        try:
            with self.hashes() as known:
                return dict(self.found.fingerprints(known))
        except MixtureError:
            stage = Stage("mixture", self.run / "mixture")
            if not stage.begun:
                raise
            inputs = stage.record().inputs
            return {name.removeprefix(SOURCE): value for name, value in inputs.items() if name.startswith(SOURCE)}

    @property
    def sources_here(self) -> bool:
        """Whether the sources exist; False only if a finished mixture stage replaces them."""
        try:
            _ = self.found
        except MixtureError:
            if not Stage("mixture", self.run / "mixture").begun:
                raise
            return False
        return True

    @property
    def scope(self) -> Scope:
        """The run's own."""
        return Scope(self.run)

    @property
    def scopes(self) -> list[Scope]:
        """The run's own, then its baselines'."""
        return scopes_of(self.recipe, self.run)

    @cached_property
    def scopes_by_name(self) -> dict[str, Scope]:
        """The baselines' scopes and a study's, by name."""
        scopes = [*self.scopes[1:], *study_scopes(self.recipe, self.run)]
        return {scope.method: scope for scope in scopes if scope.method is not None}

    def recipe_of(self, scope: Scope) -> Recipe:
        """The recipe as a scope uses it."""
        return recipe_of(self.recipe, scope)

    def reopened(self) -> Session:
        """The same command with nothing opened yet, since the base has changed."""
        return Session(self.given, self.run, self.reporter, self.jobs, self.redo)

    def write_recipe(self) -> None:
        """Write the resolved recipe into the run folder."""
        file, text = self.run / "recipe.yaml", dump_recipe(self.given)
        if not file.is_file() or file.read_text(encoding="utf-8", errors="replace") != text:
            write_text(file, text)

    @contextlib.contextmanager
    def hashes(self) -> Iterator[dict[str, str]]:
        """Known hashes of big files, kept in the run folder."""
        file = self.run / HASHES
        known: dict[str, str] = {}
        with contextlib.suppress(RunFolderError, ValueError, TypeError):
            known = {str(key): str(value) for key, value in dict(read_json(file)).items()}
        before = len(known)
        yield known
        if len(known) != before and is_run_folder(self.run):
            write_json(file, known)
