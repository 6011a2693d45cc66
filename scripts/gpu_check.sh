#!/usr/bin/env bash
# What a GPU does with florana, from a bare checkout, without a network: tests, parity, speed, rules, a language model.
#
#   bash scripts/gpu_check.sh OUT [MODEL GSM8K]
#
# Eight minutes at most on one card. OUT gets gpu.json, cohort.json and table.md, and the table is printed. MODEL is
# SmolLM2's GGUF (or a folder), GSM8K the folder of its jsonl files; without them that part is left out. A machine that
# takes small files only gets the model in pieces: scripts/pieces.py. What Python lacks there it finds as wheels in
# .whl, where such a folder lies in the checkout (pip wheel . and pip download make it). DEVICE=cpu rehearses,
# PARTS names what to do.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?where should the tables go? bash scripts/gpu_check.sh OUT [MODEL GSM8K]}
model=${2:-} gsm8k=${3:-}
device=${DEVICE:-cuda} parts=${PARTS:-tests parity,engine,rules cohort smollm2}
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -d "$here/.whl" ]; then
    site=$(mktemp -d)
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$here"/.whl/*.whl
    export PYTHONPATH="$site"
fi
export PYTHONPATH="$here/src:$here/benchmarks:${PYTHONPATH:-}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
cd "$here"
python3 -c "
import sys, torch
if '$device' == 'cuda' and not torch.cuda.is_available():
    sys.exit('no CUDA device is to be seen here: DEVICE=cpu rehearses on the processor')
"
: > "$out/table.md"
for part in $parts; do
    case $part in
        tests)
            python3 -m pytest -q -p no:cacheprovider tests/test_device.py tests/test_cohort.py \
                | tail -5 || echo "| tests | some failed: see above |" >> "$out/table.md" ;;
        cohort)
            python3 benchmarks/cohort.py --device "$device" --json "$out/cohort.json" --turns 3 \
                ${model:+--smollm2 "$model" --gsm8k "$gsm8k"} | tee -a "$out/table.md" ;;
        smollm2)
            [ -z "$model" ] || python3 benchmarks/gpu.py --device "$device" --only '' --dtypes bfloat16 \
                --smollm2 "$model" --gsm8k "$gsm8k" --json "$out/smollm2.json" | tee -a "$out/table.md" ;;
        *)
            python3 benchmarks/gpu.py --device "$device" --only "$part" --json "$out/gpu.json" | tee -a "$out/table.md" ;;
    esac
done
