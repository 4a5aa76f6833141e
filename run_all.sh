#!/usr/bin/env bash
# The whole study: five-layer CNNs from scratch, pre-trained networks, tables, figures, report.
#
#   bash run_all.sh                      on Food-11, fetched if it is not here
#   DATA=photos OUT=out bash run_all.sh  on any folder with train/, validation/ and test/
#   bash run_all.sh --demo               every stage on a small made-up set, offline
#   bash run_all.sh --list               print the training commands and run nothing
#
# Stop it whenever you like: what is finished is kept, and the next call goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
fail() { echo "run_all.sh: $*" >&2; exit 1; }
[[ $# == 0 || $* == --list || $* == --demo ]] || fail "arguments are --demo or --list, not $*"

if [[ ${1:-} == --demo ]]; then # what is not set in the environment
  echo "DEMO: no results, but made-up drawings, few epochs and a backbone with random weights"
  OUT=${OUT:-results}/demo DATA=$OUT/photos EPOCHS=${EPOCHS:-3} LEARNING_RATES=${LEARNING_RATES:-0.02 0.04} WEIGHTS=none
  IMAGE_SIZE=32 FINETUNE_IMAGE_SIZE=64 BATCH_SIZES=${BATCH_SIZES:-64 128} BACKBONES=mobilenet_v3_small FC_LEARNING_RATES=0.004 LAST2_LEARNING_RATES=0.004
fi

# Settings, from the environment. Words are several values; an empty MODELS, DROPOUTS or BACKBONES
# leaves that part out. DATA is the folder of photos, OUT that of results, CACHE of decoded photos.
DATA=${DATA:-food11} OUT=${OUT:-results} CACHE=${CACHE:-.cache}
EPOCHS=${EPOCHS:-50} IMAGE_SIZE=${IMAGE_SIZE:-96} FINETUNE_IMAGE_SIZE=${FINETUNE_IMAGE_SIZE:-288}
# From scratch: networks of models.py, their grid, and dropout for what the grid chose.
MODELS=${MODELS-plain residual}
LEARNING_RATES=${LEARNING_RATES:-0.01 0.02 0.04} BATCH_SIZES=${BATCH_SIZES:-32 64}
DROPOUTS=${DROPOUTS-0.2 0.4}
# Pre-trained: the last layer alone, or with the last two convolutions, which overfit sooner.
BACKBONES=${BACKBONES-mobilenet_v2 mobilenet_v3_small shufflenet_v2_x1_0}
WEIGHTS=${WEIGHTS:-IMAGENET1K_V1} # none: random
FC_LEARNING_RATES=${FC_LEARNING_RATES:-0.001 0.003 0.01 0.03 0.1}
LAST2_LEARNING_RATES=${LAST2_LEARNING_RATES:-0.0003 0.001 0.003 0.01}
SEEDS=${SEEDS:-0} # the first chooses, the others repeat what was chosen
DEVICE=${DEVICE:-auto} PYTHON=${PYTHON:-$(ls .venv/bin/python 2> /dev/null || echo python3)}
PROCESSORS=$(getconf _NPROCESSORS_ONLN)
# Commands at a time: on a GPU they hide each other's start, without one they fill a processor each.
JOBS=${JOBS:-$(nvidia-smi -L > /dev/null 2>&1 && echo 3 || echo "$PROCESSORS")}

# The training commands, one a line: the grids of the first seed; then, with what they chose,
# dropout and the other seeds.
AT="--output $(printf %q "$OUT")"
ALL="--data $(printf %q "$DATA") $AT --cache $(printf %q "$CACHE") --epochs $EPOCHS --device $DEVICE"
SCRATCH="$PYTHON train_scratch.py $ALL --image-size $IMAGE_SIZE --model"
TRANSFER="$PYTHON finetune.py $ALL --image-size $FINETUNE_IMAGE_SIZE --weights $WEIGHTS --backbone"
chosen() { echo "chosen=\$($PYTHON evaluate.py $AT --settings $1) &&"; }
grids() {
  for model in $MODELS; do for batch in $BATCH_SIZES; do
    echo "$SCRATCH $model --batch-size $batch --learning-rate $LEARNING_RATES --seed ${SEEDS%% *}"
  done; done
  for backbone in $BACKBONES; do
    echo "$TRANSFER $backbone --unfreeze-convolutions 2 --learning-rate $LAST2_LEARNING_RATES --seed ${SEEDS%% *}"
    echo "$TRANSFER $backbone --unfreeze-convolutions 0 --learning-rate $FC_LEARNING_RATES --seed ${SEEDS%% *}"
  done
}
repeats() {
  for model in $MODELS; do echo "$(chosen "$model") $SCRATCH $model \$chosen --dropout 0 $DROPOUTS --seed $SEEDS"; done
  [[ $SEEDS == *" "* ]] || return 0
  for backbone in $BACKBONES; do
    echo "$(chosen "$backbone-last2") $TRANSFER $backbone --unfreeze-convolutions 2 \$chosen --seed $SEEDS"
    echo "$(chosen "$backbone-fc") $TRANSFER $backbone --unfreeze-convolutions 0 \$chosen --seed $SEEDS"
  done
}
COMMANDS=$(grids; repeats)
if [[ ${1:-} == --list ]]; then echo "$COMMANDS"; exit; fi

# One folder of results is one study.
NEW="DATA=$DATA EPOCHS=$EPOCHS IMAGE_SIZE=$IMAGE_SIZE FINETUNE_IMAGE_SIZE=$FINETUNE_IMAGE_SIZE WEIGHTS=$WEIGHTS"
[[ -f $OUT/settings.txt ]] || { mkdir -p "$OUT" && echo "$NEW" > "$OUT/settings.txt"; }
[[ $(< "$OUT/settings.txt") == "$NEW" ]] ||
  fail "OUT=$OUT holds the study $(< "$OUT/settings.txt"), not $NEW: give another OUT"
[[ $(cat "$OUT/finished.txt" 2> /dev/null) == "$COMMANDS" &&
  ! $(find -L "$DATA" "$OUT/runs" ./*.py tools/*.py -newer "$OUT/finished.txt" -print -quit) ]] &&
  { echo "finished before, and nothing is newer: read $OUT/report.pdf"; exit; }

# Packages, photos and weights first, so that nothing is missing an hour into training. All networks
# are listed for photos of the same size.
if ! "$PYTHON" -c 'import matplotlib, torch, torchvision' 2> /dev/null; then
  "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install -r requirements.txt
  PYTHON=.venv/bin/python exec bash run_all.sh "$@"
fi
GET=${1:-$([[ $DATA != food11 || -d food11 ]] || echo --download)}
"$PYTHON" tools/prepare.py --data "$DATA" $GET | tee "$OUT/photos.txt" ||
  { [[ $GET == --download && ! -d $DATA ]] && exec bash run_all.sh --demo || exit 1; }
"$PYTHON" models.py $MODELS $BACKBONES --image-size "$IMAGE_SIZE" --weights "$WEIGHTS" --classes "$(ls -d "$DATA"/train/*/ | wc -l)" > "$OUT/layers.txt"

# Training. A number before each line says which command it is of. Memory is used again, not given
# back to the system.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647
train() {
  awk '{ print "set -o pipefail; { " $0 "; } 2>&1 | sed \"s/^/[" NR "] /\"" }' | tr '\n' '\0' |
    OMP_NUM_THREADS=$((JOBS < PROCESSORS ? PROCESSORS / JOBS : 1)) xargs -0 -n 1 -P "$JOBS" bash -c ||
    fail "training stopped, see above; the next call goes on from what is stored"
}
grids | train
[[ ! $(repeats) ]] || repeats | train

# Choice by validation, test, comparisons; figures; report.
"$PYTHON" evaluate.py --chosen --data "$DATA" --output "$OUT" --cache "$CACHE" --device "$DEVICE"
"$PYTHON" plot.py --data "$DATA" --output "$OUT"
"$PYTHON" tools/report.py --output "$OUT"
echo "$COMMANDS" > "$OUT/finished.txt"
echo "done in $SECONDS s: read $OUT/report.pdf"
