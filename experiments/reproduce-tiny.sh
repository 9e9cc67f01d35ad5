#!/usr/bin/env bash
# Reproduces the claim on the tiny default, with curves: five seeds, no download, on 2 CPU cores.
#     experiments/reproduce-tiny.sh [FOLDER]
# Rerun the same command to resume: finished parts are skipped, an unfinished one continues. Runs go to
# runs/reproduce, figures and tables to docs/; given FOLDER (relative to the project), everything goes there.
# The environment variables SEEDS="0 1" and TASK_RATE=5e-5 change the seeds and the learning rate of task RL.
set -euo pipefail
case ${1:-} in
-h | --help) sed -n '2,/^set /{/^# /s/^# //p}' "$0" && exit ;;
-*) echo "error: unknown argument $1; the only argument is a folder" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.."
export out=${1:-runs/reproduce}
docs=$([ $# -gt 0 ] && echo "$out" || echo docs)
seeds=${SEEDS:-0 1 2 3 4}
export steps="0 2 4 8 16 32" # of task RL, at which it is measured
budget=16                    # steps of task RL with few labels, after an ablation, and at the other rate
labels="4 64"                # numbers of labelled questions, besides all
chunks=4                     # of a training text, both for MemTrain and for the task
lengths="4 16 32"            # 1, 4 and 8 times that
shorter="4 16"               # with few labels, after an ablation, and for habits
claimed=16                   # the claim's length, and the steps of task RL over which it is the mean
claimed_steps="2 4 8 16"
search_steps="0 16 32"       # of task RL on search QA; each is one of $steps
side_seeds=$(echo $seeds | cut -d " " -f 1-3) # for all but the claim: few labels, ablations, search QA, habits
rate=${TASK_RATE:-1e-4}      # of task RL; docs/results-tiny.md says how both rates were chosen
other_rate=4e-4              # at which the claim is measured, too

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
after() { # STEPS RUN TASK: the model after STEPS of task RL that starts from RUN
    [ "$1" = 0 ] && start "$2" || echo "$out/$seed/$2-$3/checkpoints/step-$(printf %06d "$1")"
}
aside() { [[ " $side_seeds " = *" $seed "* ]]; } # whether this seed does all that isn't the claim, too
ablations() { echo shuffled_rewards $(if aside; then echo end_to_end decoupled; fi); } # the control is the claim's

python -m experiments.begin "$out" seeds="$seeds" steps="$steps" budget="$budget" labels="$labels" rate="$rate" \
    other_rate="$other_rate" chunks="$chunks" lengths="$lengths" shorter="$shorter" claimed="$claimed" \
    claimed_steps="$claimed_steps" search_steps="$search_steps" side_seeds="$side_seeds"
longqa="--task longqa --chunks $chunks"
search="--task searchqa --objectives 1"

for seed in $seeds; do
    memtrain="--seed $seed --chunks $chunks"
    echo train $seed/memtrain $memtrain
    for run in $(ablations); do echo train $seed/$run $memtrain --ablation $run; done
done | all
for seed in $seeds; do
    # The dev questions are never asked here, but without --eval-questions the training questions would be split again.
    task="--seed $seed --lr $rate --lr-schedule constant --eval-questions $out/dev.jsonl"
    learn="$task --questions $out/train.jsonl"
    for run in base memtrain; do
        if aside; then echo curve $seed/$run-search $search $learn --model $(start $run); fi
        echo curve $seed/$run-task $longqa $learn --model $(start $run)
        echo curve $seed/$run-other $longqa $learn --lr $other_rate --steps $budget --model $(start $run)
    done
    for run in $(ablations); do echo train $seed/$run-task $longqa $learn --steps $budget --model $(start $run); done
    for label in $(aside && echo $labels); do
        few="$longqa $task --questions $out/train-$label-$seed.jsonl --steps $budget"
        for run in base memtrain; do echo train $seed/$run-task-$label $few --model $(start $run); done
    done
done | all
for seed in $seeds; do
    test="--seed $seed --eval-documents 48 --eval-questions $out/test-$seed"
    ask="$longqa $test.jsonl --lengths"
    echo measure $seed/qa/ceiling eval tiny/model $longqa $test-told.jsonl --lengths $lengths
    for run in base memtrain; do
        for step in $steps; do
            echo measure $seed/qa/$run-$step eval $(after $step $run task) $ask $lengths
        done
        for step in $claimed_steps; do
            echo measure $seed/qa/$run-other-$step eval $(after $step $run other) $ask $claimed
        done
        for label in $(aside && echo $labels); do
            echo measure $seed/qa/$run-label-$label eval $(start $run-task-$label) $ask $shorter
        done
        for step in $(aside && echo $search_steps); do
            echo measure $seed/qa/$run-search-$step eval $(after $step $run search) $search $test.jsonl
        done
    done
    for run in $(ablations); do
        echo measure $seed/qa/$run-0 eval $(start $run) $ask $shorter
        echo measure $seed/qa/$run-$budget eval $(start $run-task) $ask $shorter
    done
    for run in $(aside && echo base memtrain $(ablations)); do
        habits="--seed $seed --eval-documents 64 --lengths $shorter"
        echo measure $seed/habits/$run experiments.habits $(start $run) $habits
    done
done | all
python -m experiments.tables "$out" "$docs"
