#!/usr/bin/env bash
# Runs main.py with the given arguments on every host of a TPU slice, or of several slices.
#
#   TPU=NAME ZONE=us-east5-a experiments/launch/tpu.sh --config=... --workdir=/mnt/shared/run
#
# TPU               a TPU VM (one slice); or
# QUEUED_RESOURCE   a queued resource (one slice or several)
# ZONE              its zone
# FOLDER            of this repository on the hosts, with its .venv; default: umv2
set -euo pipefail

: "${ZONE:?the zone of the TPU}"
command="cd $(printf %q "${FOLDER:-umv2}") && exec .venv/bin/python main.py$(printf ' %q' "$@")"

if [[ -n ${QUEUED_RESOURCE:-} ]]; then
  # All at once: by default gcloud waits for the first 64 hosts, and they for the others.
  exec gcloud compute tpus queued-resources ssh "$QUEUED_RESOURCE" --zone="$ZONE" \
    --node=all --worker=all --batch-size=all --command="$command"
fi
exec gcloud compute tpus tpu-vm ssh "${TPU:?or QUEUED_RESOURCE: where to run}" --zone="$ZONE" \
  --worker=all --command="$command"
