#!/usr/bin/env bash
# All that a GPU can say of the CUDA kernels: whether they are right, how fast they are, where the time goes, and races.
#
#   pip install '.[dev,cuda]' nvidia-cuda-sanitizer-api
#   OUT=FOLDER bash benchmarks/gpu_all.sh [oracle] [bench] [steps] [san]     # all four without a word
#
# oracle  the kernels' tests on the card, each program launched, captured and replayed    some 4 minutes
# bench   every version against the CPU, then speed of each size of model                 some 7 minutes
# steps   the time of each launch in a layer, 7.2B and 1.5B                               some 4 minutes
# san     memcheck, racecheck, synccheck and initcheck                                    some 8 minutes
#
# Results are files in $OUT, or in the folder where it is started. A part that fails does not stop the next one.
set -uo pipefail
PYTHON=${PYTHON:-python3} OUT=${OUT:-$PWD}
cd "$(dirname "$0")/.."
export NUMBA_ENABLE_CUDASIM=0 PYTHONUNBUFFERED=1
failed=()

part() {  # part NAME COMMAND …: what the command says goes into NAME.log, too
  echo "== $1"
  "${@:2}" 2>&1 | tee "$OUT/$1.log" || failed+=("$1")
}

oracle() { part oracle "$PYTHON" -m pytest tests/kernels -k cuda -q -p no:cacheprovider; }

bench() { part bench "$PYTHON" benchmarks/gpu.py --json "$OUT/report.json"; }

steps() {
  part steps-7.2B "$PYTHON" benchmarks/gpu_steps.py 32 4096 128,128,96,480 1 252 -- -64
  part steps-1.5B "$PYTHON" benchmarks/gpu_steps.py 24 2048 96,96,64,256 1 252
}

san() {
  local sanitizer tool
  sanitizer=$(command -v compute-sanitizer || "$PYTHON" -c 'import glob, sysconfig
print(*glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/compute-sanitizer/compute-sanitizer"))')
  if [ -z "$sanitizer" ]; then
    echo "compute-sanitizer is not there: pip install nvidia-cuda-sanitizer-api"
    failed+=(san)
    return
  fi
  [ -x "$sanitizer" ] || chmod +x "$(dirname "$sanitizer")"/*
  part san-compiled "$PYTHON" benchmarks/gpu_sanitize.py  # the tools should not watch compilers
  for tool in memcheck racecheck synccheck initcheck; do
    part "san-$tool" "$sanitizer" --tool "$tool" --print-limit 20 --error-exitcode 1 \
      "$PYTHON" benchmarks/gpu_sanitize.py 7 6
  done
}

"$PYTHON" -m pip list 2>/dev/null | grep -i 'numba\|cuda\|nvidia\|numpy' >"$OUT/versions.txt"
nvidia-smi -L 2>/dev/null | tee -a "$OUT/versions.txt"
for name in "${@:-oracle bench steps san}"; do
  for each in $name; do
    case $each in
      oracle | bench | steps | san) "$each" ;;
      *) echo "$each is none of oracle, bench, steps and san" && exit 2 ;;
    esac
  done
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}" && exit 1; }
