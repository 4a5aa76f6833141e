#!/usr/bin/env bash
# The whole study: five-layer CNNs from scratch, pre-trained networks, tables and figures.
#
#   bash run_all.sh                     on Food-11, fetched if it is not here
#   DATA=photos OUT=out bash run_all.sh on any folder with train/, validation/ and test/
#   bash run_all.sh --demo              every stage on a small made-up set, in minutes, offline
#   bash run_all.sh --list              print the training commands and run nothing
#
# Stop it whenever you like: what is finished is kept, and the next call goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Settings: override any of them in the environment.
DATA_GIVEN=${DATA:-}
DATA=${DATA:-food11}                           # folder of photos
OUT=${OUT:-results}                            # folder of everything that is written
EPOCHS=${EPOCHS:-50}                           # of every run
IMAGE_SIZE=${IMAGE_SIZE:-96}                   # pixels, networks from scratch
FINETUNE_IMAGE_SIZE=${FINETUNE_IMAGE_SIZE:-288} # pixels, pre-trained networks
LEARNING_RATES=${LEARNING_RATES:-0.01 0.02 0.04}
BATCH_SIZES=${BATCH_SIZES:-32 64}
DROPOUTS=${DROPOUTS:-0.2 0.4}
BACKBONES=${BACKBONES:-mobilenet_v2 mobilenet_v3_small shufflenet_v2_x1_0}
WEIGHTS=${WEIGHTS:-IMAGENET1K_V1}              # of the backbones; none trains on random features
FC_LEARNING_RATES=${FC_LEARNING_RATES:-0.001 0.003 0.01 0.03}
LAST2_LEARNING_RATES=${LAST2_LEARNING_RATES:-0.0003 0.001 0.003} # they overfit sooner
SEEDS=${SEEDS:-0}                              # several: mean and spread in every table
JOBS=${JOBS:-}                                 # runs at a time; one a processor, 4 at most
DEVICE=${DEVICE:-auto}                         # auto, cuda, mps or cpu
PYTHON=${PYTHON:-python3}

trap 'exit 130' INT  # Ctrl-C ends the study, not just the stage
checked= layers=
trap 'rm -f "${checked:+$checked.new}" "${layers:+$layers.new}"' EXIT
fail() { echo "run_all.sh: $*" >&2; exit 1; }
stage() {  # announce a stage and note when it began
  stages+=("$1") && began+=("$SECONDS")
  printf '\n== %s ==\n' "$1"
}
stages=() began=()

use_demo() {
  DEMO=yes DATA=demo OUT=${OUT%/}/demo EPOCHS=4 IMAGE_SIZE=64 FINETUNE_IMAGE_SIZE=96
  FC_LEARNING_RATES="0.001 0.004" LAST2_LEARNING_RATES="0.001 0.004" WEIGHTS=none
}
announce_demo() {
  printf '%s\n' "" "************************* DEMO *************************" \
    "These are NOT results: a few made-up drawings instead of" \
    "photos, $EPOCHS epochs, backbones with random weights." \
    "Photos of your own: DATA=folder bash run_all.sh" \
    "********************************************************"
}

DEMO= LIST=
case "${1:-}" in
  "") ;;
  --demo) use_demo ;;
  --list) LIST=yes ;;
  --help|-h) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) fail "unknown argument $1; there are --demo, --list and --help" ;;
