#!/usr/bin/env bash
# What a GPU machine that can be had for a short while should do first, each stage at most ten minutes:
#
#   scripts/gpu_session.sh check OUT [DATASET]        does all of it run on a machine new to us?
#   scripts/gpu_session.sh suite OUT DATASET          benchmarks/gpu_suite.py
#   scripts/gpu_session.sh train OUT CIFAR [CIFAR_TEST]   ResNet-18 on CIFAR-10 until the time is over; goes on if asked again
#   scripts/gpu_session.sh data  OUT IMAGES.tar     a dataset of 20 x the images in a tar -> OUT/dataset
#   scripts/gpu_session.sh --needs                    packages beside torch and torchvision, one a line, as installed here
#
# The stages of check, which are machine, smoke, hardware, tests, launches and ranks, can be asked for by name, and so can
# parity (which the suite measures as well). DATASET is a folder of tools/make_shards.py; check draws synthetic images
# without one. TOY=1 before the command does the same on a CPU, at toy size. LIMITS=2 doubles the time limits, for a slow
# machine. PYTHON names the Python. Output goes to OUT as it comes, and after each step OUT.tar receives all results but
# images and weights, so a kill loses only what had not come.
# Exit code: 0 all went well, 1 something failed, 2 the command line is wrong.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
toy=${TOY:-}
failed=0

usage() { sed -n '2,16s/^# \{0,1\}//p' scripts/gpu_session.sh >&2; exit 2; }

needs() {
  "$python" - <<'PY'
import ast, importlib.metadata as metadata, re

def requirements(name, extras=()):
    for line in metadata.requires(name) or []:
        text, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
        if extra and extra[1] not in extras or re.search(r"python_version\s*<|platform_system\s*==\s*.Windows", marker):
            continue
        yield text

def closure(lines, found):
    for line in lines:
        name, _, extras = re.match(r"([\w.-]+)(\[([\w,-]+)\])?", line.strip()).groups()
        name = re.sub(r"[-_.]+", "-", name).lower()
        extras = tuple((extras or "").split(","))
        if (name, extras) in found:
            continue
        try:
            found[name, extras] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        closure(requirements(name, extras), found)
    return found

lists = {
    node.targets[0].id: [entry.value for entry in node.value.elts if isinstance(entry, ast.Constant)]
    for node in ast.parse(open("setup.py").read()).body
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
}
there = {name for name, _ in closure(["torch", "torchvision"], {})}
tests = [line for line in lists["TEST"] if re.match("pytest|hypothesis|beartype", line)]
for name, version in sorted({(n, v) for (n, _), v in closure(lists["RUNTIME"] + tests, {}).items() if n not in there}):
    print(f"{name}=={version}")
PY
}

# step NAME SECONDS COMMAND...: run under a time limit, everything said into OUT/NAME.log, its end and outcome told.
step() {
  local name=$1 limit=$(($2 * ${LIMITS:-1})) code start=$SECONDS
  shift 2
  echo "== $name: $*"
  timeout --preserve-status --kill-after=15 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  tail -n "${lines:-25}" "$out/$name.log"
  case $code in
    0) outcome=done ;;
    137 | 143) outcome="stopped after $limit s" ;;
    75) outcome="stopped by the time limit" ;;  # pretrain.py leaves a checkpoint, if it came to the first step
    *) outcome="FAILED with exit code $code" ;;
  esac
  [ "$code" -eq 0 ] || failed=1
  echo "== $name: $outcome, $((SECONDS - start)) of $limit s" | tee -a "$out/session.txt"
  pack
  return "$code"
}

# After each step, so that a kill from outside leaves a tar of what was done. A new one takes the place of the old whole.
pack() {
  tar cf "$out.tar.new" --exclude='*.pt' --exclude='*.safetensors' --exclude=images --exclude=dataset \
    --exclude=synthetic -C "$(dirname "$out")" "$(basename "$out")"
  [ $? -le 1 ] && mv "$out.tar.new" "$out.tar"  # 1: a file grew meanwhile
}

dataset() {  # the one that was given, or synthetic images
  if [ -z "$data" ]; then
    data=$out/synthetic
    [ -f "$data/dataset.json" ] || step synthetic 20 "$python" -c "
from pathlib import Path
from tools.common.fake_imagenet import draw_dataset
if __name__ == '__main__':
    draw_dataset(Path('$data'), $([ -n "$toy" ] && echo 64 || echo 512))" || exit 1
  fi
}

# Triton compiles the kernels' launchers when they are first called.
compiler() {
  local include
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  [ -n "$(command -v "${CC:-gcc}" || command -v clang)" ] && [ -f "$include/Python.h" ] && return
  echo "no C compiler or no $include/Python.h: nothing of Triton's can run here" | tee -a "$out/session.txt"
  failed=1
}

machine() {  # with smoke, 240 s for a cold start: numba and Triton compile here
  [ -n "$toy" ] || nvidia-smi || failed=1
  compiler
  dataset
  step machine 60 "$python" benchmarks/gpu_smoke.py "$data" --first ${toy:+--toy}
}

smoke() { compiler; dataset; step smoke 180 "$python" benchmarks/gpu_smoke.py "$data" ${toy:+--toy}; }

