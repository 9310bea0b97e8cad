#!/usr/bin/env bash
# Training on TPU VMs by queued resources: requests a slice, sets it up, trains on all hosts, restarts after preemption.
#
#   PROJECT=p ZONE=us-west4-a BUCKET=b launch/cluster/tpu_vm.sh configs/minicpm_2b_duplex.py v5e-16 bucket/minicpm \
#       --config.data.train=bucket/data/duplex
#
# BUCKET is mounted as ~/bucket on every host and holds data and working folder.
set -euo pipefail
CONFIG=${1:?config file} MESH=${2:?mesh} WORKDIR=${3:?working folder}
shift 3
: "${PROJECT:?Google Cloud project}" "${ZONE:?zone with that accelerator}" "${BUCKET:?bucket with the data}"
NAME=${NAME:-duplex-jax-$MESH}
PAUSE=${PAUSE:-30}         # seconds between polls and attempts
MAX_TRIES=${MAX_TRIES:-5}  # consecutive failures of setup or training after which the slice is released
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
case $MESH in
  v5e-*x*) echo "tpu_vm.sh: mesh $MESH has several slices; launch/cluster/jobset.yaml starts those" >&2; exit 2 ;;
  v4-*) TYPE=$MESH RUNTIME=tpu-ubuntu2204-base ;;
  v5e-*) TYPE=v5litepod-${MESH#v5e-} ;;
  v5p-*) TYPE=$MESH RUNTIME=v2-alpha-tpuv5 ;;
  v6e-*) TYPE=$MESH RUNTIME=v2-alpha-tpuv6e ;;
  *) echo "tpu_vm.sh: mesh $MESH is of no TPU" >&2; exit 2 ;;
esac
SPOT=${SPOT:---spot}  # SPOT= requests capacity without preemption

state() {
  gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || true
}

give_back() {
  gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
}

# Counts a failure; releases the slice after too many in a row.
failed() {
  tries=$((tries + 1))
  echo "tpu_vm.sh: $1 failed ($tries of $MAX_TRIES)" >&2
  if [ "$tries" -ge "$MAX_TRIES" ]; then give_back; exit 1; fi
  sleep "$PAUSE"
}

set_up() {
  gcloud compute tpus tpu-vm scp --recurse configs dist "$NAME":~/ --project="$PROJECT" --zone="$ZONE" --worker=all &&
    # The images have Python 3.10; uv installs a newer one.
    everywhere "{ test -x ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh; } &&
      ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/duplex &&
      ~/.local/bin/uv pip install --quiet --python ~/duplex/bin/python \"\$(ls ~/dist/duplex_jax-*.whl)[tpu]\" &&
      mkdir -p ~/bucket && { mountpoint -q ~/bucket || gcsfuse --implicit-dirs $BUCKET ~/bucket; }"
}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1"
}

printf -v EXTRA '%q ' "$@"
tries=0
rm -rf dist && python3 -m pip wheel --quiet --no-deps --wheel-dir dist .  # this checkout, to be installed on the hosts
while true; do
  case $(state) in
    ACTIVE) ;;
    SUSPENDED | FAILED)
      give_back
      continue ;;
    "")
      # shellcheck disable=SC2086
      gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --project="$PROJECT" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" $SPOT
      continue ;;
    *) sleep "$PAUSE"; continue ;;
  esac
  set_up || { failed "setting up the hosts"; continue; }
  code=0
  # Asynchronous collectives overlap FSDP's gathers with the previous layer; splash attention needs the scoped memory
  # for its blocks.
  everywhere "LIBTPU_INIT_ARGS='--xla_tpu_enable_async_collective_fusion=true \
      --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_tpu_overlap_compute_collective_tc=true \
      --xla_enable_async_all_gather=true --xla_tpu_scoped_vmem_limit_kib=65536' \
    JAX_COMPILATION_CACHE_DIR=$WORKDIR/compiled \
    ~/duplex/bin/duplex-jax train --config=$CONFIG --mesh=$MESH --workdir=$WORKDIR $EXTRA" || code=$?
  case $code in
    0 | 2 | 3) exit "$code" ;;
    75) tries=0; sleep "$PAUSE" ;;  # told to stop, and saved: continue
    *)  # a preemption, a lost connection or a crash: continue from the last checkpoint
      if [ "$(state)" = ACTIVE ]; then failed "the run (exit code $code)"; else tries=0; fi ;;
  esac
done
