"""The embedded default: a tiny pretrained base and a generated mixture, so that the main job runs offline at once.

It hands out files: the shipped base, the data and the recipe that ties them together. It runs nothing, and imports no ML
library.
"""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from merit.demo.mixture import write_kept, write_mixture

__all__ = ["base_folder", "demo_recipe", "write_demo", "write_kept", "write_mixture"]


def base_folder() -> Path:
    """Folder of the shipped base: a Hugging Face checkpoint, its README and the record of its training."""
    return Path(str(resources.files("merit.demo"))) / "base"


def demo_recipe(seed: int = 0) -> str:
    """Text of the demo's recipe, comments included; its paths are relative: ``base``, ``mixture`` and ``kept``.

    Args:
        seed: The run's seed.
    """
    text = resources.files("merit.demo").joinpath("recipe.yaml").read_text(encoding="utf-8")
    return text.replace("\nseed: 0\n", f"\nseed: {seed}\n", 1)


def write_demo(folder: Path, seed: int = 0) -> Path:
    """Write everything that the demo needs into one folder that can be copied anywhere.

    Args:
        folder: Gets ``recipe.yaml``, ``base/``, ``mixture/`` and ``kept/``; made if absent, same names are replaced.
        seed: Decides the rows, and stands in the recipe as the run's seed.

    Returns:
        Path of the recipe.
    """
    folder = Path(folder)
    write_mixture(folder / "mixture", seed)
    write_kept(folder / "kept", seed)
    shutil.copytree(base_folder(), folder / "base", dirs_exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(demo_recipe(seed), encoding="utf-8")
    return recipe
