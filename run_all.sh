#!/usr/bin/env bash
# The whole study: five-layer CNNs from scratch, pre-trained networks, tables, figures, report.
#
#   bash run_all.sh                      on Food-11, fetched if it is not here
#   DATA=photos OUT=out bash run_all.sh  on any folder with train/, validation/ and test/
#   bash run_all.sh --demo               every stage on a small made-up set, in minutes, offline
#   bash run_all.sh --list               print the training commands and run nothing
#   bash run_all.sh --share 2/4          train the second of four shares and stop there: the others
#                                        are for other machines, a plain call for the end
#
# Settings are environment variables (EPOCHS, IMAGE_SIZE, SEEDS, JOBS...), at the top of run_all.sh.
# Stop it whenever you like: what is finished is kept, and the next call goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Settings: override any of them in the environment. Words are several values; an empty MODELS,
# DROPOUTS or BACKBONES leaves that part of the study out.
DATA_GIVEN=${DATA:-}
DATA=${DATA:-food11}                            # folder of photos
OUT=${OUT:-results}                             # folder of everything that is written, but for
CACHE=${CACHE:-.cache}                          # decoded photos and downloads
EPOCHS=${EPOCHS:-50}                            # of every run
IMAGE_SIZE=${IMAGE_SIZE:-96}                    # pixels, networks from scratch
FINETUNE_IMAGE_SIZE=${FINETUNE_IMAGE_SIZE:-288} # pixels, pre-trained networks
MODELS=${MODELS-plain residual}                 # from scratch, of models.py
LEARNING_RATES=${LEARNING_RATES:-0.01 0.02 0.04}
BATCH_SIZES=${BATCH_SIZES:-32 64}
DROPOUTS=${DROPOUTS-0.2 0.4}
BACKBONES=${BACKBONES-mobilenet_v2 mobilenet_v3_small shufflenet_v2_x1_0}
WEIGHTS=${WEIGHTS:-IMAGENET1K_V1}               # of the backbones; none trains on random features
FC_LEARNING_RATES=${FC_LEARNING_RATES:-0.001 0.003 0.01 0.03 0.1}
LAST2_LEARNING_RATES=${LAST2_LEARNING_RATES:-0.0003 0.001 0.003 0.01} # they overfit sooner
SEEDS=${SEEDS:-0}                               # the first chooses, others repeat what was chosen
TRAIN_PHOTOS=${TRAIN_PHOTOS:-}                   # a class, several: how many photos does it take?
JOBS=${JOBS:-}                                  # commands at a time; one a processor, up to 8 a GPU
DEVICE=${DEVICE:-auto}                          # auto, cuda, mps or cpu
PYTHON=${PYTHON:-python3}

fail() { echo "run_all.sh: $*" >&2; exit 1; }
stage() { printf '\n== %s (%d s) ==\n' "$1" "$SECONDS"; }

use_demo() {
  DEMO=yes DATA=demo OUT=${OUT%/}/demo EPOCHS=3 IMAGE_SIZE=48 FINETUNE_IMAGE_SIZE=64
  LEARNING_RATES="0.02 0.04" FC_LEARNING_RATES="0.001 0.004" LAST2_LEARNING_RATES="0.001 0.004"
  WEIGHTS=none
}
announce_demo() {
  printf '%s\n' "" "************************* DEMO *************************" \
    "These are NOT results: a few made-up drawings instead of" \
    "photos, $EPOCHS epochs, backbones with random weights." \
    "Photos of your own: DATA=folder bash run_all.sh" \
    "********************************************************"
}

DEMO= LIST= SHARE=
if [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then  # in a job array of Slurm
  SHARE=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))/$SLURM_ARRAY_TASK_COUNT
  (( SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 == SLURM_ARRAY_TASK_COUNT )) ||
    fail "an array with gaps has no shares: --array=1-N, or --share I/N for one of them"
