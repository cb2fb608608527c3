#!/usr/bin/env bash
# From a folder of JSONL files to a merged model and a page to look at. Run it again and it goes on.
#   BASE=Qwen/Qwen2.5-0.5B DATA=data/mixture bash examples/own_jsonl.sh
# DATA has one sub-folder per dataset with train.jsonl and, for the datasets to be scored, test.jsonl.
set -euo pipefail

merit init recipe.yaml --force
merit check recipe.yaml --set model.base="$BASE" --set mixture.folder="$DATA" --set split.axes=1
merit run recipe.yaml --set model.base="$BASE" --set mixture.folder="$DATA" --set split.axes=1 --output runs/own
merit report runs/own --output own.html
merit push runs/own --to me/my-model --dry-run
