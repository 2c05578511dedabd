#!/usr/bin/env bash
# Check aep_ext on a machine with a GPU, using the torch of its python3 as it is: no network, no virtual environment.
#
#   benchmarks/gpu_check.sh [--name NAME] [--stages build,tests,sanitize,ceilings,ops,graphed,e2e]
#                           [--seconds S] [--wheels DIR] [--again | --retry]
#
# Every part's result (a file of tests, a benchmark case) goes into benchmarks/results/gpu-NAME.json as soon as it is
# known (NAME: the GPU's, by default). A part that is finished on this very source is not run again, so the script may be
# stopped, or stop itself after about S seconds, and be called again; --again runs all that is asked for anyway, --retry
# what failed. (The build is always run: it takes seconds where nothing changed, and another machine may not have it. It is
# made for this GPU alone.) A failure in one part does not keep the others from running; only a failed build does.
# --wheels: a folder of wheels with peers that are not installed here (liger_kernel, say), used for this call alone.
# Exit status: 0 all that was asked for passed (or was left out, for a reason that is recorded), 1 something failed, 2 a bad
# argument, 3 there is no GPU here, 4 the time was up before the end.
# python3 -m benchmarks.goals FILE prints the goals beside such a result.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec python3 -m benchmarks.gpu.check "$@"
