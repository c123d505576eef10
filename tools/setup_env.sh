#!/usr/bin/env bash
# Make the virtual environment this project runs in and print its path.
#
# Standard output gets the path and nothing else; progress goes to standard
# error. A finished environment is only looked up; an interrupted one is redone.
# The versions stand in requirements/. Settings, all optional:
#
#   STACK       forks, the maintained ones of OpenMMLab's packages, or
#               openmmlab, its own last releases; default: forks
#   ISVIT_ENV   the environment's folder; default: one under the user's cache,
#               named after the requirement files and the Python version
#   WHEELHOUSE  a folder of wheels that pip looks into as well
#   PYTHON      the Python 3.11 to use
#   MAX_JOBS    parallel compilations of mmcv's operators; default: all cores
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
requirements=$root/requirements
stack=${STACK:-forks}
needed_python=3.11
needed_gib=10

die() {
    echo "setup_env: error: $*" >&2
    exit 1
}

step() {
    printf '[%4d s] %s\n' "$SECONDS" "$*" >&2
}

# Print the command and the full version of the first fitting Python.
find_python() {
    local candidate version candidates=("python$needed_python" python3 python)
    if [ -n "${PYTHON:-}" ]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        # A version manager's stub exists but fails: run it to know.
        version=$("$candidate" -c 'import platform as p
print(p.python_version())' 2>/dev/null) || version=
        case $version in
            "$needed_python".*) echo "$candidate $version"; return ;;
        esac
    done
    if [ -n "${PYTHON:-}" ]; then
        die "PYTHON=$PYTHON is ${version:+Python }${version:-not a Python \
that runs}; give one of version $needed_python"
    fi
    die "found no Python $needed_python; install it or name it by PYTHON=..."
}

