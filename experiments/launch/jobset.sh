#!/usr/bin/env bash
# Prints the JobSet that runs main.py with the given arguments on TPUs or GPUs:
#
#   IMAGE=... VOLUME=... HOSTS=4 experiments/launch/jobset.sh gpu --config=... --workdir=/data/run \
#     | kubectl apply -f -
#
# IMAGE     with this repository as its working folder and Python's packages installed
# VOLUME    a PersistentVolumeClaim that all hosts may write (ReadWriteMany), mounted at /data
# HOSTS     for gpu: all; for tpu: of each slice (chips of the topology / CHIPS)
# NAME      of the job; default: umv2
# RESTARTS  after which a job that fails again is given up; default: 20
# GPUS      for gpu: in each host; default: 8
# SLICES    for tpu: default: 1
# TPU       for tpu: cloud.google.com/gke-tpu-accelerator of the nodes, such as tpu-v6e-slice
# TOPOLOGY  for tpu: cloud.google.com/gke-tpu-topology of the nodes, such as 4x4
# CHIPS     for tpu: in each host; default: 4
set -euo pipefail

kind=${1:?tpu or gpu}
shift
export IMAGE=${IMAGE:?} VOLUME=${VOLUME:?} HOSTS=${HOSTS:?}
export NAME=${NAME:-umv2} RESTARTS=${RESTARTS:-20}
case $kind in
  gpu) export GPUS=${GPUS:-8} ;;
  tpu) export TPU=${TPU:?} TOPOLOGY=${TOPOLOGY:?} SLICES=${SLICES:-1} CHIPS=${CHIPS:-4} ;;
  *) echo "$kind: must be tpu or gpu" >&2; exit 2 ;;
esac
arguments=$(printf ' %q' "$@")
export ARGUMENTS=${arguments# }
# Only these: $JOB_COMPLETION_INDEX is for the shell in the container.
names='$ARGUMENTS $CHIPS $GPUS $HOSTS $IMAGE $NAME $RESTARTS $SLICES $TOPOLOGY $TPU $VOLUME'
exec envsubst "$names" < "$(dirname "$0")/jobset_$kind.yaml"
