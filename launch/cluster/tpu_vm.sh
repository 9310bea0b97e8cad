#!/usr/bin/env bash
# TPU VMs by queued resources: asks for a slice, sets it up, trains on every host, starts again after a preemption.
#
#   PROJECT=p ZONE=us-west4-a BUCKET=b launch/cluster/tpu_vm.sh configs/minicpm_2b_duplex.py v5e-16 bucket/minicpm \
#       --config.data.train=bucket/data/duplex
#
# BUCKET is mounted as ~/bucket on every host; data and working folder lie there.
set -euo pipefail
CONFIG=${1:?config file} MESH=${2:?mesh} WORKDIR=${3:?working folder}
shift 3
: "${PROJECT:?Google Cloud project}" "${ZONE:?zone with that accelerator}" "${BUCKET:?bucket with the data}"
NAME=${NAME:-duplex-jax-$MESH}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
case $MESH in
  v4-*) TYPE=$MESH RUNTIME=tpu-ubuntu2204-base ;;
  v5e-*) TYPE=v5litepod-${MESH#v5e-} ;;
  v5p-*) TYPE=$MESH RUNTIME=v2-alpha-tpuv5 ;;
  v6e-*) TYPE=$MESH RUNTIME=v2-alpha-tpuv6e ;;
  *) echo "tpu_vm.sh: mesh $MESH is of no TPU" >&2; exit 2 ;;
esac
SPOT=${SPOT:---spot}  # SPOT= asks for capacity that is not taken away

state() {
  gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || true
}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1"
}

printf -v EXTRA '%q ' "$@"
while true; do
  case $(state) in
    ACTIVE) ;;
    SUSPENDED | FAILED)
      gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
      continue ;;
    "")
      # shellcheck disable=SC2086
      gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --project="$PROJECT" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" $SPOT
      continue ;;
    *) sleep 30; continue ;;
  esac
  everywhere "python3 -m venv ~/duplex && ~/duplex/bin/pip install -q 'duplex-jax[tpu]'" || { sleep 30; continue; }
  everywhere "mkdir -p ~/bucket && { mountpoint -q ~/bucket || gcsfuse --implicit-dirs $BUCKET ~/bucket; }"
  gcloud compute tpus tpu-vm scp --recurse configs "$NAME":~/ --project="$PROJECT" --zone="$ZONE" --worker=all
  code=0
  # Asynchronous collectives overlap FSDP's gathers with the layer before; the scoped memory is what splash attention
  # wants for its blocks.
  everywhere "LIBTPU_INIT_ARGS='--xla_tpu_enable_async_collective_fusion=true \
      --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_tpu_overlap_compute_collective_tc=true \
      --xla_enable_async_all_gather=true --xla_tpu_scoped_vmem_limit_kib=65536' \
    JAX_COMPILATION_CACHE_DIR=$WORKDIR/compiled \
    ~/duplex/bin/duplex-jax train --config=$CONFIG --mesh=$MESH --workdir=$WORKDIR $EXTRA" || code=$?
  case $code in
    0 | 2 | 3) exit "$code" ;;
    *) sleep 30 ;;  # 75, a preemption, or a lost connection: go on from the last checkpoint
  esac
done
