"""A loaded model that moves along the line θ0 + λ(θ̄ − θ0) in memory, without a checkpoint per point.

A point interpolates the already rounded θ̄; the merge at a chosen λ rounds once from the branches. The two differ by at
most one rounding of the model's dtype (none at λ = 0 and 1). Model-facing: the only module of the merge that needs torch.

Source: Wortsman et al., Robust fine-tuning of zero-shot models, arXiv:2109.01903, eq. 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from merit.errors import MergeError

__all__ = ["Line"]


class Line:
    """The line between two states of one model.

    Args:
        model: The model to move, in any state.
        base: θ0: ``state_dict()`` of a model loaded from the base folder, as clones (not the moved model's own tensors).
        merged: θ̄: the same of the merged folder.

    Raises:
        MergeError: Names or shapes of the states differ, or one shares memory with the model.
    """

    def __init__(
        self, model: torch.nn.Module, base: Mapping[str, torch.Tensor], merged: Mapping[str, torch.Tensor]
    ) -> None:
        self._targets, self._base, self._merged = model.state_dict(), base, merged
        targets = self._targets
        for name, state in (("base", base), ("merged", merged)):
            odd = sorted(targets.keys() ^ state.keys()) or [n for n in targets if targets[n].shape != state[n].shape]
            if odd:
                raise MergeError(f"{odd[0]} differs between the model and the {name} state.")
            if any(targets[n].data_ptr() == state[n].data_ptr() != 0 for n in targets):
                raise MergeError(f"The {name} state shares memory with the model to be moved; pass clones.")

    @torch.no_grad()
    def move(self, scale: float) -> None:
        """Set parameters and buffers in place: exact at λ = 0 and 1, else summed in float32 (float64) and rounded once."""
        for name, tensor in self._targets.items():
            zero, one = self._base[name].to(tensor.device), self._merged[name].to(tensor.device)
            if scale in (0, 1) or not tensor.is_floating_point():
                tensor.copy_(zero if scale == 0 else one)
                continue
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            tensor.copy_(torch.lerp(zero.to(wide), one.to(wide), float(scale)))
