"""The embedded default: a tiny pretrained base and a generated mixture, so that the main job runs offline at once.

There are two: words only, and pictures with words (:mod:`merit.demo.vision`). Both are handed out as files: the shipped
base, the data and the recipe that ties them together. Nothing is run here, and no ML library is imported.
"""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from merit.demo.mixture import write_kept, write_mixture

__all__ = ["base_folder", "demo_recipe", "write_demo", "write_kept", "write_mixture"]


def _package(vision: bool) -> str:
    return "merit.demo.vision" if vision else "merit.demo"


def base_folder(*, vision: bool = False) -> Path:
    """Folder of the shipped base: a Hugging Face checkpoint, its README and the record of its training."""
    return Path(str(resources.files(_package(vision)))) / "base"


def demo_recipe(seed: int = 0, *, vision: bool = False) -> str:
    """Text of the demo's recipe, comments included; its paths are relative: ``base``, ``mixture`` and ``kept``.

    Args:
        seed: The run's seed.
        vision: The vision demo's.
    """
    text = resources.files(_package(vision)).joinpath("recipe.yaml").read_text(encoding="utf-8")
    return text.replace("\nseed: 0\n", f"\nseed: {seed}\n", 1)


def write_demo(folder: Path, seed: int = 0, *, vision: bool = False) -> Path:
    """Write everything that the demo needs into one folder that can be copied anywhere.

    Args:
        folder: Gets ``recipe.yaml``, ``base/``, ``mixture/`` and ``kept/``; made if absent, same names are replaced.
        seed: Decides the rows, and stands in the recipe as the run's seed.
        vision: The vision demo's.

    Returns:
        Path of the recipe.
    """
    from merit.demo import vision as pictures

    folder = Path(folder)
    (pictures.write_mixture if vision else write_mixture)(folder / "mixture", seed)
    (pictures.write_kept if vision else write_kept)(folder / "kept", seed)
    shutil.copytree(base_folder(vision=vision), folder / "base", dirs_exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(demo_recipe(seed, vision=vision), encoding="utf-8")
    return recipe
