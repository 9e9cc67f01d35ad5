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
seeds="0 1 2" task_steps=16 search_steps=16
long_steps="16 48 96" # of task RL alone; the last takes longer than MemTrain and task RL together
lengths="2 8 32 128" # 1 to 64 times the length of a task's training documents
# The rate was chosen on the development questions (--eval-split dev), see README.
task="--lr 2e-4 --lr-schedule constant --save-every 16 --keep 9"

# A core for each part: so small a model makes poor use of two. Counted first, as nproc counts by this variable.
cores=$(nproc)
export OMP_NUM_THREADS=1

train() { # NAME ARGUMENTS: the run in $out/NAME
    [ -e "$out/$1/finished" ] && return
    mkdir -p "$out/${1%/*}"
    # A run that Ctrl-C stopped ends well, too, but isn't finished.
    python memtrain.py --out "$out/$1" --eval-documents 0 --sample-every 100 "${@:2}" >> "$out/$1.log" 2>&1 &&
        [ -e "$out/$1/finished" ] && echo "$(date +%H:%M) trained $1" && return
    tail -n 3 "$out/$1.log" >&2 && return 255 # on which xargs begins nothing more
}

measure() { # NAME MODEL ARGUMENTS: rows in $out/NAME.json
    [ -e "$out/$1.json" ] && return
    python eval.py --model "$2" --out "$out/$1.part" --eval-documents 48 "${@:3}" > "$out/$1.log" 2>&1 &&
        mv "$out/$1.part" "$out/$1.json" && echo "$(date +%H:%M) measured $1" && return
    tail -n 3 "$out/$1.log" >&2 && return 255
}
export -f train measure
all() { xargs -r -P "$cores" -L 1 bash -uc '"$@"' part; } # lines on stdin: train or measure, and its arguments

mkdir -p "$out"
# Questions are split by subject, and shuffled: in search two in a row are asked as one. Each seed is tested on a third
# of the test questions of its own, so that no question counts twice.
python - "$out" $seeds <<'P'
import json, random, sys
from pathlib import Path
from tasks.questions import load_questions, split_of, subject

file, out, seeds = Path("tiny/questions.jsonl"), sys.argv[1], sys.argv[2:]
rows = list(zip(load_questions(file), file.read_text().splitlines(), strict=True))
random.Random(0).shuffle(rows)
parts = {name: [row for row in rows if split_of(subject(row[0])) == name] for name in ("train", "test")}
parts |= {f"test-{seed}": parts["test"][n :: len(seeds)] for n, seed in enumerate(seeds)}
for name, part in parts.items():
    Path(f"{out}/{name}.jsonl").write_text("".join(f"{line}\n" for _, line in part))
    search = ({"question": row.question, "golden_answers": row.answers} for row, _ in part)
    Path(f"{out}/search-{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in search))
P
longqa="--task longqa --chunks 2" search="--task searchqa --questions $out/search-train.jsonl"

# Table 1 and Figure 4
for seed in $seeds; do
    echo train $seed/memtrain --seed $seed
    echo train $seed/task $longqa --seed $seed $task --steps ${long_steps##* }
done | all
for seed in $seeds; do
    model=$out/$seed/memtrain/checkpoint
    echo train $seed/memtrain-task $longqa --seed $seed $task --steps $task_steps --model $model
done | all
for seed in $seeds; do
    read_long="$longqa --seed $seed --eval-questions $out/test-$seed.jsonl --lengths $lengths"
    for steps in $long_steps; do
        echo measure $seed/longqa-task-$steps $out/$seed/task/checkpoints/step-$(printf %06d $steps) $read_long
    done
    for run in memtrain memtrain-task; do echo measure $seed/longqa-$run $out/$seed/$run/checkpoint $read_long; done
    echo measure $seed/longqa-base tiny/model $read_long
done | all
python recipes/tables.py "$out" $readme

# Table 2
for seed in $seeds; do
    learn="$search --eval-questions $out/search-test-$seed.jsonl --seed $seed $task --steps $search_steps"
    echo train $seed/search $learn
    echo train $seed/memtrain-search $learn --model $out/$seed/memtrain/checkpoint
done | all
for seed in $seeds; do
    find="$search --seed $seed --eval-questions $out/search-test-$seed.jsonl"
    echo measure $seed/search-base tiny/model $find
    for run in memtrain search memtrain-search; do echo measure $seed/search-$run $out/$seed/$run/checkpoint $find; done
done | all
python recipes/tables.py "$out" $readme

# Figure 3
for seed in $seeds; do
    for ablation in end_to_end decoupled; do echo train $seed/$ablation --seed $seed --ablation $ablation; done
done | all
for seed in $seeds; do
    for run in end_to_end decoupled; do
        echo train $seed/$run-task $longqa --seed $seed $task --steps $task_steps --model $out/$seed/$run/checkpoint
    done
done | all
for seed in $seeds; do
    read_long="$longqa --seed $seed --eval-questions $out/test-$seed.jsonl --lengths $lengths"
    for run in end_to_end-task decoupled-task; do
        echo measure $seed/longqa-$run $out/$seed/$run/checkpoint $read_long
    done
done | all
python recipes/tables.py "$out" $readme
