#!/usr/bin/env bash
# From a bare Debian or Ubuntu system to a trained model: installs packages, builds, makes a corpus,
# a tokenizer and token datasets, trains a small mixture-of-experts model on the CPU (stopped once on
# purpose and resumed), measures it on held-out text and lets it write. Under ten minutes on two cores.
#
#   scripts/quickstart.sh [--fresh] [--no-install]
#
#   --fresh        trains again even if a finished run is there
#   --no-install   does not look at packages
#
# Running it again does only what is missing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/install_deps.sh

fresh=0 install=1
while (($# > 0)); do
  case $1 in
    --fresh) fresh=1 ;;
    --no-install) install=0 ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    *) die "unknown option '$1'; --help lists them" ;;
  esac
  shift
done

program=build/deepseek-train
config=configs/quickstart.yaml
corpus=data/kjv/text
tokenizer=data/kjv/tokenizer.json
train_data=data/kjv/train
valid_data=data/kjv/valid
run=runs/$(sed -n 's/^run:.*[{ ]name: *\([A-Za-z0-9._-]*\).*/\1/p; s/^  name: *\([A-Za-z0-9._-]*\).*/\1/p' \
  "$config" | head -n 1)
metrics=$run/metrics.jsonl
started=$(date +%s)
verdict=0

# The value of a number in the last line of the metrics that has the event, or nothing.
last_metric() {  # last_metric EVENT KEY
  { grep "\"event\":\"$1\"" "$metrics" 2>/dev/null || true; } | tail -n 1 |
    sed -n "s/.*\"$2\":\([-+0-9.e]*\).*/\1/p"
}
is_finished() {
  [[ -f $metrics ]] && grep '"event":"end"' "$metrics" | tail -n 1 | grep -q '"outcome":"finished"'
}
has_checkpoint() { compgen -G "$run/checkpoints/step-*/manifest.json" >/dev/null; }

make_datasets() {
  if [[ $tokenizer -nt $corpus/train.jsonl ]]; then
    say "tokenizer: $tokenizer is there"
  else
    "$program" tokenizer train "$corpus/train.jsonl" --vocab-size 4096 --output "$tokenizer"
  fi
  # Both do nothing if the dataset is there and was made from these files.
  "$program" data build "$corpus/train.jsonl" --tokenizer "$tokenizer" --output "$train_data" --overwrite
  "$program" data build "$corpus/valid.jsonl" --tokenizer "$tokenizer" --output "$valid_data" --overwrite
}

# Starts training and sends SIGTERM after a third of the steps, as a scheduler does to a job that has
# to make room. The program saves a checkpoint and leaves with exit code 75.
train_first_part() {
  local arguments=(--config "$config") pid status=0 step steps
  if has_checkpoint; then arguments+=(--overwrite); fi
  rm -f "$metrics"
  "$program" "${arguments[@]}" &
  pid=$!
  trap 'kill -TERM $pid 2>/dev/null; wait $pid; exit 130' INT TERM
  while kill -0 $pid 2>/dev/null; do
    step=$(last_metric step step) steps=$(last_metric step steps)
    if ((${step:-0} > 0 && 3 * ${step:-0} >= ${steps:-0})); then
      say "quickstart: step $step of $steps; sending SIGTERM to see it save and leave"
      kill -TERM $pid 2>/dev/null || true
      break
    fi
    sleep 0.2
  done
  wait $pid || status=$?
  trap - INT TERM
  case $status in
    75) say "quickstart: the program saved a checkpoint and left with exit code 75, as it should" ;;
    0) say "quickstart: the run was over before it could be stopped" ;;
    *) die "training ended with exit code $status" ;;
  esac
}

train_to_the_end() {
  local status=0
  "$program" --config "$config" --resume latest || status=$?
  ((status == 0)) || die "training ended with exit code $status; run this script again to go on"
}

# percent_less A B: by how much A is below B.
percent_less() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.0f", 100 * (1 - a / b) }'; }
is_below() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a < b) }'; }
number_after() { sed -n "s/.*\"$1\": *\([-+0-9.e]*\).*/\1/p" | tail -n 1; }

compare_with_simple_models() {
  local model bigram gzip plain packed
  model=$("$program" eval --run "$run" --json | number_after bits_per_byte)
  bigram=$("$program" data inspect "$valid_data" --bigram "$train_data" --limit 0 |
    sed -n 's/.*bigram.* \([0-9.]*\) bits per byte.*/\1/p')
  [[ -n $model && -n $bigram ]] || die "eval or data inspect printed no bits per byte"
  plain=$(wc -c <"$corpus/valid.txt") packed=$(gzip -9 -c "$corpus/valid.txt" | wc -c)
  gzip=$(awk -v p="$packed" -v n="$plain" 'BEGIN { printf "%.3f", 8 * p / n }')
  say "bits per byte on Esther, Ecclesiastes, John and Romans, which the model never saw:"
  printf '  %7.3f  this model\n  %7.3f  gzip -9\n  %7.3f  a table of token pairs counted in the training text\n' \
    "$model" "$gzip" "$bigram"
  if is_below "$model" "$gzip" && is_below "$model" "$bigram"; then
    say "verdict: the model needs $(percent_less "$model" "$gzip") % fewer bits than gzip and" \
      "$(percent_less "$model" "$bigram") % fewer than the table: it learned more than pairs and repeats"
  else
    verdict=1
    say "verdict: the model does not beat both; it was trained too little or something is wrong"
  fi
}

step "1/6 packages"
if ((install)); then install_groups build corpus; fi
step "2/6 build"
cuda=off  # compiling kernels takes minutes, which only a machine with a GPU gets back
if compgen -G "/dev/nvidia[0-9]*" >/dev/null || nvidia-smi -L >/dev/null 2>&1; then cuda=auto; fi
scripts/build.sh --no-tests --cuda "$cuda"
step "3/6 corpus, tokenizer, token datasets"
scripts/corpus.sh kjv "$corpus"
make_datasets
step "4/6 training"
if ((!fresh)) && is_finished; then
  say "training: $run is finished (--fresh trains again)"
else
  training_started=$(date +%s)
  if ((fresh)) || ! has_checkpoint; then train_first_part; fi
  train_to_the_end
  say "training: $(seconds_since "$training_started") s"
fi
step "5/6 what it learned"
compare_with_simple_models
step "6/6 what it writes after 'In the beginning'"
"$program" generate --run "$run" --prompt 'In the beginning' --max-tokens 120 --temperature 0.8

step "done in $(seconds_since "$started") s; from here"
cat <<END
  $program generate --run $run --prompt 'And Moses said'
  $program eval --run $run
  $program ckpt ls $run
  $program --config $config --set run.name=second --set optimizer.lr=5e-4
  $program config explain
END
exit $verdict
