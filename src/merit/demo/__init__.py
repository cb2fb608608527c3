"""The built-in default: a tiny pretrained base and a small mixture, so that the whole chain runs offline at once.

There are two: text only, and images with text. Both are written out as files: base, data, and the recipe that ties
them together. The generator of the data is in scripts/demo_data of the repository. Nothing is run here.
"""

from __future__ import annotations

import shutil
import tarfile
from importlib import resources
from pathlib import Path

from merit.files import write_text

__all__ = ["base_folder", "demo_recipe", "write_demo"]


def _shipped(vision: bool) -> Path:
    """Folder with ``base/``, ``data.tar.xz`` and ``recipe.yaml``."""
    demo = Path(str(resources.files("merit.demo")))
    return demo / "vision" if vision else demo


def base_folder(*, vision: bool = False) -> Path:
    """Folder of the shipped base: a Hugging Face checkpoint, its README and its training record."""
    return _shipped(vision) / "base"


def demo_recipe(seed: int = 0, *, vision: bool = False) -> str:
    """Text of the demo's recipe, comments included; its paths are relative: ``base``, ``mixture``, ``kept``, ``unseen``.

    Args:
        seed: The run's seed.
        vision: The vision demo's.
    """
    text = (_shipped(vision) / "recipe.yaml").read_text(encoding="utf-8")
    return text.replace("\nseed: 0\n", f"\nseed: {seed}\n", 1)


def write_demo(folder: Path, seed: int = 0, *, vision: bool = False) -> Path:
    """Write everything that the demo needs into one folder that can be copied anywhere.

    Args:
        folder: Gets ``base/``, ``mixture/``, ``kept/``, ``unseen/`` and, once these are complete, ``recipe.yaml``; created
            if missing; existing files are replaced.
        seed: The run's seed: order of training, calibration sample, random split. The rows are the same for every seed.
        vision: The vision demo's.

    Returns:
        Path of the recipe.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(_shipped(vision) / "data.tar.xz") as data:
        # The archive's times are all zero: files get the time at which they are written.
        data.extractall(folder, filter=lambda member, path: tarfile.data_filter(member, path).replace(mtime=None))  # type: ignore[arg-type]
    shutil.copytree(base_folder(vision=vision), folder / "base", dirs_exist_ok=True)
    recipe = folder / "recipe.yaml"
    write_text(recipe, demo_recipe(seed, vision=vision))
    return recipe
