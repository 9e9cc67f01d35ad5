#!/usr/bin/env bash
# The rate of task RL on the tiny default, chosen on development questions by the rule in docs/results-tiny.md.
#     experiments/choose-rate.sh        # 2 CPU cores; rerun it to resume
set -euo pipefail
cd "$(dirname "$0")/.."
export out=runs/choose-rate steps="16 32 64"
rates="5e-5 1e-4 2e-4 4e-4" seeds="100 101"
cores=$(nproc)
export OMP_NUM_THREADS=1

learn() { # RATE SEED: exact match at 2 and 8 chunks after each of $steps, multiples of 16 up to 64
    name="$out/$1-$2"
    [ -e "$name/finished" ] ||
        python memtrain.py --task longqa --chunks 2 --lr "$1" --lr-schedule constant --steps "${steps##* }" \
            --seed "$2" --save-every 16 --keep 4 --eval-documents 0 --sample-every 100 --fast True --out "$name" \
            >> "$name.log" 2>&1
    [ -e "$name/finished" ] || { tail -n 3 "$name.log" >&2 && return 255; } # after which xargs starts nothing more
    for step in $steps; do
        [ -e "$name-$step.json" ] && continue
        model=$name/checkpoints/step-$(printf %06d "$step")
        python eval.py --model "$model" --eval-split dev --eval-documents 64 --lengths 2 8 \
            --seed "$2" --out "$name-$step.part" >> "$name.log" 2>&1 || { tail -n 3 "$name.log" >&2 && return 255; }
        mv "$name-$step.part" "$name-$step.json"
    done
    echo "$(date +%H:%M) $1, seed $2"
}
export -f learn
mkdir -p "$out"
for rate in $rates; do for seed in $seeds; do echo "$rate $seed"; done; done |
    xargs -P "$cores" -L 1 bash -uc 'learn "$@"' part
python - "$out" "$rates" "$seeds" "$steps" << 'END'
import json
import sys
from pathlib import Path

out, rates, seeds, steps = sys.argv[1], *(words.split() for words in sys.argv[2:])
print("| rate | seed |", " | ".join(f"{step} steps" for step in steps), "|\n|---|---|" + "---|" * len(steps))
for rate in rates:
    for seed in seeds:
        files = [Path(f"{out}/{rate}-{seed}-{step}.json") for step in steps]
        rows = [row for file in files for row in json.loads(file.read_text())]
        exact = [row["accuracy"] for row in rows if row["chunks"] == 8 and row["memory"] == "kept"]
        print("|", rate, "|", seed, "|", " | ".join(f"{value:.2f}" for value in exact), "|")
END
