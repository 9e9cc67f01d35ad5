#!/usr/bin/env bash
# The rate of task RL on the tiny default, chosen on development questions by the rule in docs/results-tiny.md.
#     recipes/choose-rate.sh        # 2 CPU cores; stopped, it goes on
set -euo pipefail
cd "$(dirname "$0")/.."
export out=runs/choose-rate
cores=$(nproc)
export OMP_NUM_THREADS=1

rate() { # RATE SEED: exact match at 2 and 8 chunks after 0, 16, 32 and 64 steps
    [ -e "$out/$1-$2/finished" ] ||
        python memtrain.py --task longqa --chunks 2 --lr "$1" --lr-schedule constant --steps 64 --seed "$2" --save-every 16 \
            --keep 4 --eval-documents 0 --sample-every 100 --out "$out/$1-$2" > "$out/$1-$2.log" 2>&1
    for step in 16 32 64; do
        [ -e "$out/$1-$2-$step.json" ] ||
            python eval.py --model "$out/$1-$2/checkpoints/step-0000$step" --eval-split dev --eval-documents 64 \
                --lengths 2 8 --seed "$2" --out "$out/$1-$2-$step.json" > "$out/$1-$2-$step.log" 2>&1
    done
    echo "$(date +%H:%M) $1, seed $2"
}
export -f rate
mkdir -p "$out"
for rate in 5e-5 1e-4 2e-4 4e-4; do for seed in 100 101; do echo "$rate $seed"; done; done |
    xargs -P "$cores" -L 1 bash -euc 'rate "$@"' part
python - << 'END'
import json
from pathlib import Path

print("| rate | seed | 16 steps | 32 steps | 64 steps |\n|---|---|---|---|---|")
for rate in ("5e-5", "1e-4", "2e-4", "4e-4"):
    for seed in (100, 101):
        files = [Path(f"runs/choose-rate/{rate}-{seed}-{step}.json") for step in (16, 32, 64)]
        rows = [[r for r in json.loads(file.read_text()) if r["chunks"] == 8 and r["memory"] == "kept"] for file in files]
        print("|", rate, "|", seed, "|", " | ".join(f"{r[0]['accuracy']:.2f}" for r in rows), "|")
END