# Whether the hardware decoder runs at all, with colours interpolated and without: the rates, and its own use.
hardware() {
  local monitor=
  dataset
  if [ -z "$toy" ]; then
    nvidia-smi dmon -s u -d 1 >"$out/dmon.txt" 2>&1 &
    monitor=$!
  fi
  step hardware 45 "$python" benchmarks/gpu_suite.py "$data" --out "$out/hardware" --parts decode \
    --minutes 0.5 ${toy:+--toy}
  [ -z "$monitor" ] || kill "$monitor"
  [ -n "$toy" ] || awk '$2 == "gpu" { for (i = 1; i <= NF; i++) if ($i == "jpg") column = i - 1 }
    column && $1 != "#" && $column > most { most = $column }
    END { print "JPEG engine: " (column ? "at most " most + 0 " % busy" : "not reported") }' "$out/dmon.txt"
  report "$out/hardware/suite.md"
}

launches() {
  dataset
  step launches 55 "$python" benchmarks/gpu_suite.py "$data" --out "$out/launches" --parts launches \
    --minutes 0.75 ${toy:+--toy}
  report "$out/launches/suite.md"
}

report() { [ ! -f "$1" ] || cat "$1"; }

gpu_tests() {  # only the files that have some are collected: importing all tests takes a minute
  local files
  mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests)
  step tests 90 "$python" -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors \
    ${toy:+--collect-only} "${files[@]}"
}

parity() {
  dataset
  step parity 70 "$python" benchmarks/parity.py "$data" --markdown "$out/parity.md" \
    --samples "$([ -n "$toy" ] && echo 8 || echo 64)" --device "$device"
}

# Two processes that take each other for another machine, or NCCL would refuse to share a GPU.
two_ranks() {  # NAME SECONDS OPTIONS...
  local name=$1 limit=$2 rank
  shift 2
  export NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-29517} WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1
  RANK=1 NCCL_HOSTID=second timeout -k 15 $((limit * ${LIMITS:-1})) "$python" train/pretrain.py "$@" \
    --run-dir "$out/$name" >"$out/$name-second.log" 2>&1 &
  rank=$!
  RANK=0 NCCL_HOSTID=first step "$name" "$limit" "$python" train/pretrain.py "$@" --run-dir "$out/$name"
  wait "$rank" || { failed=1; tail -n 5 "$out/$name-second.log"; }
  unset MASTER_ADDR MASTER_PORT WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
}

# Two ranks, one for comparison, and two whose step is compiled: the losses are to be alike.
ranks() {
  dataset
  local compiling=70 options=(--data "$data" --global-batch 32 --max-steps 4 --log-every 1 --knn-every 0 --epochs 100 --device "$device")
  if [ -n "$toy" ]; then options+=(--backbone resnet_tiny --image-size 16 --threads 1) compiling=600  # C++, twice
  else options+=(--backbone resnet18 --image-size 96 --precision fp32); fi
  rm -rf "$out/one-rank" "$out/two-ranks" "$out/two-ranks-compiled"
  two_ranks two-ranks 40 "${options[@]}"
  step one-rank 30 "$python" train/pretrain.py "${options[@]}" --run-dir "$out/one-rank"
  two_ranks two-ranks-compiled "$compiling" "${options[@]}" --compile
  echo "the same steps by two ranks, by one, and by two whose step is compiled:"
  cut -c1-100 "$out/two-ranks/metrics.jsonl" "$out/one-rank/metrics.jsonl" "$out/two-ranks-compiled/metrics.jsonl"
}

suite() {
  [ -n "$data" ] || usage
  lines=150 step suite 575 "$python" benchmarks/gpu_suite.py "$data" --out "$out/suite" ${toy:+--toy}
  report "$out/suite/suite.md"
}

train() {
  [ -n "$data" ] || usage
  local options=(--data "$data" --run-dir "$out/cifar" --resume --device "$device" --checkpoint-every 2m)
  [ -z "$more" ] || options+=(--knn-data "$more")
  if [ -n "$toy" ]; then options+=(--backbone resnet_tiny --image-size 32 --max-steps 4 --global-batch 16 --epochs 9)
  else options+=(--recipe cifar10-800ep --epochs "${EPOCHS:-100}"); fi
  step train 540 "$python" train/pretrain.py "${options[@]}" || {
    [ $? -eq 75 ] && ls "$out"/cifar/checkpoints/step-*.pt >/dev/null && failed=0  # it goes on when asked again
  }
  grep knn_top1 "$out/cifar/metrics.jsonl" | tail -n 5
}

make_data() {  # links take no room, and shards only need many samples, not many images
  [ -n "$data" ] || usage
  local images=$out/images copy
  mkdir -p "$images/1" && tar xf "$data" -C "$images/1" || exit 1
  for copy in $(seq 2 "$([ -n "$toy" ] && echo 3 || echo 20)"); do cp -al "$images/1" "$images/$copy" || exit 1; done
  step data 300 "$python" tools/make_shards.py "$images" "$out/dataset" --labels none --verify header --overwrite
}

[ "${1:-}" != --needs ] || { needs; exit; }
[ $# -ge 2 ] && [ $# -le 4 ] || usage
stage=$1 out=$2 data=${3:-} more=${4:-}
device=cuda
[ -z "$toy" ] || device=cpu
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
case $stage in
  check) machine; smoke; hardware; gpu_tests; launches; ranks ;;  # what matters most first; ten minutes at most
  machine) machine ;;
  smoke) smoke ;;
  hardware) hardware ;;
  launches) launches ;;
  tests) gpu_tests ;;
  parity) parity ;;
  ranks) ranks ;;
  suite) suite ;;
  train) train ;;
  data) make_data ;;
  *) usage ;;
esac
pack
echo "all results: $out.tar"
exit "$failed"
