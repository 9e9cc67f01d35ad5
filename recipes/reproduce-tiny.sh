#!/usr/bin/env bash
# The paper's Tables 1 and 2 and Figures 3 and 4 on the tiny default: three seeds, no download, on 2 CPU cores.
#     recipes/reproduce-tiny.sh [FOLDER]
# Stopped, it goes on when called again: a finished part is not run again, one begun is resumed. Everything is in
# runs/reproduce, and recipes/tables.py writes what is complete into results.json there and into README; with a FOLDER,
# seen from the project, everything is in that, and README stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
export out=${1:-runs/reproduce}
readme=$([ $# -gt 0 ] || echo README.md)
seeds="0 1 2" task_steps=16 long_steps=48 search_steps=16
lengths="2 8 32 128" # 1 to 64 times the length of a task's training documents
# Guessed from one run; to be chosen on the development questions (--eval-split dev) before its tables are shown.
task="--lr 2e-4 --lr-schedule constant --save-every $task_steps --keep 9"

train() { # NAME ARGUMENTS
    [ -e "$out/$1/finished" ] && return
    python memtrain.py --out "$out/$1" --eval-documents 0 --sample-every 100 "${@:2}"
    [ -e "$out/$1/finished" ] # a run that Ctrl-C stopped ends well too
}

measure() { # NAME MODEL ARGUMENTS: rows in $out/NAME.json. A core each: so small a model makes poor use of two
    [ -e "$out/$1.json" ] && return
    OMP_NUM_THREADS=1 python eval.py --model "$2" --out "$out/$1.part" --eval-documents 32 "${@:3}" > "$out/$1.log" 2>&1 ||
        { tail -n 3 "$out/$1.log" >&2 && return 1; }
    mv "$out/$1.part" "$out/$1.json"
}
export -f measure
all() { xargs -r -P "$(nproc)" -L 1 bash -euc 'measure "$@"' measure; } # a line each on stdin: the arguments of measure

mkdir -p "$out"
# Search finds passages about all subjects. Its questions are split by subject, and shuffled: two in a row are asked as one.
cat tiny/passages.jsonl tiny/passages_unseen.jsonl > "$out/passages.jsonl"
python - "$out" <<'P'
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
longqa="--task longqa --chunks 2" search="--task searchqa --questions $out/train.jsonl --eval-questions $out/test.jsonl --corpus $out/passages.jsonl"

for seed in $seeds; do train $seed/memtrain --seed $seed --eval-documents 64; done

# Table 1 and Figure 4
for seed in $seeds; do
    train $seed/memtrain-task $longqa --seed $seed $task --steps $task_steps --model $out/$seed/memtrain/checkpoint
    train $seed/task $longqa --seed $seed $task --steps $long_steps
done
for seed in $seeds; do
    read_long="$longqa --seed $seed --lengths $lengths"
    echo $seed/longqa-memtrain-task $out/$seed/memtrain-task/checkpoint $read_long
    for steps in $(seq $task_steps $task_steps $long_steps); do
        echo $seed/longqa-task-$steps $out/$seed/task/checkpoints/step-$(printf %06d $steps) $read_long
    done
    echo $seed/longqa-memtrain $out/$seed/memtrain/checkpoint $read_long
    echo $seed/longqa-base tiny/model $read_long
done | all
python recipes/tables.py "$out" $readme

# Table 2
for seed in $seeds; do
    train $seed/search $search --seed $seed $task --steps $search_steps
    train $seed/memtrain-search $search --seed $seed $task --steps $search_steps --model $out/$seed/memtrain/checkpoint
done
for seed in $seeds; do
    echo $seed/search-base tiny/model $search --seed $seed
    for model in memtrain search memtrain-search; do echo $seed/search-$model $out/$seed/$model/checkpoint $search --seed $seed; done
done | all
python recipes/tables.py "$out" $readme

# Figure 3
for seed in $seeds; do
    for ablation in end_to_end decoupled; do
        train $seed/$ablation --seed $seed --ablation $ablation
        train $seed/$ablation-task $longqa --seed $seed $task --steps $task_steps --model $out/$seed/$ablation/checkpoint
    done
done
for seed in $seeds; do
    for model in end_to_end-task decoupled-task; do
        echo $seed/longqa-$model $out/$seed/$model/checkpoint $longqa --seed $seed --lengths $lengths
    done
done | all
python recipes/tables.py "$out" $readme
