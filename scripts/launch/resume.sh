#!/usr/bin/env bash
# Run a command again as long as its exit code says that the same command can go on:
# 75, another process of the run was lost; 143, SIGTERM was received and a checkpoint written.
#
#   scripts/launch/resume.sh ogpsa-jax train CONFIG [key=value ...]
#
# Assumes that the machine stays. A SIGTERM to this script is passed on, and then it ends too.
# RESTARTS (100): how often, at most.
set -u

stopped=
pid=
trap 'stopped=1; [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null' TERM

code=0
for ((restart = 0; restart <= ${RESTARTS:-100}; restart++)); do
  if [ -n "$stopped" ]; then # while it paused
    break
  fi
  "$@" &
  pid=$!
  # A signal that came before this line found no process to be passed on to.
  [ -z "$stopped" ] || kill -TERM "$pid" 2>/dev/null
  wait "$pid"
  code=$?
  # A signal ends the first wait early; the command is still writing its checkpoint.
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid"
    code=$?
  done
  if [ -n "$stopped" ] || { [ "$code" -ne 75 ] && [ "$code" -ne 143 ]; }; then
    break
  fi
  echo "resume.sh: exit code $code; starting again" >&2
  sleep "${PAUSE:-10}"
done
exit "$code"