is_ready() {
    [ -x "$env/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]
}

finish() {
    echo "$env"
    exit 0
}

# Show the log's end before giving up.
fail() {
    tail -n 20 "$log" >&2
    die "$*; the whole log is $log"
}

# Run a command into the log.
logged() {
    "$@" >>"$log" 2>&1 </dev/null ||
        fail "'$(basename "$1") ${*:2:3} ...' failed"
}

pip_install() {
    logged "$env/bin/python" -m pip install --no-input --progress-bar off \
        "${links[@]}" "$@"
}

has_mmcv_wheel() {
    "$env/bin/python" -m pip install --dry-run --quiet --no-deps \
        --ignore-installed --only-binary :all: "${links[@]}" "$mmcv" \
        >>"$log" 2>&1
}

check_compiler() {
    command -v "${CXX:-c++}" >/dev/null || die "no wheel of $mmcv fits this \
machine and there is no C++ compiler (${CXX:-c++}) to build one: install g++ \
or give WHEELHOUSE=DIR with the wheel"
    local include
    include=$("$python" -c 'import sysconfig as s; print(s.get_path("include"))')
    [ -e "$include/Python.h" ] || die "building $mmcv needs Python's headers, \
but $include/Python.h is missing: install the python$needed_python-dev package"
}

# Name what mmcv's binary depends on: it fits one torch build only.
describe_build() {
    "$env/bin/python" - "$mmcv" 2>>"$log" <<'PYTHON'
import os
import sys
import sysconfig

import torch
from torch.utils.cpp_extension import CUDA_HOME, ROCM_HOME

ops = 'cpu'
if os.getenv('FORCE_CUDA') == '1':
    ops = 'cuda'
elif torch.cuda.is_available() and (CUDA_HOME or ROCM_HOME):
    ops = 'cuda%d%d' % torch.cuda.get_device_capability()
print(sys.argv[1].replace('==', '-'), f'torch-{torch.__version__}',
      sys.implementation.cache_tag, sysconfig.get_platform(), ops, sep='_')
PYTHON
}

# Build mmcv's wheel into a folder. A subshell: when only this script is
# killed, the build goes on, keeps the lock and stores its wheel.
build_mmcv() (
    folder=$1
    mkdir -p "$folder" || exit
    partial=$(mktemp -d "$folder/partial.XXXXXX") || exit
    # torch looks for ninja there.
    export PATH=$env/bin:$PATH MAX_JOBS=${MAX_JOBS:-$(nproc)}
    case $folder in
        # A GPU without its toolkit would make mmcv's build fail.
        *_cpu) export CUDA_VISIBLE_DEVICES= ;;
    esac
    # pip's own cache of built wheels does not know about torch's version.
    "$env/bin/python" -m pip wheel --verbose --no-cache-dir --no-deps \
        --no-build-isolation --no-binary "${mmcv%==*}" --wheel-dir "$partial" \
        "${links[@]}" "$mmcv" 2>&1 </dev/null |
        while IFS= read -r line; do
            printf '%s\n' "$line" >>"$log"
            # Ninja counts: "[12/78] c++ ...".
            if [[ $line =~ ^\ *\[([0-9]+)/([0-9]+)\] ]] &&
                ((BASH_REMATCH[1] % 10 == 0)); then
                step "  ${BASH_REMATCH[1]} of ${BASH_REMATCH[2]} files" || true
            fi
        done || exit
    mv "$partial"/*.whl "$folder/" && rmdir "$partial"
)

verify() {
    "$env/bin/python" - <<'PYTHON'
import cv2
import mmcv.ops
import mmdet
import mmengine
import timm
import torch
import torchvision

boxes = torch.tensor([[0., 0., 4., 4.], [0., 0., 4., 3.9], [8., 8., 9., 9.]])
kept = mmcv.ops.nms(boxes, torch.tensor([.9, .8, .7]), .5)[1].tolist()
assert kept == [0, 2], f"mmcv's nms kept {kept} instead of [0, 2]"
for module in (torch, torchvision, timm, mmengine, mmcv, mmdet, cv2):
    print(module.__name__, module.__version__, end='  ')
if torch.cuda.is_available() and \
        mmcv.ops.get_compiling_cuda_version() == 'not available':
    print("\nnote: mmcv's operators were built without CUDA: detectors run on "
          'the CPU here')
PYTHON
}

if [ -n "${WHEELHOUSE:-}" ]; then
    [ -d "$WHEELHOUSE" ] || die "WHEELHOUSE=$WHEELHOUSE is not a folder"
    WHEELHOUSE=$(cd "$WHEELHOUSE" && pwd)
fi
found=$(find_python)
python=${found% *}
case $stack in
    forks) versions=$requirements ;;
    openmmlab) versions=$requirements/openmmlab ;;
    *) die "STACK=$stack is not allowed; give forks or openmmlab" ;;
esac
files=("$requirements"/{build,dev,report}.txt
    "$versions"/{opencv,openmmlab,torch}.txt)
hash=$({ echo "${found##* }"; cat "${files[@]}"; } |
    sha256sum | cut -c1-12)
cache=${XDG_CACHE_HOME:-${HOME:?is not set: give XDG_CACHE_HOME}/.cache}/isvit_det
env=${ISVIT_ENV:-$cache/env-$hash}
case $env in
    /*) ;;
    *) env=$PWD/$env ;;
esac
stamp=$env/.isvit_ready
lock=$env/.isvit_lock
log=$env/.isvit_log
if is_ready; then
    finish
fi

# The lock file also marks the folder as ours, and so as ours to clear. List
# before looking for it: another set-up may be creating both just now.
content=$(ls -A "$env" 2>/dev/null || true)
if [ -n "$content" ] && [ ! -e "$lock" ]; then
    die "$env exists and was not made by this script: remove it or name \
another folder by ISVIT_ENV=..."
fi
command -v flock >/dev/null || die "found no flock command; it is part of \
util-linux"
"$python" -c 'import ensurepip, venv' 2>/dev/null || die "$python cannot make \
virtual environments: install the python$needed_python-venv package"
mkdir -p "$env" || die "cannot create $env"
# Programs started from here inherit the lock: what outlives a killed set-up
# keeps the next one waiting rather than writing beside it.
exec 9>"$lock"
if ! flock --nonblock 9; then
    step "another set-up works on $env: waiting for it"
    flock 9
fi
if is_ready; then
    finish
fi
if [ "$(ls -A "$env")" != "$(basename "$lock")" ]; then
    step 'clearing an unfinished or outdated environment'
    rm -f "$stamp"
    find "$env" -mindepth 1 -maxdepth 1 ! -name "$(basename "$lock")" \
        -exec rm -rf {} +
fi
free_kib=$(df -Pk "$env" | awk 'NR == 2 {print $4}')
((free_kib >= needed_gib * 1024 * 1024)) || die "the environment needs \
$needed_gib GiB, but only $((free_kib / 1024 / 1024)) GiB are free at $env"

unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1
# Leftovers of a killed pip go with the environment.
export TMPDIR=$env/.isvit_tmp
mkdir "$TMPDIR"
mmcv=$(grep -E '^(onedl-)?mmcv==' "$versions/openmmlab.txt")
links=()
if [ -n "${WHEELHOUSE:-}" ]; then
    links+=(--find-links "$WHEELHOUSE")
fi

step "making $env (Python ${found##* })"
logged "$python" -m venv "$env"
needs_build=false
if ! has_mmcv_wheel; then
    needs_build=true
    # Wheels of other torch builds count here; the exact name needs torch.
    if ! compgen -G "$cache/wheels/${mmcv/==/-}_*/*.whl" >/dev/null; then
        check_compiler
        step "there is no wheel of $mmcv: building it will take about 20" \
            'minutes on 2 cores, once'
    fi
fi
step 'installing torch (a download of 2 to 3 GB)'
pip_install -r "$requirements/build.txt" -r "$versions/torch.txt"
if $needs_build; then
    wheels=$cache/wheels/$(describe_build)
    if ! compgen -G "$wheels/*.whl" >/dev/null; then
        check_compiler
        step "building $mmcv in $wheels"
        build_mmcv "$wheels" || fail "$mmcv did not build"
    fi
    links+=(--find-links "$wheels")
fi
step "installing OpenMMLab's packages and the developer tools"
pip_install --no-build-isolation --only-binary "${mmcv%==*}" \
    -c "$versions/torch.txt" -c "$versions/opencv.txt" \
    -r "$versions/openmmlab.txt" -r "$requirements/dev.txt" \
    -r "$requirements/report.txt"
# The packages above ask for two OpenCV distributions that overwrite each
# other's files: keep the one that runs without libGL.
logged "$env/bin/python" -m pip uninstall --yes opencv-python
pip_install --no-deps --force-reinstall -r "$versions/opencv.txt"
step 'checking that they work together'
together=$(verify 2>>"$log") || fail 'they do not'
step "$together"
rm -rf "$TMPDIR"
echo "$hash" >"$stamp.new"
mv "$stamp.new" "$stamp"
step "ready: $env"
finish
