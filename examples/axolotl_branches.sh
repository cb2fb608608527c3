#!/usr/bin/env bash
# Branches trained by axolotl, the merge by MERIT. The same with --format llamafactory or trl.
#   BASE=Qwen/Qwen2.5-0.5B DATA=data/mixture bash examples/axolotl_branches.sh
set -euo pipefail

merit init recipe.yaml --force
merit run recipe.yaml --until split --set model.base="$BASE" --set mixture.folder="$DATA" --set split.axes=1 --set baselines=[] --output runs/axolotl
merit branch export runs/axolotl 0 --to branch-0 --format axolotl
merit branch export runs/axolotl 1 --to branch-1 --format axolotl

# On any machine that has axolotl and the base, in each folder: the command in its README, such as
#   axolotl train axolotl.yaml
# then back here:
#   merit branch import runs/axolotl branch-0
#   merit branch import runs/axolotl branch-1
#   merit merge runs/axolotl && merit evaluate runs/axolotl
