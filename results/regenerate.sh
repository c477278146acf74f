#!/usr/bin/env bash
# Make the published tables, figures and executed notebooks again, from the records in results/published/runs alone.
# All of them, or only the notebooks that are named: bash results/regenerate.sh 3_cifar_depths 7_scorecard
# With these parameters the notebooks also made the records: a run without one is trained, which takes hours and its images.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
wanted=" $* "

# A notebook, its parameters, and the folder within results for what it leaves, if that is not the notebook's name.
notebook() {
  [[ $wanted == "  " || $wanted == *" $1 "* ]] || return 0
  local folder="results/published/${3:-$1}"
  mkdir -p "$folder"
  "$python" -m papermill --no-progress-bar "notebooks/$1.ipynb" "$folder/notebook.ipynb" -y "$2" -p results results/published ${3:+-p output "$3"}
}

on_photographs() {
  notebook 2_plain_vs_residual "{dataset: cifar10, precision: bfloat16, depths: [20, 32, 44, 56], seeds: [0]}"
  notebook 2_plain_vs_residual "{dataset: cifar10, recipe: note, schedule: 0.005333, precision: bfloat16, depths: [20, 56], seeds: [0, 1]}" 2_plain_vs_residual/note
  notebook 3_cifar_depths "{dataset: cifar10, precision: bfloat16, depths: [20, 32, 44, 56, 110], seeds: [0]}"
  notebook 4_shortcuts "{dataset: cifar10, precision: bfloat16, depth: 20, seeds: [0]}"
  notebook 5_layer_responses "{dataset: cifar10, precision: bfloat16, nets: [plain-20, plain-56, resnet-20, resnet-56, resnet-110], seeds: [0]}"
  notebook 5_layer_responses "{dataset: cifar10, precision: bfloat16, nets: [plain-20, plain-56, resnet-20, resnet-56], seeds: [0, 1]}" 5_layer_responses/two_runs
}

on_digits() {
  notebook 0_quickstart "{recipe: digits, seeds: [0, 1, 2, 3, 4]}"  # its own recipe is left to who runs it first
  notebook 2_plain_vs_residual "{seeds: [0, 1, 2, 3, 4]}" 2_plain_vs_residual/digits
  notebook 3_cifar_depths "{seeds: [0, 1, 2, 3, 4]}" 3_cifar_depths/digits
  notebook 4_shortcuts "{seeds: [0, 1, 2, 3, 4]}" 4_shortcuts/digits
  notebook 5_layer_responses "{seeds: [0, 1, 2, 3, 4]}" 5_layer_responses/digits
  notebook 1_architectures "{}"
}

on_photographs &
on_digits
wait $!
notebook 7_scorecard "{readme: true}"
"$python" -c "from replication import hub; hub.update_page()"  # docs/nets.md
