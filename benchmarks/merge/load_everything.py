"""The plain way to average checkpoints, as a peer: load every tensor of every branch, accumulate in float32, save."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

output, *pairs = sys.argv[1:]
paths, weights = zip(*((p.rsplit("=", 1)[0], float(p.rsplit("=", 1)[1])) for p in pairs), strict=True)
states = [load_file(Path(p) / "model.safetensors") for p in paths]
merged = {
    name: sum(w * s[name].float() for w, s in zip(weights, states, strict=True)).div(sum(weights)).to(tensor.dtype)
    for name, tensor in states[0].items()
}
Path(output).mkdir()
with torch.no_grad():
    save_file(merged, Path(output) / "model.safetensors", {"format": "pt"})
