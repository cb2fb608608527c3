#!/usr/bin/env bash
# Is splitting better than joint training on my mixture? Two seeds (take five or more) of what a sceptic asks for.
#   BASE=Qwen/Qwen2.5-0.5B DATA=data/mixture bash examples/study.sh
set -euo pipefail

merit init recipe.yaml --force
merit study recipe.yaml --yes --set model.base="$BASE" --set mixture.folder="$DATA" --set split.axes=1 --set study.seeds=2 --set "study.methods=[base, joint, wise_ft, random, own]" --output runs/study
merit report runs/study --output study.html
