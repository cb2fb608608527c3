"""The vision demo: a tiny pretrained vision-language base and a generated image mixture.

Like :mod:`merit.demo` it hands out files and runs nothing; painting the pictures needs Pillow, numpy and scikit-learn
(for its handwritten digits), never an ML framework.
"""

from __future__ import annotations

from merit.demo.vision.mixture import write_kept, write_mixture

__all__ = ["write_kept", "write_mixture"]
