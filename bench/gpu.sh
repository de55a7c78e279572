#!/usr/bin/env bash
# All that a GPU has to show, in one command of at most nine minutes on one H100 or H200.
#
#   bench/gpu.sh                    from the repository's root, with its packages installed
#   bench/gpu.sh update sampler     only these stages
#   bench/gpu.sh --smoke            every stage at tiny shapes on any machine: shows that the command
#                                   runs, its figures mean nothing
#
# PYTHON: the interpreter [python3]. OUT: folder of the logs [runs/gpu]. SECONDS_IN_ALL [530].
# Each stage has a log and a time limit of its own, so that a failure loses its rows and no others.
# The last lines are the table: cold and warm apart, beside target and prediction (bench/predict.py).
set -u
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-530}

smoke=
[ "${1:-}" = --smoke ] && smoke=1 && shift
chosen=" $* "
mkdir -p "$OUT"
rm -f "$OUT"/*.log "$OUT"/stages

# stage NAME LIMIT COMMAND...: one line to $OUT/stages, NAME, exit status (124: out of time), seconds.
stage() {
    local name=$1 limit=$2 started=$SECONDS left=$((SECONDS_IN_ALL - SECONDS)) status
    shift 2
    [ "$chosen" = "  " ] || [[ $chosen == *" $name "* ]] || return 0
    if ((left < 5)); then
        status=skipped
    else
        timeout -k 5 $((left < limit ? left : limit)) "$@" >"$OUT/$name.log" 2>&1
        status=$?
    fi
    echo "$name $status $((SECONDS - started))" | tee -a "$OUT/stages"
}

bench() {
    local name=$1 limit=$2
    shift 2
    stage "$name" "$limit" "$PYTHON" -m bench "$@"
}

# Every test that has something to say of a GPU; eight at a time where xdist is installed.
tests=(tests/test_kernels_triton.py tests/test_kernels.py tests/test_exact.py tests/test_sampler.py
    tests/test_model.py tests/test_update.py tests/test_grpo.py tests/test_gepo.py tests/test_lora.py)
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider -m "gpu or not slow")
has_trl() { "$PYTHON" -c 'import datasets, trl' 2>/dev/null; }

if [ "$smoke" ]; then
    tiny=(--prompts 2 --samples 8 --prompt 8 --response 8 --steps 1)
    stage tests 200 "${pytest[@]}" tests/test_house.py
    bench update 200 update --smoke --rounds 1
    bench sampler 200 sampler --smoke --rounds 1 --no_peers
    bench step 200 step "${tiny[@]}"
    bench kernels 200 kernels --smoke --only advantage
    has_trl && bench trl 200 step "${tiny[@]}" --trl
else
    "$PYTHON" -c 'import xdist' 2>/dev/null && pytest+=(-n 8)
    stage tests 110 "${pytest[@]}" "${tests[@]}"
    bench update 80 update
    bench sampler 110 sampler --shapes 0.5B --rounds 2 --no_peers
    bench sampler_135M 70 sampler --shapes 135M --rounds 2 --no_peers
    bench step 60 step --shapes 0.5B --steps 2
    bench step_135M 40 step --shapes 135M --prompt 400 --response 110 --steps 2
    bench kernels 60 kernels --models 0.5B,1.5B --no-compile
    has_trl && bench trl 90 step --shapes 0.5B --prompts 16 --steps 1 --trl
fi

echo
"$PYTHON" -m bench.gpu "$OUT"
