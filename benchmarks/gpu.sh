#!/usr/bin/env bash
# What only a machine with a GPU can tell: its tests, and what a save costs there beside the peers.
#
#   benchmarks/gpu.sh FOLDER [arguments of benchmarks.stall, e.g. --rounds 3 --peers trainbus dcp]
#
# FOLDER gets the output of the tests, and for each model the table, the numbers (after each round)
# and the picture. Peers that are not installed have a line that says so. Everything is tried, also
# after a failure; the exit status is that of the first one.
set -uo pipefail

if [ $# -lt 1 ]; then
    sed -n 's/^#   //p' "$0" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
scratch=${SCRATCH:-$out}  # where the checkpoints are written: 4 GiB, and 48 GiB for the larger model
failed=0

note() {
    local status=$?
    if [ $status -ne 0 ]; then
        echo "gpu.sh: $1 ended with exit status $status" >&2
        [ $failed -ne 0 ] || failed=$status
    fi
}

measure() {
    local name=$1
    shift
    "$python" -m benchmarks.stall --workload "$name" --folder "$scratch" \
        --json "$out/$name.json" --plot "$out/$name.png" "$@" >"$out/$name.txt"
    note "benchmarks.stall, $name"
    cat "$out/$name.txt"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv >"$out/device.txt" 2>&1 || true
"$python" -m pytest -m gpu -q 2>&1 | tee "$out/pytest.txt"
note pytest
measure gpu "$@"
if [ "${LARGE:-1}" = 1 ]; then  # LARGE=0: leave out the 1.3 billion parameters
    measure gpu-1.3b --no-limits --peers trainbus torch-save-fsync dcp-staged dcp-process --rounds 1 "$@"
fi
exit $failed
