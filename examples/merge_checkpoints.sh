#!/usr/bin/env bash
# Checkpoints that you already have, fine-tuned from one base: merged without a run, by any operator.
#   BASE=... A=... B=... bash examples/merge_checkpoints.sh
set -euo pipefail

merit merge --base "$BASE" --checkpoint "$A=120000" --checkpoint "$B=80000" --output merged-average
merit merge --base "$BASE" --checkpoint "$A=1" --checkpoint "$B=1" --operator ties --output merged-ties
merit merge --base "$BASE" --checkpoint "$A=0.5" --checkpoint "$B=0.5" --scale 0.7 --output merged-less
