#!/usr/bin/env bash
# The claim as curves, on the tiny default: five seeds, no download, on 2 CPU cores. Figures and tables go to docs/.
#     recipes/reproduce-tiny.sh [FOLDER]
# Stopped, it goes on when called again: a finished part is not run again, one begun is resumed. Everything is in
# runs/reproduce; with a FOLDER, seen from the project, in that, and docs/ stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
export out=${1:-runs/reproduce}
docs=$([ $# -gt 0 ] && echo "$out" || echo docs)
seeds=${SEEDS:-0 1 2 3 4}
export steps="2 4 8 16 32 64" # of task RL, where it is measured
budget=16                     # steps of task RL with few labels, and after an ablation
labels="4 16 64"              # questions to learn from, besides all
lengths="2 8 32"              # 1, 4 and 16 times the length of a task's training texts
# Chosen on development questions by the rule in docs/results-tiny.md, before the test questions were opened.
task="--lr ${TASK_LR:-1e-4} --lr-schedule constant"

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

curve() { # NAME ARGUMENTS: a run that is measured at each of $steps; other checkpoints of it are deleted
    train "$1" --steps "${steps##* }" --save-every 2 --keep 32 "${@:2}" || return
    for checkpoint in "$out/$1"/checkpoints/step-*; do
        [ -d "$checkpoint" ] || continue
        step=$((10#${checkpoint##*-}))
        case " $steps " in *" $step "*) ;; *) rm -r "$checkpoint" ;; esac
    done
}

measure() { # NAME MODEL ARGUMENTS: rows in $out/NAME.json
    [ -e "$out/$1.json" ] && return
    mkdir -p "$out/${1%/*}"
    python eval.py --model "$2" --out "$out/$1.part" --eval-documents 48 "${@:3}" > "$out/$1.log" 2>&1 &&
        mv "$out/$1.part" "$out/$1.json" && echo "$(date +%H:%M) measured $1" && return
    tail -n 3 "$out/$1.log" >&2 && return 255
}

habits() { # NAME MODEL: how a model keeps its memory, in $out/NAME.json
    [ -e "$out/$1.json" ] && return
    mkdir -p "$out/${1%/*}"
    python recipes/habits.py --model "$2" --out "$out/$1.part" --lengths 4 16 > "$out/$1.log" 2>&1 &&
        mv "$out/$1.part" "$out/$1.json" && echo "$(date +%H:%M) measured $1" && return
    tail -n 3 "$out/$1.log" >&2 && return 255
}
export -f train curve measure habits
all() { xargs -r -P "$cores" -L 1 bash -uc '"$@"' part; } # lines on stdin: a function above, and its arguments

mkdir -p "$out"
# Questions are split by subject. Each seed is tested on a share of the test questions of its own, so that no question
# counts twice, and learns from few labels of its own.
python - "$out" "$labels" $seeds <<'P'
import random, sys
from pathlib import Path
from tasks.questions import load_questions, split_of, subject

file, out, labels, seeds = Path("tiny/questions.jsonl"), sys.argv[1], sys.argv[2].split(), sys.argv[3:]
rows = list(zip(load_questions(file), file.read_text().splitlines(), strict=True))
random.Random(0).shuffle(rows)
parts = {name: [line for row, line in rows if split_of(subject(row)) == name] for name in ("train", "dev", "test")}
for n, seed in enumerate(seeds):
    parts[f"test-{seed}"] = parts["test"][n :: len(seeds)]
    few = random.Random(int(seed)).sample(parts["train"], len(parts["train"]))
    parts |= {f"train-{label}-{seed}": few[: int(label)] for label in labels}
for name, part in parts.items():
    Path(f"{out}/{name}.jsonl").write_text("".join(f"{line}\n" for line in part))
P
longqa="--task longqa --chunks 2"

for seed in $seeds; do
    echo train $seed/memtrain --seed $seed
    for ablation in end_to_end decoupled shuffled_rewards; do echo train $seed/$ablation --seed $seed --ablation $ablation; done
done | all
for seed in $seeds; do
    learn="$longqa --seed $seed $task --questions $out/train.jsonl"
    echo curve $seed/base-task $learn
    echo curve $seed/memtrain-task $learn --model $out/$seed/memtrain/checkpoint
    for run in end_to_end decoupled shuffled_rewards; do
        echo train $seed/$run-task $learn --steps $budget --model $out/$seed/$run/checkpoint
    done
    for label in $labels; do
        few="$longqa --seed $seed $task --questions $out/train-$label-$seed.jsonl --steps $budget"
        echo train $seed/base-task-$label $few
        echo train $seed/memtrain-task-$label $few --model $out/$seed/memtrain/checkpoint
    done
done | all
for seed in $seeds; do
    ask="$longqa --seed $seed --eval-questions $out/test-$seed.jsonl --lengths $lengths"
    echo measure $seed/qa/base-0 tiny/model $ask
    for run in memtrain end_to_end decoupled shuffled_rewards; do
        echo measure $seed/qa/$run-0 $out/$seed/$run/checkpoint $ask
    done
    for run in base memtrain; do
        for step in $steps; do
            echo measure $seed/qa/$run-$step $out/$seed/$run-task/checkpoints/step-$(printf %06d $step) $ask
        done
        for label in $labels; do
            echo measure $seed/qa/$run-label-$label $out/$seed/$run-task-$label/checkpoint $ask
        done
    done
    for run in end_to_end decoupled shuffled_rewards; do
        echo measure $seed/qa/$run-$budget $out/$seed/$run-task/checkpoint $ask
    done
    echo habits $seed/habits/base tiny/model --seed $seed
    for run in memtrain end_to_end decoupled shuffled_rewards; do
        echo habits $seed/habits/$run $out/$seed/$run/checkpoint --seed $seed
    done
done | all
python recipes/tables.py "$out" "$docs"
