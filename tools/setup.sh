#!/usr/bin/env bash
# Makes .venv, with everything that the demo, the tests and the checks need.
#
#     tools/setup.sh                    # or: PYTHON=python3.12 tools/setup.sh
#
# A second run returns at once: .venv/ready holds a hash of all that the environment is made
# from. What pip and the compiler say goes to .venv/setup.log; its end is shown on a failure.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

readonly FAIRSEQ=fairseq-fixed==0.12.3.1 # as in setup.py
readonly LOG=.venv/setup.log READY=.venv/ready
readonly STEPS=5
step_number=0
worker=

recipe() {
    cat setup.py constraints.txt tools/setup.sh | sha256sum
}

die() {
    printf '\nset-up failed: %s\n' "$1" >&2
    exit 1
}

# step TITLE COMMAND...: runs the command into the log, with the time that it takes on screen.
step() {
    step_number=$((step_number + 1))
    local title="[$step_number/$STEPS] $1" start=$SECONDS seconds
    shift
    printf '%s ' "$title"
    [[ -t 1 ]] || printf '\n'
    printf '\n== %s\n$ %s\n' "$title" "$*" >>"$LOG"
    set -m # a process group of its own, so that all of it can be stopped
    "$@" >>"$LOG" 2>&1 </dev/null &
    worker=$!
    set +m
    while kill -0 "$worker" 2>/dev/null; do
        sleep 1
        seconds=$((SECONDS - start))
        if [[ -t 1 ]]; then
            printf '\r%s  %ds ' "$title" "$seconds"
        elif ((seconds % 30 == 0)); then
            printf '      ... %ds\n' "$seconds"
        fi
    done
    if ! wait "$worker"; then
        printf '\n\n'
        tail -n 25 "$LOG"
        die "the step above did not finish; all of its output is in $LOG"
    fi
    worker=
    seconds=$((SECONDS - start))
    [[ ! -t 1 ]] || printf '\r%s ' "$title"
    printf '     done, %ds\n' "$seconds"
}

stop() {
    [[ -z $worker ]] || kill -- "-$worker" 2>/dev/null || true
    die "interrupted; run it again to go on"
}

# The first of some Pythons that is new enough; PYTHON, where given, is the only one.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed, and ${PYTHON:-python3} is $(
        "${PYTHON:-python3}" --version 2>/dev/null || echo 'not there'
    ).
  Name another one: make PYTHON=/path/to/python3.11 ..."
}

check_tools() {
    local python=$1 tool headers
    for tool in "${CC:-gcc}" "${CXX:-g++}" make; do
        command -v "${tool%% *}" >/dev/null || die "$tool is missing; fairseq is compiled from source.
  Debian, Ubuntu: sudo apt install build-essential"
    done
    "$python" -c 'import ensurepip, venv' 2>/dev/null || die "$python cannot make virtual environments.
  Debian, Ubuntu: sudo apt install python3-venv"
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [[ -f $headers/Python.h ]] || die "the headers of $python are missing (no $headers/Python.h).
  Debian, Ubuntu: sudo apt install python3-dev"
}

# Commands in an environment name its folder, so one that was moved or copied does not work.
check_place() {
    [[ ! -f .venv/pyvenv.cfg ]] || grep -qF " $PWD/.venv" .venv/pyvenv.cfg ||
        die ".venv is there, but was not made here. Remove it and run this again: rm -r .venv"
}

pip_install() {
    # CUDA_HOME would have fairseq compile GPU kernels that language modelling does not use
    env -u CUDA_HOME .venv/bin/python -m pip install --disable-pip-version-check --no-input "$@"
}

main() {
    check_place
    [[ ! -f $READY || $(<"$READY") != "$(recipe)" ]] || return 0
    local python
    python=$(find_python)
    check_tools "$python"
    echo "Setting up .venv with $("$python" --version). This is done once; details: $LOG"
    trap stop INT TERM
    mkdir -p .venv && : >"$LOG"
    step "virtual environment" "$python" -m venv "$PWD/.venv"
    step "torch, FAISS, Ray and the tools (a large download)" pip_install -r constraints.txt
    step "fairseq, compiled from source (2 to 5 minutes)" \
        pip_install --no-build-isolation --no-deps "$FAIRSEQ"
    step "fairseq_knnlm itself" pip_install --no-build-isolation --no-deps -e .
    step "a first import, to see that it works" .venv/bin/python -c "import faiss, fairseq_knnlm, ray"
    recipe >"$READY"
    echo "Ready, in $SECONDS s."
}

main
