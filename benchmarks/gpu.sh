#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build the kernels, test, measure ops, step and drawing, sanitise.
#
#   bash benchmarks/gpu.sh              from the root of the project, with the Python that shall be used on PATH
#   QUICK=1 bash benchmarks/gpu.sh      without torch.compile and with short rounds: some minutes, but for sanitisers
#   OUT=folder bash benchmarks/gpu.sh   results and logs go there, too, after each step: one may be cut off
#
# Goes on after a failure and says at the end what failed; results are in benchmarks/results/*_cuda.{json,md},
# logs in runs/gpu/. PYTHON names another interpreter, SANITIZE the most that each sanitiser may take (20m). Seen on an
# H200, one by one: build half a minute, CUDA tests 76 s of test time, the step as QUICK has it 56 s, the ops 25 s; a
# sanitiser had not finished after 50 s.
set -u
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-$(command -v python || command -v python3)}
LOGS=runs/gpu
mkdir -p "$LOGS"
failed=()

step() {  # step NAME COMMAND...: run it, keep its output, note whether it failed
  local name=$1
  shift
  echo "== $name: $*"
  if "$@" >"$LOGS/$name.log" 2>&1; then tail -n 3 "$LOGS/$name.log"; else
    failed+=("$name")
    tail -n 20 "$LOGS/$name.log"
  fi
  [ -z "${OUT:-}" ] || { mkdir -p "$OUT" && cp -r benchmarks/results/*_cuda.* "$LOGS" "$OUT"; }
}

nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv || exit 1
OPS="import dcgan; ops = dcgan.fused_ops(); ops.load('cuda'); print(*ops.status(), sep='\n')"
step kernels "$PYTHON" -c "$OPS"
step tests "$PYTHON" -m pytest tests -m gpu -p no:cacheprovider

if [ -n "${QUICK:-}" ]; then
  step step "$PYTHON" benchmarks/step.py --device cuda --no-compile --only all --seconds 0.2
  step ops "$PYTHON" benchmarks/ops.py --device cuda --no-compile --seconds 0.06
  step drawing "$PYTHON" benchmarks/generate.py --device cuda --rounds 3 --seconds 0.2
else
  step benchmarks bash benchmarks/all.sh cuda
fi

# The caching allocator hides overruns; a sanitizer that does not start on this device is no failure of ours.
SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
if [ -z "$SANITIZER" ] || ! "$SANITIZER" "$PYTHON" -c "import torch; torch.ones(1).cuda()" >"$LOGS/probe.log" 2>&1; then
  echo "== no compute-sanitizer that runs here (${SANITIZER:-not found}): left out"
else
  SELECT="(cuda) and (training or eval or groups or strides or values or many_layers) and not fuzz and not compile"
  for tool in memcheck racecheck synccheck initcheck; do
    step "$tool" timeout "${SANITIZE:-20m}" "$SANITIZER" --tool "$tool" --error-exitcode 99 --launch-timeout 0 \
      "$PYTHON" -m pytest tests/test_ops.py -q -x -k "$SELECT" -p no:cacheprovider
  done
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]} (logs in $LOGS)"
  exit 1
fi
echo "all passed; commit benchmarks/results/*_cuda.*"