fi
case "${1:-}" in
  "") ;;
  --demo) use_demo ;;
  --list) LIST=yes ;;
  --share) SHARE=${2:-none}; shift ;;
  --help|-h) sed -n '2,12s/^# \{0,1\}//p' run_all.sh; exit 0 ;;
  *) fail "unknown argument $1; there are --demo, --list, --share and --help" ;;
esac
if [[ $SHARE ]]; then
  [[ $SHARE =~ ^[1-9][0-9]*/[1-9][0-9]*$ && ${SHARE%/*} -le ${SHARE#*/} ]] ||
    fail "--share $SHARE: which of how many is meant, such as 2/4"
fi
[[ $# -le 1 ]] || fail "one argument at most; settings are environment variables"
[[ ! $JOBS || $JOBS =~ ^[1-9][0-9]*$ ]] || fail "JOBS=$JOBS: how many commands at a time, such as 4"
[[ $MODELS || $BACKBONES ]] || fail "MODELS and BACKBONES are both empty: nothing to train"

# The training commands, one a line. One thread a run: several at a time fill the processors, and
# the numbers do not depend on how many there are.
quote() { printf "'%s'" "${1//\'/\'\\\'\'}"; }  # a path may hold spaces
common() {
  echo "--data $(quote "$DATA") --output $(quote "$OUT") --cache $(quote "$CACHE")" \
    "--epochs $EPOCHS --device $(quote "$DEVICE") --threads 1"
}
scratch() {
  echo "$(quote "$PYTHON") train_scratch.py --image-size $IMAGE_SIZE $(common) --model $*"
}
transfer() {
  echo "$(quote "$PYTHON") finetune.py --image-size $FINETUNE_IMAGE_SIZE $(common)" \
    "--weights $(quote "$WEIGHTS") --backbone $*"
}
read -r FIRST_SEED OTHER_SEEDS <<< "$SEEDS"
grid_commands() {  # the first seed's; the longest first, so that none is waited for at the end
  local seed="--seed $FIRST_SEED"
  # Part 2, the last layer with the last two convolutions; every learning rate.
  for backbone in $BACKBONES; do
    transfer "$backbone --unfreeze-convolutions 2 --learning-rate $LAST2_LEARNING_RATES $seed"
  done
  # Part 1: both networks x batch sizes x learning rates.
  for batch in $BATCH_SIZES; do for model in $MODELS; do for rate in $LEARNING_RATES; do
    scratch "$model --batch-size $batch --learning-rate $rate $seed"
  done; done; done
  # Part 2, the last layer alone.
  for backbone in $BACKBONES; do
    transfer "$backbone --unfreeze-convolutions 0 --learning-rate $FC_LEARNING_RATES $seed"
  done
}
chosen_commands() {  # on the best of each network, which the finished grid tells
  for model in $MODELS; do
    for seed in $SEEDS; do for dropout in $DROPOUTS; do
      scratch "$model --best-of-grid --dropout $dropout --seed $seed"
    done; done
    for seed in $OTHER_SEEDS; do scratch "$model --best-of-grid --seed $seed"; done
  done
  for backbone in $BACKBONES; do for count in 2 0; do for seed in $OTHER_SEEDS; do
    transfer "$backbone --best-of-grid --unfreeze-convolutions $count --seed $seed"
  done; done; done
  for photos in $TRAIN_PHOTOS; do
    for model in $MODELS; do
      scratch "$model --best-of-grid --train-photos $photos --seed $FIRST_SEED"
    done
    for backbone in $BACKBONES; do for count in 2 0; do
      transfer "$backbone --best-of-grid --unfreeze-convolutions $count" \
        "--train-photos $photos --seed $FIRST_SEED"
    done; done
  done
}

lacks() {  # a package of requirements.txt, or one that is new enough
  ! "$1" - 2> /dev/null << 'END'
from importlib.metadata import version
for line in open("requirements.txt"):
    name, lowest = line.split("#")[0].strip().split(">=")
    if name != "gdown":  # one download asks for it, and says so
        here = version(name).split(".")[:2]
        assert [int(part) for part in here] >= [int(part) for part in lowest.split(".")]
END
}
all_commands() { grid_commands; chosen_commands; }
check() { "$PYTHON" tools/check_commands.py "$@"; }  # before any work; prints what it counts
# The python at hand, or the virtual environment of our own if it lacks a package.
! lacks "$PYTHON" || lacks .venv/bin/python || PYTHON=.venv/bin/python
if [[ $LIST ]]; then
  lacks "$PYTHON" || all_commands | check > /dev/null
  all_commands; exit 0
fi

# Whatever runs is a process group of its own: Ctrl-C, kill or a closed terminal end all of it.
run() {
  set -m
  "$@" &
  group=$!
  set +m
  wait "$group" || { end_group; return 1; }
  group=
}
end_group() {  # after half a second by force, which loses no more than a power failure
  kill -TERM -- "-$group"
  for _ in {1..10}; do ! kill -0 -- "-$group" || sleep 0.05; done
  kill -KILL -- "-$group"
  wait "$group"
} 2> /dev/null
stop() {
  trap '' INT TERM HUP
  [[ ! $group ]] || end_group || true
  echo "run_all.sh: interrupted; the next call goes on from what is stored" >&8
  exit 130
}
group=
exec 8>&2
trap stop INT TERM HUP

stage "set-up"
command -v "$PYTHON" > /dev/null || fail "no $PYTHON here: install Python 3.10 or newer"
install() { "$PYTHON" -m venv .venv && .venv/bin/python -m pip install --quiet -r requirements.txt; }
if lacks "$PYTHON"; then
  [[ ! $SHARE ]] || fail "a share installs nothing: pip install -r requirements.txt first"
  echo "installing requirements.txt into .venv (a few minutes, a few GB, only once)"
  run install || fail "installing failed; see above. Remove .venv before you try again."
  PYTHON=.venv/bin/python
fi
"$PYTHON" -V
counted=$(all_commands | check) || exit 1
read -r STUDY_RUNS GPUS PROCESSORS <<< "$counted"
case $DEVICE in
  cpu) GPUS=0 ;;
  cuda:*) GPUS=1 ;;
