#!/usr/bin/env bash
# Reproduces the claim on the tiny default, with curves: five seeds, no download, on 2 CPU cores.
#     experiments/reproduce-tiny.sh [FOLDER]
# Rerun the same command to resume: finished parts are skipped, an unfinished one continues. Runs go to
# runs/reproduce, figures and tables to docs/; given FOLDER (relative to the project), everything goes there.
# The environment variables SEEDS="0 1" and TASK_RATE=1e-4 change the seeds and the learning rate of task RL.
set -euo pipefail
case ${1:-} in
-h | --help) sed -n '2,/^set /{/^# /s/^# //p}' "$0" && exit ;;
-*) echo "error: unknown argument $1; the only argument is a folder" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.."
export out=${1:-runs/reproduce}
docs=$([ $# -gt 0 ] && echo "$out" || echo docs)
seeds=${SEEDS:-0 1 2 3 4}
export steps="2 4 8 16 32 64" # of task RL, at which it is measured
budget=16                     # steps of task RL with few labels, and after an ablation
labels="4 16 64"              # numbers of labelled questions, besides all
chunks=2                      # of a training text, both for MemTrain and for the task
lengths="2 8 32"              # 1, 4 and 16 times that
shorter="2 8"                 # with few labels, and after an ablation
rate=${TASK_RATE:-5e-5}       # of task RL, by the rule in docs/results-tiny.md

# One core for each part: such a small model makes poor use of two. nproc comes first, as it obeys OMP_NUM_THREADS.
cores=$(nproc)
export OMP_NUM_THREADS=1

part() { # NAME FILE COMMAND: run it, unless FILE exists; it writes FILE, or NAME.part, which becomes FILE
    [ -e "$2" ] && return
    mkdir -p "$out/${1%/*}"
    if "${@:3}" >> "$out/$1.log" 2>&1; then
        [ ! -e "$out/$1.part" ] || mv "$out/$1.part" "$2"
        [ -e "$2" ] && echo "$(date +%H:%M) $1" && return # after Ctrl-C a run exits with 0, but unfinished
    fi
    tail -n 3 "$out/$1.log" >&2 && return 255 # makes xargs stop
}

train() { # NAME ARGUMENTS: the run in $out/NAME
    part "$1" "$out/$1/finished" \
        python memtrain.py --out "$out/$1" --eval-documents 0 --sample-every 100 --fast True "${@:2}"
}

curve() { # NAME ARGUMENTS: a run to be measured at each of $steps; its other checkpoints are deleted
    train "$1" --steps "${steps##* }" --save-every 2 --keep 64 "${@:2}" || return
    for checkpoint in "$out/$1"/checkpoints/step-*; do
        [ -d "$checkpoint" ] || continue
        step=$((10#${checkpoint##*-}))
        [[ " $steps " = *" $step "* ]] || rm -r "$checkpoint"
    done
}

measure() { # NAME MODULE MODEL ARGUMENTS: the module's results, in $out/NAME.json
    part "$1" "$out/$1.json" python -m "$2" --model "$3" --out "$out/$1.part" --fast True "${@:4}"
}

export -f part train curve measure
all() { xargs -r -P "$cores" -L 1 bash -uc '"$@"' part; } # lines on stdin: a function above and its arguments
start() { [ "$1" = base ] && echo tiny/model || echo "$out/$seed/$1/checkpoint"; } # RUN: its final model

python -m experiments.begin "$out" seeds="$seeds" steps="0 $steps" budget="$budget" labels="$labels" rate="$rate"
longqa="--task longqa --chunks $chunks"
ablations="end_to_end decoupled shuffled_rewards"

for seed in $seeds; do
    memtrain="--seed $seed --chunks $chunks"
    echo train $seed/memtrain $memtrain
    for run in $ablations; do echo train $seed/$run $memtrain --ablation $run; done
done | all
for seed in $seeds; do
    # The dev questions are never asked here, but without --eval-questions the training questions would be split again.
    task="$longqa --seed $seed --lr $rate --lr-schedule constant --eval-questions $out/dev.jsonl"
    learn="$task --questions $out/train.jsonl"
    for run in base memtrain; do echo curve $seed/$run-task $learn --model $(start $run); done
    for run in $ablations; do echo train $seed/$run-task $learn --steps $budget --model $(start $run); done
    for label in $labels; do
        few="$task --questions $out/train-$label-$seed.jsonl --steps $budget"
        for run in base memtrain; do echo train $seed/$run-task-$label $few --model $(start $run); done
    done
done | all
for seed in $seeds; do
    ask="$longqa --seed $seed --eval-questions $out/test-$seed.jsonl --eval-documents 48 --lengths"
    for run in base memtrain; do
        echo measure $seed/qa/$run-0 eval $(start $run) $ask $lengths
        for step in $steps; do
            model=$out/$seed/$run-task/checkpoints/step-$(printf %06d $step)
            echo measure $seed/qa/$run-$step eval $model $ask $lengths
        done
        for label in $labels; do
            echo measure $seed/qa/$run-label-$label eval $(start $run-task-$label) $ask $shorter
        done
    done
    for run in $ablations; do
        echo measure $seed/qa/$run-0 eval $(start $run) $ask $shorter
        echo measure $seed/qa/$run-$budget eval $(start $run-task) $ask $shorter
    done
    for run in base memtrain $ablations; do
        echo measure $seed/habits/$run experiments.habits $(start $run) --seed $seed --eval-documents 64 --lengths 4 16
    done
done | all
python -m experiments.tables "$out" "$docs"
