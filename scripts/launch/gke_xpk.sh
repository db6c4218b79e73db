#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster made by xpk; restart all when a pod is lost or preempted.
#
#   NAME=ogpsa CLUSTER=mine TPU=v5p-64 SLICES=2 IMAGE=REGION-docker.pkg.dev/PROJECT/... \
#     scripts/launch/gke_xpk.sh /share/run.yaml output_dir=/share/runs/ogpsa
#
# Assumes: xpk is installed and gcloud has a project and a zone; IMAGE contains ogpsa_jax[train] and
# jax[tpu]; a file system that all pods share (Filestore) is attached to the cluster and mounted at
# /share (xpk storage create, with --type=gcpfilestore --auto-mount=true --mount-point=/share).
# xpk itself restarts a workload after exit codes 42 and 127 to 255, which 143 is one of.
set -eu
: "${NAME:?}" "${CLUSTER:?}" "${TPU:?}" "${IMAGE:?}"
exec xpk workload create \
  --workload="$NAME" \
  --cluster="$CLUSTER" \
  --tpu-type="$TPU" \
  --num-slices="${SLICES:-1}" \
  --docker-image="$IMAGE" \
  --max-restarts="${RESTARTS:-20}" \
  --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=300 \
  --command="$(printf '%q ' ogpsa-jax train "$@")"
