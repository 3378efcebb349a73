#!/usr/bin/env bash
# The quick start three times from the same seed: plain GRPO, Clip_B and Clip_V, with thresholds
# that bite at this scale, and one picture of all three.
#
#   examples/entropy_collapse/run.sh [STEPS] [OUTPUT FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
steps=${1:-20}
output=${2:-runs/entropy_collapse}
model=${MODEL:-${ONPOLICY_CACHE:-$HOME/.cache/onpolicy}/models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf}
scripts/setup >/dev/null

train() { # NAME, then the gate's settings
    local name=$1
    shift
    echo "== $name"
    cargo run --release --quiet -- train --config examples/quickstart.toml --model "$model" \
        --steps "$steps" --output "$output/$name" --port 0 "${@/#/--set=gate.}"
}

train grpo name=none
train clip_b name=clip_b mu=1.0
train clip_v name=clip_v mu=1.5 max_frac=0.05
cargo run --release --quiet -- plot "GRPO=$output/grpo" "Clip_B=$output/clip_b" \
    "Clip_V=$output/clip_v" --output "$output"
