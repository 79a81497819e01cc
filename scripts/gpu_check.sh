#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can show, in under 9 minutes and without a network:
# build, the operators' battery on the device, compute-sanitizer, determinism, CUDA graphs, streams, memory, speeds,
# whole training steps, k-NN by each of its searches, contrastive losses by wgmma.
#   scripts/gpu_check.sh [--rehearse] [--only OP] OUT
# writes OUT/gpu_check.json, OUT/table.txt and OUT/log.txt. A stage that fails or runs out of time loses nothing else:
# what each has found so far is in OUT too.
# --rehearse runs the same on the CPU, tiny, and says of the rest that it needs a GPU. PYTHON=... names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda only=() tests="tests/ops tests/train/test_capture.py" out=
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) device=cpu ;;
    --only) only=(--only "${2:?--only needs an operator}"); tests=tests/ops/test_$2.py; shift ;;
    -*) echo "usage: scripts/gpu_check.sh [--rehearse] [--only OP] OUT" >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
if [ -z "$out" ]; then echo "usage: scripts/gpu_check.sh [--rehearse] [--only OP] OUT" >&2; exit 2; fi
case $tests in */test_knn_graph.py) tests=tests/ops/test_knn.py ;; esac

python=${PYTHON:-python3}
if [ $device = cuda ] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu_check: torch sees no GPU here; --rehearse runs what can run without one" >&2
  exit 2
fi
mkdir -p "$out" build/gpu_check
rm -f "$out"/{stages.tsv,log.txt,table.txt,{gpu_check,environment,behaviour,speeds,step_dgcnn,step_crosspoint,paths}.json}
deadline=${GPU_CHECK_SECONDS:-520}

# stage NAME LIMIT COMMAND...: its output goes to the log; its fate, seconds and last line to stages.tsv
stage() {
  local name=$1 limit=$2 began=$SECONDS status left=$((deadline - SECONDS)) log=build/gpu_check/$1.log
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  : > "$log"
  if [ "$limit" -lt 5 ]; then
    status="no time left"
  else
    echo "== $name" >> "$out/log.txt"
    timeout --kill-after=5 "$limit" "$@" > "$log" 2>&1
    case $? in
      0) status=passed ;;
      77) status="needs a GPU" ;;
      124 | 137) status="timed out" ;;
      *) status=failed ;;
    esac
    cat "$log" >> "$out/log.txt"
  fi
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" $((SECONDS - began)) "$(tail -n 1 "$log" | tr '\t' ' ' | cut -c 1-300)" |
    tee -a "$out/stages.tsv"
}

# An interpreter that has this checkout as crosspoint, besides the packages of $PYTHON.
install() {
  if "$python" -c "
import pathlib, sys
import crosspoint, crosspoint.kernels
sys.exit(pathlib.Path(crosspoint.kernels.__file__).resolve().parents[1] != pathlib.Path.cwd())"; then
    return 0
  fi
  "$python" -m venv --without-pip "$venv" &&
    "$python" -c "
import glob, sysconfig
site = glob.glob('$venv/lib/python3*/site-packages')[0]
open(site + '/packages.pth', 'w').write('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" &&
    CROSSPOINT_BUILD=0 "$python" -m pip --python "$venv/bin/python" --disable-pip-version-check install --quiet --no-index \
      --no-deps --no-build-isolation --editable .
}

build() {
  if [ $device = cpu ]; then
    "$python" -c "from crosspoint.ops import _library; print(_library.load_error or _library.build_info())"
    echo "csrc/cuda is built where torch has CUDA: needs a GPU"
    return 77
  fi
  local capability
  capability=$("$python" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())")
  CROSSPOINT_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} "$python" setup.py build_ext --inplace
}

# One file of the battery; what has no test for the device is no failure.
battery_of() {
  local log=build/gpu_check/battery-$(basename "$1" .py).txt code
  "$python" -m pytest -q -p no:cacheprovider "$@" > "$log" 2>&1
  code=$?
  echo "$1: $(tail -n 1 "$log")"
  [ $code = 5 ] && return 0
  [ $code = 0 ] || cat "$log"
  return $code
}

