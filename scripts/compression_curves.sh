#!/usr/bin/env bash
# Held-out loss of one job with gradients sent dense, as top-k with and without error feedback, and as int8,
# at equal steps; and the bytes of the gradient phase. Needs the data that scripts/quickstart.sh prepares and
# 4 free cores for each run at a time.
#
#   scripts/compression_curves.sh [--steps N] [--dense-steps N] [--seeds "1 2 3"] [--at-once N] [--program FILE]
#
# Prints a row per run and a table of means; exits 1 if a bound of README.md, section "Compressed gradients", is broken.
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Sparse gradients cost most while the loss falls fast: top-k begins after a fifth of the run.
steps=1500 dense_steps=300 seeds="1 2 3" at_once=$(($(nproc) / 4)) program=build/deepseek-train
while (($#)); do
  case $1 in
    --steps) steps=$2 ;;
    --dense-steps) dense_steps=$2 ;;
    --seeds) seeds=$2 ;;
    --at-once) at_once=$2 ;;
    --program) program=$2 ;;
    *) die "unknown option $1; see the first lines of scripts/compression_curves.sh" ;;
  esac
  shift 2
done
((at_once > 0)) || at_once=1
[[ -x $program ]] || die "$program does not exist: scripts/build.sh builds it"
[[ -d data/kjv/train ]] || die "data/kjv/train does not exist: scripts/quickstart.sh prepares it"
if ((EUID == 0)); then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi

folder=runs/compression-curves
rm -rf "$folder" && mkdir -p "$folder"

options_of() {
  case $1 in
    dense) ;;
    topk) echo "--set compression.method=topk --set compression.dense_steps=$dense_steps" ;;
    topk-no-feedback)
      echo "--set compression.method=topk --set compression.dense_steps=$dense_steps --set compression.error_feedback=false"
      ;;
    int8) echo "--set compression.method=int8" ;;
  esac
}

run_one() {
  local method=$1 seed=$2 name=$1-$2
  # shellcheck disable=SC2046  # several words on purpose
  "$program" --config configs/compression-curves.yaml --set run.name="$name" --set run.seed="$seed" \
    --set train.steps="$steps" $(options_of "$method") >"$folder/$name.log" 2>&1 ||
    { tail -n 5 "$folder/$name.log" >&2; die "$name failed; the whole output is in $folder/$name.log"; }
  field() { sed -n "s/.*\"event\":\"$1\".*[{,]\"$2\":\([0-9.e+-]*\).*/\1/p" "$folder/$name/metrics.jsonl" | tail -n 1; }
  echo "$method $seed $(field eval loss) $(field step reduce_scatter_bytes) $(field step reduce_scatter_fp32_bytes)"
}

failed=0
running=0
for seed in $seeds; do
  for method in dense topk topk-no-feedback int8; do
    if ((running == at_once)); then
      wait -n || failed=1
      running=$((running - 1))
    fi
    run_one "$method" "$seed" >"$folder/$method-$seed.row" &
    running=$((running + 1))
  done
done
while ((running > 0)); do
  wait -n || failed=1
  running=$((running - 1))
done
((failed == 0)) || die "a run failed"

# Bounds: top-k with feedback within 1 % of dense and int8 within 0.3 %, as means over the seeds; without feedback
# the gap of top-k is at least 3 times as large and larger than the spread of the dense runs.
cat "$folder"/*.row | LC_ALL=C sort -k2,2n -k1,1 | awk -v seed_list="$seeds" '
  NF != 5 { print "error: no result in the row: " $0; bad = 1; next }
  {
    loss[$1, $2] = $3; sum[$1] += $3; runs[$1]++
    fewer[$1] = 100 * (1 - $4 / $5)
    if ($1 == "dense") { if (!low || $3 < low) low = $3; if ($3 > high) high = $3 }
  }
  function gap(method) { return sum[method] / runs[method] / (sum["dense"] / runs["dense"]) - 1 }
  END {
    if (bad) exit 1
    count = split(seed_list, seeds, " ")
    split("dense topk topk-no-feedback int8", methods, " ")
    printf "%-17s", "held-out loss"
    for (s = 1; s <= count; ++s) printf "  seed %-4s", seeds[s]
    printf "  %8s  %10s  %s\n", "mean", "over dense", "bytes of the gradient phase against fp32"
    for (m = 1; m in methods; ++m) {
      method = methods[m]
      printf "%-17s", method
      for (s = 1; s <= count; ++s) printf "  %9.4f", loss[method, seeds[s]]
      printf "  %8.4f  %+9.3f %%  %.2f %% fewer\n", sum[method] / runs[method], 100 * gap(method), fewer[method]
    }
    spread = (high - low) / (sum["dense"] / runs["dense"])
    printf "spread of the dense runs: %.3f %%\n", 100 * spread
    if (gap("topk") > 0.01) { print "broken: top-k with error feedback is more than 1 % over dense"; bad = 1 }
    if (gap("int8") > 0.003) { print "broken: int8 is more than 0.3 % over dense"; bad = 1 }
    if (gap("topk-no-feedback") < 3 * gap("topk")) {
      print "broken: top-k without feedback is less than 3 times as far off as with it"
      bad = 1
    }
    if (gap("topk-no-feedback") < spread) {
      print "broken: top-k without feedback is within the spread of seeds"
      bad = 1
    }
    exit bad
  }'
