#!/bin/bash
# Run a plan as a job of a Ray cluster that is already there; it goes on when this shell ends.
#
#     RAY_API_SERVER_ADDRESS=http://head:8265 RUNS=/shared/runs deploy/ray/submit.sh quickstart --set chat_steps=1000
#
# The same command again, as another job, builds what is missing. `ray job logs ID` and `ray job stop ID` show and
# stop a job. docs/how-to/cluster.md explains the lines.
set -euo pipefail

export RAY_API_SERVER_ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}"
export RAY_USAGE_STATS_ENABLED=0 # Ray sends usage statistics otherwise
if [ $# -eq 0 ]; then
    echo "give the name of a plan, such as quickstart" >&2
    exit 2
fi

# RUNS, the inputs, the plan's file and the environment must have the same path on all machines of the cluster.
# The entry point itself only starts steps and waits, so it asks for no core.
exec ray job submit --no-wait --entrypoint-num-cpus 0 -- \
    "${VENV:-$PWD/.venv}/bin/koine" run "$@" --runs "${RUNS:-$PWD/runs}" --executor ray --address auto
