#!/usr/bin/env bash
# Two machines of eight GPUs: run this on both. MAIN is the address of either of them, the same on both.
# Both must see the same project folder, corpus and --out.
#     MAIN=10.0.0.1 recipes/two-machines.sh --out runs/qwen3-4b
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --nnodes 2 --nproc_per_node 8 \
    --rdzv_backend c10d --rdzv_endpoint "${MAIN:?set it to the address of one machine}:29500" \
    memtrain.py --config recipes/qwen3-4b-80gb.args "$@"
