#!/usr/bin/env bash
# Check aep_ext on a machine with a GPU, using the torch of its python3 as it is: no network, no virtual environment.
#
#   benchmarks/gpu_check.sh [--name NAME] [--stages build,tests,sanitize,bench] [--again]
#
# Each stage's result goes into benchmarks/results/gpu-NAME.json as soon as it is known (NAME: the GPU's, by default). A
# stage that passed on this very source is not run again, so the script may be stopped and started again; --again runs it
# anyway. (The build is always run: it takes seconds where nothing changed, and another machine may not have it.)
# Exit status: 0 all stages asked for passed (or were left out, for a reason that is recorded), 1 one failed, 2 a bad
# argument, 3 there is no GPU here.
set -uo pipefail
cd "$(dirname "$0")/.."

name="" stages="build,tests,sanitize,bench" again=""
while [ $# -gt 0 ]; do
  case "$1" in
    --name) name="${2:?--name needs a value}"; shift 2 ;;
    --stages) stages="${2:?--stages needs a value}"; shift 2 ;;
    --again) again=1; shift ;;
    *) echo "gpu_check: unknown argument $1; see the head of this file" >&2; exit 2 ;;
  esac
done
for stage in ${stages//,/ }; do
  case "$stage" in build|tests|sanitize|bench) ;; *) echo "gpu_check: no such stage: $stage" >&2; exit 2 ;; esac
done

gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "")' 2>/dev/null)
if [ -z "$gpu" ]; then
  echo "gpu_check: python3's torch sees no GPU here; nothing was run" >&2
  exit 3
fi
[ -n "$name" ] || name=$(printf '%s' "$gpu" | tr '[:upper:] ' '[:lower:]-' | tr -cd 'a-z0-9-')

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
result="benchmarks/results/gpu-$name.json"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p benchmarks/results

# What the stages judge: the sources as they lie here, committed or not, beside this torch.
torch_version=$(python3 -c 'import torch; print(torch.__version__)')
source_hash=$({ echo "$torch_version"; find aep_ext csrc cmake build_support tests benchmarks CMakeLists.txt -type f \
  \( -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake' -o -name '*.txt' \) \
  -print0 | sort -z | xargs -0 sha256sum; } | sha256sum | cut -c1-16)

passed_before() { # STAGE
  [ -z "$again" ] && [ "$1" != build ] && python3 - "$result" "$1" "$source_hash" <<'PY'
import json, sys
from pathlib import Path
path, stage, source = sys.argv[1:]
data = json.loads(Path(path).read_text()) if Path(path).is_file() else {}
entry = data.get("stages", {}).get(stage, {})
sys.exit(0 if entry.get("status") == "passed" and entry.get("source") == source else 1)
PY
}

record() { # STAGE STATUS SECONDS NOTE [FILE.json with more]
  python3 - "$result" "$source_hash" "$@" <<'PY'
import json, os, sys
from pathlib import Path
import torch
path, source, stage, status, seconds, note, *more = sys.argv[1:]
file = Path(path)
data = json.loads(file.read_text()) if file.is_file() else {}
data |= {"gpu": torch.cuda.get_device_name(0), "capability": list(torch.cuda.get_device_capability(0)),
         "torch": torch.__version__, "cuda": torch.version.cuda}
entry = {"status": status, "seconds": int(seconds), "note": note, "source": source}
if more and Path(more[0]).is_file():
    entry["details"] = json.loads(Path(more[0]).read_text())
    entry["details"].get("machine_info", {}).pop("node", None)  # the machine's name is nobody's business
data.setdefault("stages", {})[stage] = entry
temporary = file.with_suffix(f".{os.getpid()}.tmp")
temporary.write_text(json.dumps(data, indent=1) + "\n")
os.replace(temporary, file)
print(f"gpu_check: {stage}: {status}" + (f" ({note})" if note else ""), flush=True)
PY
}

# pytest's closing line; other lines may follow it (compute-sanitizer's summary, say).
pytest_line() {
  grep -E '([0-9]+ (passed|failed|skipped|deselected|error)|no tests ran).* in [0-9.]+s' "$1" | tail -n 1 >"$work/line"
  if [ -s "$work/line" ]; then last_line "$work/line"; else last_line "$1"; fi
}

last_line() { grep -v '^[[:space:]]*$' "$1" | tail -n 1 | sed 's/^=* *//; s/ *=*$//' | cut -c1-300; }

# A run in which nothing was selected (status 5), or everything was skipped, is no success and no failure.
verdict_of_pytest() { # STATUS LOG
  case "$1" in
    0) if pytest_line "$2" | grep -q ' passed'; then echo passed; else echo "left out"; fi ;;
    5) echo "left out" ;;
    *) echo failed ;;
  esac
}

