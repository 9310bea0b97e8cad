#!/usr/bin/env bash
# Training on one host with NVIDIA GPUs, restarted for as long as it asks to be.
#
#   launch/cluster/gpu_host.sh configs/minicpm_2b_duplex.py a100x8 out/minicpm --config.data.train=data/duplex
set -euo pipefail
CONFIG=${1:?config file} MESH=${2:?mesh} WORKDIR=${3:?working folder}
shift 3

# Collectives overlap with independent products: FSDP's gathers are hidden behind the previous layer.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
# Compiled programs are reused after a restart.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$WORKDIR/compiled}

tries=0
while true; do
  code=0
  duplex-jax train --config="$CONFIG" --mesh="$MESH" --workdir="$WORKDIR" "$@" || code=$?
  case $code in
    0) exit 0 ;;
    75) ;;                               # told to stop, and saved: continue
    2 | 3 | 130) exit "$code" ;;         # bad input, a bad loss, Ctrl-C: a restart would not help
    *) tries=$((tries + 1))              # a crash: continue from the last checkpoint, a few times
       if [ "$tries" -gt 5 ]; then exit "$code"; fi ;;
  esac
  sleep 10
done
