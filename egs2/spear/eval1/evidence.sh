#!/usr/bin/env bash
# The claims of the paper on small students: one command, one table a claim.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

log() { echo "$(date '+%Y-%m-%dT%H:%M:%S') (evidence.sh) $*"; }

. ./path.sh

help_message="Usage: ./evidence.sh [options]

Trains students that differ in one idea (evidence/*.yaml) on the same data, for the same
number of steps, with the same seeds, and compares their frozen features (run.sh): tables
with differences and their errors -> exp/<tag>/RESULTS.md. What is finished is not done again. A
seed is one of quantizers and pre-training; the quantizers of seed 0 are the demo's.

  --quick true|false          only the five students that tell most  [false]
  --only \"A B\"                only these files of evidence/, and what they are compared with
  --seeds \"0 1 2\"             to train; others than elsewhere, see --known
  --steps N                   of pre-training; 0: as the configuration has it [800]
  --tasks \"A B\"               files of tasks/  [prompts speakers classes mixtures instruments]
  --probe_seeds \"0\"           of the probe
  --jobs N                    students at once, on a GPU or a thread each [number of GPUs;
                              of CPUs if there are none]
  --ssl_args \"...\"            more options of ../ssl1/run.sh, such as --data_config F; words
                              of --config_override and --train_args come before an idea's
  --known F.tsv               scores of students trained elsewhere, which are not trained again if
                              all their tasks are there: a scores.tsv that this command wrote
                              beside RESULTS.md. Another machine may
                              make other quantizers: train whole seeds there, and others here
  --tag TAG                   in the names of results and students  [evidence]
  --dry_run true|false        only list the students and their commands [false]"

quick=false
only=
seeds="0 1 2"
steps=800
tasks="prompts speakers classes mixtures instruments"
probe_seeds=0
jobs=
ssl_args=
known=
tag=evidence
dry_run=false

. ../ssl1/local/recipe.sh
ngpu= # no option: all that there are
count_gpus
: "${jobs:=$((ngpu > 0 ? ngpu : $(env -u OMP_NUM_THREADS nproc)))}"
lock "exp/${tag}"
python local/evidence.py --quick "${quick}" --only "${only}" --seeds "${seeds}" \
    --steps "${steps}" --tasks "${tasks}" --probe_seeds "${probe_seeds}" \
    --jobs "${jobs}" --ssl_args "${ssl_args}" --known "${known}" --tag "${tag}" \
    --dry_run "${dry_run}"