esac
mkdir -p "$OUT" && exec 9<> "$OUT/.lock" || fail "cannot write to OUT=$OUT"
# The lock is this process's and its children's, and ends with them, however they end. Shares hold
# it together.
kind=EX
[[ ! $SHARE ]] || kind=SH
"$PYTHON" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_$kind | fcntl.LOCK_NB)" \
  2> /dev/null ||
  fail "$(cat "$OUT/.lock") works in $OUT, or its disk knows no locks: wait, or give another OUT"
ME="process $$ on $(uname -n)"
echo "$ME" > "$OUT/.lock"

stage "photos"  # and weights before training, so that nothing is missing an hour into it
if [[ ! $DEMO && ! $DATA_GIVEN && ! -d $DATA ]]; then
  [[ ! $SHARE ]] || fail "a share fetches nothing: python tools/prepare.py --download first"
  run "$PYTHON" tools/prepare.py --download --data "$DATA" --output "$OUT" --cache "$CACHE" ||
    [[ -d $DATA ]] || exec bash run_all.sh --demo  # photos that came but need a look are told below
fi
if [[ $DEMO ]]; then announce_demo; fi
checked=$OUT/photos.txt  # what the check printed; made again for other or newer photos
folder=$("$PYTHON" -c \
  "import os, sys; os.write(1, os.fsencode(os.path.realpath(sys.argv[1])))" "$DATA")
