#!/usr/bin/env bash
# Everything there is to measure on one GPU, in under eight minutes, without a network:
#   bash tools/benchmarks/gpu.sh [FOLDER]
# Needs torch and Triton; pytest with hypothesis, megatron-core, Transformer Engine and diffusers add what they make possible.
# Writes FOLDER (runs/gpu): kernels.json, model.json, calibration.json, and report.md with every table.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OUT=${1:-runs/gpu}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "No CUDA GPU (or no torch) for $PYTHON: nothing is measured."
  exit 0
fi
mkdir -p "$OUT"
if ! "$PYTHON" -c 'import megatron_apt.kernels.bench' 2>/dev/null; then
  # Not installed: kernels/ is a part of the package by setup.py only, so lay the tree out as an installation would.
  TREE=$(mktemp -d)
  trap 'rm -rf "$TREE"' EXIT
  cp -r megatron_apt "$TREE"
  cp -r kernels "$TREE/megatron_apt/kernels"
  export PYTHONPATH="$TREE${PYTHONPATH:+:$PYTHONPATH}"
fi
has() { "$PYTHON" -c "import $1" 2>/dev/null; }
run() { # run SECONDS TITLE COMMAND...
  local limit=$1 title=$2 rc=0
  shift 2
  printf '\n## %s\n\n' "$title"
  timeout "$limit" "$@" 2>&1 || rc=$?
  if ((rc)); then echo "exit code $rc: $*"; fi
}

{
  echo "# GPU figures of $(git rev-parse --short HEAD 2>/dev/null || echo 'an unknown commit')"
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader 2>/dev/null
  if has pytest && has hypothesis && has megatron.core; then
    run 180 "Tests on the GPU" "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_kernels_*.py tests/test_gpu.py
  else
    printf '\nTests on the GPU not run: they need pytest, hypothesis and megatron-core.\n'
  fi
  run 120 "Kernels" "$PYTHON" -m megatron_apt.kernels.bench --json "$OUT/kernels.json"
  if has megatron.core; then
    run 170 "8B model" "$PYTHON" tools/benchmarks/gpu_model.py --json "$OUT/model.json" --calibration "$OUT/calibration.json"
  else
    printf '\n8B model not measured: it needs megatron-core.\n'
  fi
} | tee "$OUT/report.md"
# The pipe's left side runs in a subshell, so its verdict is read back.
! grep -q '^exit code' "$OUT/report.md"
