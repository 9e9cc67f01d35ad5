#!/usr/bin/env bash
# The paper's Tables 1 and 2 and Figures 3 and 4 on the tiny default: three seeds, no download, 2 CPU cores; README has the hours.
#     recipes/reproduce-tiny.sh [FOLDER]
# Stopped, it goes on when called again: a finished part is not run again, one begun is resumed. Everything is in
# FOLDER, runs/reproduce unless given; at its end recipes/tables.py writes results.json there and the tables into README.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/reproduce}
seeds="0 1 2" task_steps=16 long_steps=64 search_steps=16
lengths="4 16 64 256" questions=32 # 1 to 64 times the trained length
# Chosen on the development questions (--eval-split dev).
task="--lr 3e-4 --lr-schedule constant --save-every $task_steps --keep 9"

train() { # NAME ARGUMENTS
    [ -e "$out/$1/finished" ] || python memtrain.py --out "$out/$1" --eval-documents 0 --sample-every 100 "${@:2}"
}

measure() { # NAME MODEL ARGUMENTS: rows in $out/NAME.json
    [ -e "$out/$1.json" ] && return
    python eval.py --model "$2" --out "$out/$1.part" --eval-documents $questions "${@:3}"
    mv "$out/$1.part" "$out/$1.json"
}

mkdir -p "$out"
# Search finds passages about all subjects. Its questions are split by subject, and dealt out so that two asked as one differ.
cat tiny/passages.jsonl tiny/passages_unseen.jsonl > $out/passages.jsonl
python - $out <<'P'
import json, random, sys
from qa import load_questions, split_of, subject

rows = load_questions("tiny/questions.jsonl")
random.Random(0).shuffle(rows)
for name in ("train", "dev", "test"):
    with open(f"{sys.argv[1]}/{name}.jsonl", "w") as file:
        for row in rows:
            if split_of(subject(row)) == name:
                print(json.dumps({"question": row.question, "golden_answers": row.answers}), file=file)
P

for seed in $seeds; do
    longqa="--task longqa --seed $seed" search="--task searchqa --seed $seed --questions $out/train.jsonl --corpus $out/passages.jsonl"
    train $seed/memtrain --seed $seed --eval-documents 64
    train $seed/task $longqa $task --steps $long_steps
    train $seed/memtrain-task $longqa $task --steps $task_steps --model $out/$seed/memtrain/checkpoint
    for ablation in end_to_end decoupled; do
        train $seed/$ablation --seed $seed --ablation $ablation
        train $seed/$ablation-task $longqa $task --steps $task_steps --model $out/$seed/$ablation/checkpoint
    done
    train $seed/search $search $task --steps $search_steps
    train $seed/memtrain-search $search $task --steps $search_steps --model $out/$seed/memtrain/checkpoint

    longqa="--task longqa --seed $seed --lengths $lengths --corpus tiny/passages.jsonl"
    search="--task searchqa --seed $seed --eval-questions $out/test.jsonl --corpus $out/passages.jsonl"
    measure $seed/longqa-base tiny/model $longqa
    measure $seed/longqa-memtrain $out/$seed/memtrain/checkpoint $longqa
    for steps in $(seq $task_steps $task_steps $long_steps); do
        measure $seed/longqa-task-$steps $out/$seed/task/checkpoints/step-$(printf %06d $steps) $longqa
    done
    for model in memtrain-task end_to_end-task decoupled-task; do
        measure $seed/longqa-$model $out/$seed/$model/checkpoint $longqa
    done
    measure $seed/search-base tiny/model $search
    for model in memtrain search memtrain-search; do
        measure $seed/search-$model $out/$seed/$model/checkpoint $search
    done
done
python recipes/tables.py $out