esac
[[ $# -le 1 ]] || fail "one argument at most; settings are environment variables"

# The training commands, one a line.
quote() { printf "'%s'" "${1//\'/\'\\\'\'}"; }  # a path may hold spaces
common() {
  echo "--data $(quote "$DATA") --output $(quote "$OUT") --epochs $EPOCHS --seed $1 --device $DEVICE"
}

grid() {  # both networks x learning rates x batch sizes
  for seed in $SEEDS; do for model in plain residual; do
    for rate in $LEARNING_RATES; do for batch in $BATCH_SIZES; do
      echo "python train_scratch.py --model $model --learning-rate $rate --batch-size $batch" \
        "--image-size $IMAGE_SIZE $(common "$seed")"
    done; done
  done; done
}
dropouts() {  # dropout on the best of each network; the best is looked up when the run starts
  for seed in $SEEDS; do for model in plain residual; do for dropout in $DROPOUTS; do
    echo "python train_scratch.py --model $model --best-of-grid --dropout $dropout" \
      "--image-size $IMAGE_SIZE $(common "$seed")"
  done; done; done
}
transfers() {  # FC only and last two convolutions + FC; each tries every learning rate
  for seed in $SEEDS; do for backbone in $BACKBONES; do
    begin="python finetune.py --backbone $backbone --weights $(quote "$WEIGHTS")"
    end="--image-size $FINETUNE_IMAGE_SIZE $(common "$seed")"
    echo "$begin --unfreeze-convolutions 0 --learning-rate $FC_LEARNING_RATES $end"
    echo "$begin --unfreeze-convolutions 2 --learning-rate $LAST2_LEARNING_RATES $end"
  done; done
}
commands() { transfers; grid; dropouts; }

if [[ $LIST ]]; then commands; exit 0; fi

# 1. Packages: use the python at hand, or a virtual environment of our own if it lacks some.
stage "set-up"
lacks() { ! "$1" -c 'import sys; from importlib.util import find_spec as find
sys.exit(not all(map(find, ("torch", "torchvision", "matplotlib", "numpy"))))' 2>/dev/null; }
command -v "$PYTHON" >/dev/null || fail "no $PYTHON here: install Python 3.10 or newer"
if lacks "$PYTHON"; then
  if lacks .venv/bin/python; then
    echo "installing requirements.txt into .venv (a few minutes, a few GB, only once)"
    "$PYTHON" -m venv .venv && .venv/bin/python -m pip install --quiet -r requirements.txt ||
      fail "installing failed; see above. Remove .venv before you try again."
  fi
  PYTHON=.venv/bin/python
fi
"$PYTHON" -V

# 2. Photos and weights first, so that nothing is missing an hour into the training.
stage "photos"
if [[ ! $DEMO && ! $DATA_GIVEN && ! -d $DATA ]]; then
  "$PYTHON" data.py --download --data "$DATA" --output "$OUT" || use_demo
fi
if [[ $DEMO ]]; then announce_demo; fi
mkdir -p "$OUT" || fail "cannot write to OUT=$OUT"
checked=$OUT/photos.txt  # what the check printed; made again for other or newer photos
if [[ $DEMO || ! -f $checked || $(cat "$OUT/.photos-of" 2>/dev/null) != "$DATA" ||
  $(find -L "$DATA" -newer "$checked" -print -quit) ]]; then
  "$PYTHON" data.py ${DEMO:+--demo} --data "$DATA" --output "$OUT" \
    --image-size "$IMAGE_SIZE" "$FINETUNE_IMAGE_SIZE" > "$checked.new" ||
    { cat "$checked.new"; fail "the photos in $DATA need a look"; }
  mv "$checked.new" "$checked" && echo "$DATA" > "$OUT/.photos-of"
fi
cat "$checked"

stage "networks"
classes=$(find -L "$DATA/train" -mindepth 1 -maxdepth 1 -type d ! -name '[._]*' | wc -l)
sizes=$classes-$IMAGE_SIZE-$FINETUNE_IMAGE_SIZE
layers=$OUT/layers-$(echo "$WEIGHTS-$BACKBONES-$sizes" | tr -s ' /' '-').txt
if [[ ! -f $layers ]]; then  # every network layer by layer; this also fetches the weights
  # shellcheck disable=SC2086
  { "$PYTHON" models.py plain residual --classes $classes --image-size "$IMAGE_SIZE" &&
    "$PYTHON" models.py $BACKBONES --weights "$WEIGHTS" --classes $classes \
      --image-size "$FINETUNE_IMAGE_SIZE"; } > "$layers.new" || fail "no network to train; see above"
  mv "$layers.new" "$layers"
fi
echo "layer by layer in $layers"

# 3. Training: transfer runs, the grid, then dropout on the best of the grid.
stage "training"
commands | "$PYTHON" -m tools.run_queue ${JOBS:+--jobs "$JOBS"} ||
  fail "training stopped at the run above; finished runs are kept, the next call goes on"

# 4. The best of each by validation accuracy; only these see the test split.
stage "choice and test"
"$PYTHON" summary.py --output "$OUT" > /dev/null
"$PYTHON" evaluate.py --chosen --split test --data "$DATA" --output "$OUT" --device "$DEVICE"

# 5. What a reader looks at.
stage "summary and figures"
"$PYTHON" summary.py --output "$OUT"
"$PYTHON" plot.py --output "$OUT" --data "$DATA"
"$PYTHON" report.py --output "$OUT"

stage "done"
for i in "${!stages[@]}"; do
  [[ ${stages[$i]} == done ]] || printf '%6d s  %s\n' "$((began[i + 1] - began[i]))" "${stages[$i]}"
done
printf '%6d s  in all. Read %s/report.pdf or report.md.\n' "$SECONDS" "$OUT"
if [[ $DEMO ]]; then announce_demo; fi
