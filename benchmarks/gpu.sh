#!/usr/bin/env bash
# What only a GPU can tell: a step, the whole study, the usual loop, in at most nine minutes:
#
#   DATA=food11 bash benchmarks/gpu.sh | tee gpu.md
#
# Prints Markdown to paste. A part that takes too long is cut off, which is said.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export DATA=${DATA:-food11} PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda}
WEIGHTS=${WEIGHTS:-IMAGENET1K_V1}
fail() { echo "gpu.sh: $*" >&2; exit 1; }
[[ -d $DATA ]] || fail "no folder $DATA: set DATA to a folder of photos"
"$PYTHON" -c 'import sys, engine; engine.pick_device(sys.argv[1])' "$DEVICE"
folder=$(mktemp -d)
sampler=
trap 'kill $sampler 2> /dev/null || true; rm -rf "$folder"' EXIT
limit() {  # seconds, command
  local seconds=$1
  shift
  timeout --signal=INT --kill-after=3 "$seconds" "$@" || echo "(not all: cut off after $seconds s, or failed)"
}
utilisation() {  # one number a second, until it is stopped
  exec nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits --loop=1
}

echo "## GPU"
echo
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null || echo "no nvidia-smi"
"$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
echo "$(nproc) processors; photos: $(find -L "$DATA" -type f | wc -l)"

printf '\n## One step, %s\n\n' "$DATA"
limit 100 "$PYTHON" benchmarks/step.py --data "$DATA" --cache "$folder/cache" --device "$DEVICE" \
  --models plain --batch-sizes 32 64 --seconds 2

printf '\n## The whole study, from photos to report\n\n'
utilisation > "$folder/utilisation" 2> /dev/null & sampler=$!
begin=$(date +%s)  # from nothing but the photos and the weights
OUT=$folder/study CACHE=$folder/study-cache limit 250 bash run_all.sh > "$folder/study.log" 2>&1
seconds=$(($(date +%s) - begin))
kill $sampler 2> /dev/null || true
sampler=
busy=$(awk '{ sum += $1 } END { if (NR) printf "%.0f%%", sum / NR; else print "not measured" }' \
  "$folder/utilisation")
runs=$(find "$folder" -path '*/study/runs/*.json' | wc -l)
echo "$seconds s, $runs runs; mean utilisation of the GPU: $busy. Start of each stage:"
echo
{ sed -n '/^==/p' "$folder/study.log"; tail -n 3 "$folder/study.log"; } | sed 's/^/    /'

printf '\n## Against the usual loop\n\n```\n'
limit 170 "$PYTHON" benchmarks/speed.py --data "$DATA" --device "$DEVICE" --rounds 1 \
  --weights "$WEIGHTS" --rows scratch-96 fc last2
echo '```'
