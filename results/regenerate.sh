#!/usr/bin/env bash
# Make the committed tables, figures and executed notebooks again, from the records in results/runs alone.
# With these parameters the notebooks also made the records: a run without one is trained, which takes hours and its images.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

notebook() {
  mkdir -p "results/$1"
  "$python" -m papermill --no-progress-bar "notebooks/$1.ipynb" "results/$1/notebook.ipynb" -y "$2"
}

notebook 2_plain_vs_residual "{dataset: cifar10-jpeg, depths: [20, 56], seeds: [0, 1, 2], schedule: 0.05, precision: bfloat16}"
notebook 4_shortcuts "{dataset: cifar10-jpeg, depth: 20, seeds: [0, 1, 2], schedule: 0.05, precision: bfloat16}"
notebook 5_layer_responses "{seeds: [0, 1, 2]}"
notebook 7_scorecard "{readme: true}"
