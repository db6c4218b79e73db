#!/usr/bin/env bash
# Train on Cloud TPU VMs, one slice or several, requested as a queued resource of spot VMs. When
# they are preempted, request them again and resume.
#
#   NAME=ogpsa ZONE=us-east5-a ACCELERATOR=v5p-64 RUNTIME=v2-alpha-tpuv5 SLICES=1 \
#     SHARE=10.0.0.2:/share scripts/launch/tpu_queued_resource.sh CONFIG [key=value ...]
#
# Assumes: gcloud is logged in and has a project with quota for spot TPUs in ZONE; SHARE is an NFS
# share (Filestore) in the same network. On it, at /share on each worker: a checkout of this
# repository in /share/ogpsa_jax, a model, data and output_dir. CONFIG is a path inside the
# checkout, output_dir a path below /share. JAX finds the workers and slices by itself.
set -eu
: "${NAME:?}" "${ZONE:?}" "${ACCELERATOR:?}" "${RUNTIME:?}" "${SHARE:?}"
slices=${SLICES:-1}
command=$(printf '%q ' ogpsa-jax train "$@")

if [ "$slices" -eq 1 ]; then
  nodes=(--node-id="$NAME")
else
  nodes=(--node-count="$slices" --node-prefix="$NAME")
fi

state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || true
}

on_all_workers() {
  gcloud compute tpus queued-resources ssh "$NAME" --zone="$ZONE" --node=all --worker=all \
    --command="$1"
}

for ((restart = 0; restart <= ${RESTARTS:-20}; restart++)); do
  if [ -z "$(state)" ]; then
    gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" "${nodes[@]}" \
      --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --spot
  fi
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in FAILED | SUSPENDED) break ;; esac
    sleep 60
  done
  # resume.sh starts a worker again whose peers were lost.
  if [ "$(state)" = ACTIVE ] && on_all_workers "set -e
      command -v mount.nfs >/dev/null || { sudo apt-get update; sudo apt-get install -y nfs-common; }
      sudo mkdir -p /share
      mountpoint -q /share || sudo mount -t nfs '$SHARE' /share
      python3 -m venv ~/venv
      . ~/venv/bin/activate
      cd /share/ogpsa_jax
      pip install -q '.[train]' 'jax[tpu]'
      scripts/launch/resume.sh $command"; then
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
    exit 0
  fi
  if [ "$(state)" = ACTIVE ]; then
    echo "the run failed while its TPUs are there; delete them after a look: $NAME" >&2
    exit 1
  fi
  gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet || true
done
echo "preempted too often" >&2
exit 75