stage_build() {
  for tool in cmake ninja nvcc; do
    command -v "$tool" >/dev/null || echo "gpu_check: $tool is not on the PATH"
  done
  # FORCE_CUDA: a build without the CUDA kernels is a failure here, and not one with a notice.
  FORCE_CUDA=1 python3 -c 'from pathlib import Path; from build_support.native import build_into; build_into(Path("aep_ext"))' &&
    python3 - "$work/build.json" <<'PY'
import json, sys
from pathlib import Path
import aep_ext
Path(sys.argv[1]).write_text(json.dumps(aep_ext.build_info().to_dict()))
print(aep_ext.build_info())
PY
}

failed=0
for stage in ${stages//,/ }; do
  if passed_before "$stage"; then
    echo "gpu_check: $stage: passed before on this source"
    continue
  fi
  log="$work/$stage.log" started=$SECONDS note="" verdict=failed
  case "$stage" in
    build)
      stage_build 2>&1 | tee "$log"; status=${PIPESTATUS[0]}
      [ "$status" = 0 ] && verdict=passed
      [ "$status" = 0 ] || note=$(last_line "$log")
      ;;
    tests)
      python3 -m pytest tests -m gpu -p no:cacheprovider 2>&1 | tee "$log"; status=${PIPESTATUS[0]}
      verdict=$(verdict_of_pytest "$status" "$log"); note=$(pytest_line "$log")
      ;;
    sanitize)
      sanitizer=$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:/usr/local/cuda/bin" command -v compute-sanitizer)
      if [ -n "$sanitizer" ]; then
        for tool in memcheck racecheck; do
          only=()
          [ "$tool" = memcheck ] || only=(--kernel-name kernel_substring=aep) # races are ours to find, not torch's
          PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" "${only[@]}" --error-exitcode 99 \
            python3 -m pytest tests/ops -m "gpu and not slow" -p no:cacheprovider 2>&1 | tee "$log"; status=${PIPESTATUS[0]}
          verdict=$(verdict_of_pytest "$status" "$log")
          note="${note:+$note; }$tool: $(pytest_line "$log"); $(last_line "$log")"
          [ "$verdict" = passed ] || break
        done
      else
        verdict="left out" note="compute-sanitizer was not found"
      fi
      ;;
    bench)
      if python3 -c 'import pytest_benchmark' 2>/dev/null; then
        python3 -m pytest benchmarks -m gpu -p no:cacheprovider -o python_files='bench_*.py test_*.py' \
          --benchmark-json="$work/bench.json" 2>&1 | tee "$log"; status=${PIPESTATUS[0]}
        verdict=$(verdict_of_pytest "$status" "$log"); note=$(pytest_line "$log")
      else
        verdict="left out" note="pytest-benchmark is not installed"
      fi
      ;;
  esac
  record "$stage" "$verdict" "$((SECONDS - started))" "$note" "$work/$stage.json" || failed=1
  [ "$verdict" = failed ] && failed=1
  [ "$stage" = build ] && [ "$verdict" = failed ] && break # the other stages would judge something else
done
exit "$failed"