new=$checked.new-${ME//[^0-9a-z]/-}
check_photos() {
  { echo "$folder"; "$PYTHON" tools/prepare.py ${DEMO:+--demo} --data "$DATA" --output "$OUT" \
    --cache "$CACHE" --image-size ${MODELS:+"$IMAGE_SIZE"} ${BACKBONES:+"$FINETUNE_IMAGE_SIZE"}
  } > "$new"
}
if [[ ! -f $checked || $(head -n 1 "$checked") != "$folder" ||
  $(find -L "$DATA" \( -newer "$checked" -o -cnewer "$checked" \) -print -quit) ]]; then
  run check_photos || { cat "$new"; rm "$new"; fail "the photos in $DATA need a look"; }
  mv "$new" "$checked"
fi
cat "$checked"
classes=$(find -L "$DATA/train" -mindepth 1 -maxdepth 1 -type d ! -name '[._]*' | wc -l)
describe_networks() {
  # shellcheck disable=SC2086
  if [[ $MODELS ]]; then
    "$PYTHON" models.py $MODELS --classes $classes --image-size "$IMAGE_SIZE" || return
  fi
  # shellcheck disable=SC2086
  if [[ $BACKBONES ]]; then
    "$PYTHON" models.py $BACKBONES --weights "$WEIGHTS" --classes $classes \
      --image-size "$FINETUNE_IMAGE_SIZE"
  fi
}
if [[ ! $SHARE ]]; then
  run describe_networks > "$OUT/layers.new" || fail "no network to train; see above"
  mv "$OUT/layers.new" "$OUT/layers.txt"
  echo "every network layer by layer: $OUT/layers.txt"
fi

stage "training"  # JOBS commands at a time: one run alone fills neither a processor nor a GPU
if [[ ! $JOBS ]]; then
  JOBS=$PROCESSORS
  if (( GPUS > 0 )); then  # a step waits for its processor; memory is for 8 a GPU, see on_device
    (( JOBS <= 8 * GPUS )) || JOBS=$(( 8 * GPUS ))
    (( JOBS >= 4 )) || JOBS=4
    (( JOBS >= GPUS )) || JOBS=$GPUS
  fi
fi
STUDY_START=$(date +%s)
FAILED=$(mktemp)
trap 'rm -f "$FAILED"*' EXIT
export OUT GPUS STUDY_RUNS STUDY_START FAILED
train_line() {  # the first command that fails ends the others, which go on at the next call
  if (( GPUS > 1 )); then
    IFS=, read -ra visible <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((GPUS - 1)))}"
    export CUDA_VISIBLE_DEVICES=${visible[${SLOT:-0} % GPUS]}
  fi
  local log=$FAILED.$$
  if ! eval "$1" 2>&1 | tee "$log"; then
    { echo "failed: $1"; tail -n 3 "$log"; } > "$FAILED"
    kill -TERM 0
  fi
}
export -f train_line
slot=--process-slot-var=SLOT  # GNU's xargs alone has it; without, all commands share a GPU
xargs $slot true < /dev/null 2> /dev/null || slot=
train() {
  tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" $slot bash -c 'set -o pipefail; train_line "$1"' _ 2> /dev/null
}
part=${SHARE:-1/1}
share() { awk -v share="${part%/*}" -v shares="${part#*/}" 'NR % shares == share % shares'; }
for commands in grid_commands chosen_commands; do
  if [[ $SHARE && $commands == chosen_commands ]]; then
    unfinished=$(grid_commands | check --unfinished) || exit 1
    (( unfinished == 0 )) ||
      { echo "the rest waits for $unfinished runs of other shares: call again then"; exit 0; }
  fi
  run train < <($commands | share) || {
    cat "$FAILED" >&2
    fail "training stopped; the next call goes on from what is stored"
  }
done
if [[ $SHARE ]]; then
  stage "share $SHARE done: when all are, a plain bash run_all.sh evaluates"
  exit 0
fi

stage "choice, test, comparisons"  # the best of each by validation; only these see the test split
run "$PYTHON" evaluate.py --chosen --data "$DATA" --output "$OUT" --cache "$CACHE" --device "$DEVICE"

stage "figures and report"
run "$PYTHON" plot.py --output "$OUT" --data "$DATA"
run "$PYTHON" tools/report.py --output "$OUT"

stage "done: read $OUT/report.pdf or report.md"
if [[ $DEMO ]]; then announce_demo; fi
# The summary knows which runs are the study's; JSON here indents its keys by one space.
grep -q '^ "failed": \[\]' "$OUT/summary.json" || fail "some runs failed, see above; the rest is complete"
