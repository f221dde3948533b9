#!/usr/bin/env bash
# Every benchmark of speed, in one go: the step, the data path, drawing, the fused ops, the chart.
#
#   bash benchmarks/all.sh                       on the CPU; about 40 minutes, with nothing else running
#   bash benchmarks/all.sh cuda                  on a GPU, without the data path, the CPU's (gpu.sh tests the ops first)
#   bash benchmarks/all.sh cpu --data FOLDER     the data path on a folder of pictures instead of drawn ones
#
# Goes on after a failure and says at the end what failed. PYTHON names another interpreter.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DEVICE=${1:-cpu}
failed=()
run() {
  echo "== $*"
  "$PYTHON" "$@" || failed+=("$1")
}
run benchmarks/step.py --device "$DEVICE"
run benchmarks/generate.py --device "$DEVICE"
run benchmarks/ops.py --device "$DEVICE"
[ "$DEVICE" = cuda ] || run benchmarks/data.py "${@:2}"
run benchmarks/chart.py "$DEVICE"
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all done; benchmarks/results/ holds the figures"
