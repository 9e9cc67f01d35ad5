#!/usr/bin/env bash
# The claim as curves, on the tiny default: five seeds, no download, on 2 CPU cores.
#     experiments/reproduce-tiny.sh [FOLDER]
# Rerun the same command to resume: a finished part is not run again, one begun goes on. Runs go to
# runs/reproduce, figures and tables to docs/; given FOLDER (relative to the project), all of it goes there.
# The environment variables SEEDS="0 1" and TASK_RATE=1e-4 change the seeds and the rate.
set -euo pipefail
case ${1:-} in
-h | --help) sed -n '2,/^set /{/^# /s/^# //p}' "$0" && exit ;;
-*) echo "error: unknown argument $1; a folder can be given" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.."
export out=${1:-runs/reproduce}
docs=$([ $# -gt 0 ] && echo "$out" || echo docs)
seeds=${SEEDS:-0 1 2 3 4}
export steps="2 4 8 16 32 64" # of task RL, where it is measured
budget=16                     # steps of task RL with few labels, and after an ablation
labels="4 16 64"              # questions to learn from, besides all
chunks=2                      # of a training text, of MemTrain and of the task alike
lengths="2 8 32"              # 1, 4 and 16 times that
shorter="2 8"                 # with few labels, and after an ablation
rate=${TASK_RATE:-5e-5}       # of task RL, by the rule in docs/results-tiny.md

# A core for each part: so small a model makes poor use of two. Counted first, as nproc counts by this variable.
cores=$(nproc)
export OMP_NUM_THREADS=1

train() { # NAME ARGUMENTS: the run in $out/NAME
    [ -e "$out/$1/finished" ] && return
    mkdir -p "$out/${1%/*}"
    # A run that Ctrl-C stopped ends well, too, but isn't finished.
    python memtrain.py --out "$out/$1" --eval-documents 0 --sample-every 100 --fast True "${@:2}" \
        >> "$out/$1.log" 2>&1 && [ -e "$out/$1/finished" ] && echo "$(date +%H:%M) trained $1" && return
    tail -n 3 "$out/$1.log" >&2 && return 255 # after which xargs starts nothing more
}

curve() { # NAME ARGUMENTS: a run that is measured at each of $steps; other checkpoints of it are deleted
    train "$1" --steps "${steps##* }" --save-every 2 --keep 64 "${@:2}" || return
    for checkpoint in "$out/$1"/checkpoints/step-*; do
        [ -d "$checkpoint" ] || continue
        step=$((10#${checkpoint##*-}))
        case " $steps " in *" $step "*) ;; *) rm -r "$checkpoint" ;; esac
    done
}

measure() { # NAME MODULE MODEL ARGUMENTS: what the module measures, in $out/NAME.json
    [ -e "$out/$1.json" ] && return
    mkdir -p "$out/${1%/*}"
    python -m "$2" --model "$3" --out "$out/$1.part" --fast True "${@:4}" > "$out/$1.log" 2>&1 &&
        mv "$out/$1.part" "$out/$1.json" && echo "$(date +%H:%M) measured $1" && return
    tail -n 3 "$out/$1.log" >&2 && return 255
}

export -f train curve measure
all() { xargs -r -P "$cores" -L 1 bash -uc '"$@"' part; } # lines on stdin: a function above, and its arguments

python -m experiments.begin "$out" seeds="$seeds" steps="0 $steps" budget="$budget" labels="$labels" rate="$rate"
longqa="--task longqa --chunks $chunks"

for seed in $seeds; do
    echo train $seed/memtrain --seed $seed --chunks $chunks
    for run in end_to_end decoupled shuffled_rewards; do
        echo train $seed/$run --seed $seed --chunks $chunks --ablation $run
    done
done | all
for seed in $seeds; do
    # The development questions are never asked here. Without them the questions to learn from would be split again.
    task="$longqa --seed $seed --lr $rate --lr-schedule constant --eval-questions $out/dev.jsonl"
    learn="$task --questions $out/train.jsonl"
    echo curve $seed/base-task $learn
    echo curve $seed/memtrain-task $learn --model $out/$seed/memtrain/checkpoint
    for run in end_to_end decoupled shuffled_rewards; do
        echo train $seed/$run-task $learn --steps $budget --model $out/$seed/$run/checkpoint
    done
    for label in $labels; do
        few="$task --questions $out/train-$label-$seed.jsonl --steps $budget"
        echo train $seed/base-task-$label $few
        echo train $seed/memtrain-task-$label $few --model $out/$seed/memtrain/checkpoint
    done
done | all
for seed in $seeds; do
    ask="$longqa --seed $seed --eval-questions $out/test-$seed.jsonl --eval-documents 48 --lengths"
    echo measure $seed/qa/base-0 eval tiny/model $ask $lengths
    echo measure $seed/qa/memtrain-0 eval $out/$seed/memtrain/checkpoint $ask $lengths
    for run in base memtrain; do
        for step in $steps; do
            model=$out/$seed/$run-task/checkpoints/step-$(printf %06d $step)
            echo measure $seed/qa/$run-$step eval $model $ask $lengths
        done
        for label in $labels; do
            echo measure $seed/qa/$run-label-$label eval $out/$seed/$run-task-$label/checkpoint $ask $shorter
        done
    done
    for run in end_to_end decoupled shuffled_rewards; do
        echo measure $seed/qa/$run-0 eval $out/$seed/$run/checkpoint $ask $shorter
        echo measure $seed/qa/$run-$budget eval $out/$seed/$run-task/checkpoint $ask $shorter
    done
    own="--seed $seed --eval-documents 64 --lengths 4 16"
    echo measure $seed/habits/base experiments.habits tiny/model $own
    for run in memtrain end_to_end decoupled shuffled_rewards; do
        echo measure $seed/habits/$run experiments.habits $out/$seed/$run/checkpoint $own
    done
done | all
python -m experiments.tables "$out" "$docs"
