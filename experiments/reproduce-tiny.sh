#!/usr/bin/env bash
# Reproduces the claim on the tiny default, with curves, on 2 CPU cores: five seeds for the claim, the first three of
# them for few labels, ablations and search QA.
#     experiments/reproduce-tiny.sh [FOLDER]
# Rerun the same command to resume: finished parts are skipped, an unfinished one continues. Runs go to
# runs/reproduce, figures and tables to docs/; given FOLDER (relative to the project), everything goes there.
# The environment variables SEEDS="0 1" and TASK_RATE=5e-5 change the seeds and the first rate of task RL.
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
labels=4                     # numbers of labelled questions, besides all
chunks=4                     # of a training text, both for MemTrain and for the task
lengths="4 16"               # 1 and 4 times that
claimed=16                   # the claim's length
claimed_steps="2 4 8 16"     # of task RL, over which it is the mean
far=32                       # 8 times, and the steps at which it is measured, too: it takes longest
far_steps="0 16"
search_steps="0 16 32"       # of task RL on search QA; each is one of $steps
asked=48                     # test questions of each seed
side_seeds=$(echo $seeds | cut -d " " -f 1-3) # for few labels, ablations (but the control) and search QA
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
at() { echo $lengths $([[ " $far_steps " = *" $1 "* ]] && echo $far); } # STEP: the lengths to measure at
longqa="--task longqa --chunks $chunks"
search="--task searchqa --objectives 1"
memtrain() { echo --seed $seed --chunks $chunks; }
learn() { # QUESTIONS: settings of task RL; it never asks the dev questions, but without them it would split the others
    echo --seed $seed --lr $rate --lr-schedule constant --questions $out/$1.jsonl --eval-questions $out/dev.jsonl
}
test="--eval-documents $asked --eval-questions $out/test"

python -m experiments.begin "$out" seeds="$seeds" steps="$steps" budget="$budget" labels="$labels" rate="$rate" \
    other_rate="$other_rate" chunks="$chunks" lengths="$lengths" claimed="$claimed" claimed_steps="$claimed_steps" \
    far="$far" far_steps="$far_steps" search_steps="$search_steps" side_seeds="$side_seeds" asked="$asked"

# The claim and its control
for seed in $seeds; do
    echo train $seed/memtrain $(memtrain)
    echo train $seed/shuffled_rewards $(memtrain) --ablation shuffled_rewards
done | all
for seed in $seeds; do
    for run in base memtrain; do
        echo curve $seed/$run-task $longqa $(learn train) --model $(start $run)
        echo curve $seed/$run-other $longqa $(learn train) --lr $other_rate --steps $budget --model $(start $run)
    done
    echo train $seed/shuffled_rewards-task $longqa $(learn train) --steps $budget --model $(start shuffled_rewards)
done | all
for seed in $seeds; do
    ask="--seed $seed $longqa $test-$seed"
    echo measure $seed/qa/ceiling eval tiny/model $ask-told.jsonl --lengths $lengths $far
    for run in base memtrain; do
        for step in $steps; do
            echo measure $seed/qa/$run-$step eval $(after $step $run task) $ask.jsonl --lengths $(at $step)
        done
        for step in $claimed_steps; do
            echo measure $seed/qa/$run-other-$step eval $(after $step $run other) $ask.jsonl --lengths $claimed
        done
    done
    echo measure $seed/qa/shuffled_rewards-0 eval $(start shuffled_rewards) $ask.jsonl --lengths $lengths
    echo measure $seed/qa/shuffled_rewards-$budget eval $(start shuffled_rewards-task) $ask.jsonl --lengths $lengths
done | all

# Beside it: ablations, few labels, search QA
for seed in $side_seeds; do
    for run in end_to_end decoupled; do echo train $seed/$run $(memtrain) --ablation $run; done
done | all
for seed in $side_seeds; do
    for run in end_to_end decoupled; do
        echo train $seed/$run-task $longqa $(learn train) --steps $budget --model $(start $run)
    done
    for run in base memtrain; do
        echo curve $seed/$run-search $search $(learn train) --model $(start $run)
        for label in $labels; do
            few="$longqa $(learn train-$label-$seed) --steps $budget"
            echo train $seed/$run-task-$label $few --model $(start $run)
        done
    done
done | all
for seed in $side_seeds; do
    ask="--seed $seed $longqa $test-$seed.jsonl --lengths $lengths"
    for run in end_to_end decoupled; do
        echo measure $seed/qa/$run-0 eval $(start $run) $ask
        echo measure $seed/qa/$run-$budget eval $(start $run-task) $ask
    done
    for run in base memtrain; do
        for label in $labels; do
            echo measure $seed/qa/$run-label-$label eval $(start $run-task-$label) $ask
        done
        for step in $search_steps; do
            found="--seed $seed $search $test-$seed.jsonl"
            echo measure $seed/qa/$run-search-$step eval $(after $step $run search) $found
        done
    done
done | all
python -m experiments.tables "$out" "$docs"