# Several files at a time: most of a test is the host's work, or Triton's compiler's.
battery() {
  local log=build/gpu_check/battery.txt code
  if [ $device = cpu ]; then
    battery_of tests/ops/test_knn.py -k "TestKnnGraph and matches_reference and float32" > "$log"
  else
    find $tests -name 'test_*.py' | sort | xargs -P 6 -I{} bash -c 'battery_of "$1" -k cuda' _ {} > "$log"
  fi
  code=$?
  cat "$log"
  grep -c ' passed' "$log" | sed 's/$/ files passed tests/'
  [ $code = 0 ] && grep -q ' passed' "$log"  # skipping everything is no pass
}

# Whole training steps, fused and plain: DGCNN's, and CrossPoint's at its authors' batch.
steps() {
  local failed=0 model sizes
  for model in dgcnn crosspoint; do
    sizes=(--batch 32 --points 1024 --k 20 --steps 10)
    [ $model = crosspoint ] && sizes=(--batch 20 --points 2048 --k 20 --steps 5)
    [ $device = cpu ] && sizes=(--batch 2 --points 64 --k 4 --steps 1 --depth 18 --image-size 32)
    "$python" -m benchmarks.train_step --device $device --model $model "${sizes[@]}" --out "$1/step_$model.json" || failed=1
  done
  return $failed
}

# The contrastive losses' tests again, by Hopper's own instructions where they apply.
wgmma() {
  if [ $device = cpu ] || ! "$python" -c "import sys, torch; sys.exit(torch.cuda.get_device_capability() != (9, 0))"; then
    echo "sm_90a code: needs a GPU of compute capability 9.0"
    return 77
  fi
  CROSSPOINT_WGMMA=1 "$python" -m pytest -q -p no:cacheprovider tests/ops/test_nt_xent.py tests/ops/test_sup_con.py \
    tests/ops/test_contrast_*.py -k native-cuda
}

# All four tools on the same small calls, side by side; initcheck on every kernel, since it must see who wrote what ours
# read.
sanitizers() {
  local run=("$python" -m benchmarks.gpu_check small --device $device "${only[@]}") failed=0 tool
  if [ $device = cpu ]; then
    "${run[@]}" --out build/gpu_check/small.json && return 77
    return 1
  fi
  command -v compute-sanitizer || export PATH=$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer
  declare -A jobs
  for tool in memcheck racecheck synccheck initcheck; do
    local filter=(--kernel-name kns=crosspoint)
    [ $tool = initcheck ] && filter=()
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 "${filter[@]}" \
      "${run[@]}" --out build/gpu_check/small-$tool.json > build/gpu_check/$tool.txt 2>&1 &
    jobs[$tool]=$!
  done
  for tool in "${!jobs[@]}"; do
    wait "${jobs[$tool]}" || { echo "== $tool failed: $?"; failed=1; }
    sed "s/^/$tool: /" build/gpu_check/$tool.txt
  done
  return $failed
}

export -f install build steps battery battery_of wgmma sanitizers
venv=$PWD/build/gpu_check/venv
export python device tests venv
check() { stage "$1" "$2" "$python" -m benchmarks.gpu_check "$1" --device $device --out "$out/$1.json" "${@:3}"; }

stage install 30 bash -c install
[ -x "$venv/bin/python" ] && python=$venv/bin/python
stage build 240 bash -c build
check environment 60
check behaviour 90 "${only[@]}"
check speeds 120 --seconds 90 "${only[@]}"
stage steps 90 bash -c 'steps "$1"' _ "$out"
check paths 90
stage battery 170 bash -c battery &
stage wgmma 170 bash -c wgmma &
stage sanitizers 170 bash -c "only=(${only[*]}); sanitizers"
wait
"$python" -m benchmarks.gpu_check summary --out "$out" || exit 1
! cut -f 2 "$out/stages.tsv" | grep -qv -e '^passed$' -e '^needs a GPU$'
