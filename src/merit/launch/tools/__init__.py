"""Other people's trainers that a branch can be trained with, each a file of its own. Pure: settings in, texts out."""

from __future__ import annotations

from collections.abc import Mapping

from merit.launch.tools import axolotl, llamafactory, trl
from merit.launch.tools.job import Tool

TOOLS: Mapping[str, Tool] = {"axolotl": axolotl.TOOL, "llamafactory": llamafactory.TOOL, "trl": trl.TOOL}
"""By the word of ``merit branch export --format``."""
