#!/bin/sh
# Installs the packages of a lock file into a Python environment, each checked by its SHA-256:
#   install.sh PYTHON NAME [OPTION OF PIP]...
# For `export` and `dev` it also installs torch: the CPU build if an index that pip uses has it, otherwise PyPI's build.
set -eu
python=$1 name=$2 here=$(dirname "$0")
shift 2
hashed() { "$python" -m pip install --disable-pip-version-check -q --require-hashes --no-deps "$@"; }
case $name in
    export | dev) hashed -r "$here/torch-cpu.txt" "$@" 2>/dev/null || hashed -r "$here/torch-cuda.txt" "$@" ;;
esac
hashed -r "$here/$name.txt" "$@"
