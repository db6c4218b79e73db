#!/usr/bin/env bash
# Train on the GPUs of one host; start again after exit codes 75 and 143 (resume.sh).
#
#   scripts/launch/gpu_host.sh CONFIG [key=value ...]
#   PROCESSES=8 scripts/launch/gpu_host.sh CONFIG [key=value ...]
#
# Assumes: ogpsa-jax is on PATH, with a JAX for these GPUs (pip install 'jax[cuda13]').
# PROCESSES (1): one process for all GPUs, or one process for each of so many GPUs.
# PORT (8476): free on this host; processes find each other there.
# XLA_PYTHON_CLIENT_MEM_FRACTION (0.9): the share of each GPU's memory that JAX takes at the start.
set -u
here=$(cd "$(dirname "$0")" && pwd)
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
processes=${PROCESSES:-1}

if [ "$processes" -eq 1 ]; then
  exec "$here/resume.sh" ogpsa-jax train "$@"
fi

pids=()
stopped=
trap 'stopped=1; kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for ((index = 0; index < processes; index++)); do
  JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-8476}" \
    JAX_NUM_PROCESSES="$processes" \
    JAX_PROCESS_ID="$index" \
    JAX_LOCAL_DEVICE_IDS="$index" \
    "$here/resume.sh" ogpsa-jax train "$@" &
  pids+=("$!")
done
# A signal that came before this line may have missed some of them.
[ -z "$stopped" ] || kill -TERM "${pids[@]}" 2>/dev/null

code=0
for pid in "${pids[@]}"; do
  wait "$pid"
  ended=$?
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid"
    ended=$?
  done
  [ "$ended" -eq 0 ] || code=$ended
done
exit "$code"
