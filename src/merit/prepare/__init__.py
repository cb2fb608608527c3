"""Making a merge-ready base if there is none: join a vision encoder and a language model, then train in stages.

Here: the folders of a preparation, and the recipe of a stage. A stage is a separate run, with one group and no
gradients, so training, resuming and records are those of every branch. Source: Choi & Kim, arXiv 2606.01717, §4 (merge-ready
initialization); the stages are those of LLaVA (1 align, 1.5 knowledge, 2 instruct).
"""

from __future__ import annotations

from pathlib import Path

from merit.recipe.schema import DriftSettings, EvaluateSettings, PreparationStageSettings, Recipe, SplitSettings


def prepared_base(run: Path) -> Path:
    """Folder of the checkpoint that a preparation makes."""
    return run / "prepared" / "base"


def stage_folder(run: Path, name: str) -> Path:
    """Folder of one step of a preparation; that of a training stage is a run folder."""
    return run / "preparation" / name


def stage_recipe(recipe: Recipe, stage: PreparationStageSettings, base: Path | str) -> Recipe:
    """The recipe of one training stage: joint training from ``base`` on the stage's own mixture."""
    own = {"base": str(base), "trainable": stage.trainable}
    return recipe.model_copy(
        update={
            "name": stage.name,
            "model": recipe.model.model_copy(update=own | ({"revision": None} if Path(base).is_absolute() else {})),
            "prepare": None,
            "mixture": stage.mixture,
            "split": SplitSettings(method="joint"),
            "train": stage.train,
            "evaluate": EvaluateSettings(heldout=False, drift=DriftSettings(prompts=0)),
            "baselines": [],
        }
    )


def with_prepared_base(recipe: Recipe, run: Path) -> Recipe:
    """The recipe as seen by the stages after a preparation: their base is the prepared one."""
    if recipe.prepare is None:
        return recipe
    model = recipe.model.model_copy(update={"base": str(prepared_base(run.resolve())), "revision": None})
    return recipe.model_copy(update={"model": model})
