#!/usr/bin/env bash
# Everything there is to measure on one GPU, in under eight minutes, without a network:
#   bash tools/benchmarks/gpu.sh [FOLDER]
#   bash tools/benchmarks/gpu.sh --device cpu --toy [FOLDER]    the same script and the same code of the model on a CPU, at a size that tells nothing; kernels
#                                                               are compiled for a Hopper chip instead
# Writes FOLDER (runs/gpu): kernels.json, model.json, calibration.json, and report.md with every table. All are written as figures come.
# Needs torch and Triton. The tests need pytest, hypothesis and megatron-core too, the model megatron-core; pytest-xdist, Transformer Engine and diffusers
# add what they make possible. This package need not be installed. For a machine without megatron-core carry, of the release in constraints.txt, the folders
# `megatron` and `megatron_core-*.dist-info` (one test runs on the CPU, where its version is asked for) and put them on PYTHONPATH by an absolute path; it is
# plain Python.
set -uo pipefail
shopt -s extglob
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
DEVICE=cuda TOY=()
while [[ ${1:-} == --* ]]; do
  case $1 in
    --device) DEVICE=${2:-}; shift 2 ;;
    --toy) TOY=(--toy); shift ;;
    *) echo "gpu.sh: $1 is unknown; use --device cuda|cpu, --toy"; exit 2 ;;
  esac
done
if [[ $DEVICE != cuda && $DEVICE != cpu ]]; then echo "gpu.sh: --device '$DEVICE': use cuda or cpu"; exit 2; fi
if [[ $DEVICE == cpu && ${#TOY[@]} == 0 ]]; then echo "gpu.sh: --device cpu takes hours without --toy; add it"; exit 2; fi
OUT=${1:-runs/gpu}
# What this Python has, looked up once: importing torch takes seconds.
HAVE=" $("$PYTHON" -c '
from importlib.util import find_spec
import torch
def there(name):
    try:
        return find_spec(name)
    except ImportError:
        return None
print("cuda" if torch.cuda.is_available() else "", *filter(there, ("megatron_apt.kernels.bench", "megatron.core", "pytest", "hypothesis", "xdist")))
' 2>/dev/null) "
has() { [[ $HAVE == *" $1 "* ]]; }

if [[ $DEVICE == cuda ]] && ! has cuda; then
  echo "No CUDA GPU (or no torch) for $PYTHON: nothing is measured."
  exit 0
fi
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
REVISION=$(git rev-parse --short HEAD 2>/dev/null || echo 'an unknown commit')
if ! has megatron_apt.kernels.bench; then
  # Not installed: kernels/ is a part of the package by setup.py only, so lay the tree out as an installation would, and work there: Python looks for
  # packages in the current folder first.
  TREE=$SCRATCH/tree
  mkdir "$TREE"
  cp -r megatron_apt tests tools pyproject.toml "$TREE"
  cp -r kernels "$TREE/megatron_apt/kernels"
  cd "$TREE"
  export PYTHONPATH="$TREE${PYTHONPATH:+:$PYTHONPATH}"
fi
# A lone process still opens its groups, which look for a network.
unset TRITON_INTERPRET
export NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo PYTHONUNBUFFERED=1
run() { # run SECONDS TITLE COMMAND...
  local limit=$1 title=$2 rc=0
  shift 2
  printf '\n## %s\n\n' "$title"
  # Interrupted, and once (--foreground), so that it says how far it came; killed if it does not listen. Warnings would break up its table.
  timeout --foreground -s INT -k 20 "$limit" "$@" 2>"$SCRATCH/stderr" || rc=$?
  if [ -s "$SCRATCH/stderr" ]; then printf '\n'; tail -n 60 "$SCRATCH/stderr" | sed 's/^/    /'; fi
  if ((rc)); then printf '\nexit code %s: %s\n' "$rc" "$*"; fi
}
tests() { run "$1" "$2" "$PYTHON" -m pytest -q -p no:cacheprovider "${@:3}"; }

{
  echo "# GPU figures of $REVISION"
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader 2>/dev/null
  if [[ $DEVICE == cpu ]]; then
    printf '\nOn a CPU, at toy size: no figure here means anything.\n'
  elif has pytest && has hypothesis && has megatron.core; then
    # Compiling for a GPU that need not be there is tested without one. These compile some 400 kernels for this one: in several processes, if they can.
    tests 85 "Kernels against references" $(has xdist && echo "-n 12") tests/kernels/test_kernels_!(compile).py
    tests 70 "APT on the GPU" tests/parity/test_gpu.py
  else
    printf '\nTests on the GPU not run: they need pytest, hypothesis and megatron-core.\n'
  fi
  KERNELS=(--seconds 70)
  if [[ $DEVICE == cpu ]]; then KERNELS=(--compile-only); fi
  run 100 "Kernels" "$PYTHON" -m megatron_apt.kernels.bench "${KERNELS[@]}" --json "$OUT/kernels.json"
  if has megatron.core; then
    run 135 "8B model" "$PYTHON" tools/benchmarks/gpu_model.py --device "$DEVICE" "${TOY[@]}" --seconds 85 --json "$OUT/model.json" --calibration "$OUT/calibration.json"
  else
    printf '\n8B model not measured: it needs megatron-core.\n'
  fi
} | tee "$OUT/report.md"
# The pipe's left side runs in a subshell, so its verdict is read back.
! grep -q '^exit code' "$OUT/report.md"
