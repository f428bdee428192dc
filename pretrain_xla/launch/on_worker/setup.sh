#!/usr/bin/env bash
# Makes the environment of a run on a worker: setup.sh NAME [EXTRA_PACKAGE ...]
#
# Standard input has the exact versions to install, one NAME==VERSION a line, as another worker reported them; none for the
# first worker, where requirements-xla_tpu.txt decides. It ends with a line "# end". The last line on stdout is JSON:
# package -> version of what is there. A worker that has all of it is left as it is. One that was interrupted starts again.
set -euo pipefail

name=$1
shift
base="$HOME/$name"
venv="$base/venv"
code="$base/code"
installed="$code/pretrain_xla/launch/on_worker/installed.py"
wanted="$base/wanted.txt"

mkdir -p "$base"
exec 9>"$base/setup.lock"
flock -w 1500 9 # a set-up whose connection dropped may still be going on

cat >"$wanted"
if [ "$(tail -n 1 "$wanted")" != "# end" ]; then
    echo "the list of versions did not arrive whole" >&2
    exit 1
fi
lists=("$code/requirements.txt" "$code/requirements-xla_tpu.txt")
install="$code/requirements-xla_tpu.txt"
if grep -q '==' "$wanted"; then
    lists=("$wanted")
    install=$wanted
fi

if [ -x "$venv/bin/python" ] && "$venv/bin/python" "$installed" "${lists[@]}" -- "$@"; then
    exit 0
fi

if [ -e "$base/run.lock" ] && ! flock -n "$base/run.lock" true; then
    echo "a run is going on here with other packages than those that are wanted" >&2
    exit 1
fi

find_uv() {
    export PATH="$base/uv:$HOME/.local/bin:$PATH"
    if ! command -v uv >/dev/null; then
        python3 -m pip install --quiet --user uv >&2 || {
            curl --fail --silent --show-error --location --retry 5 https://astral.sh/uv/install.sh |
                env UV_UNMANAGED_INSTALL="$base/uv" sh >&2
        }
    fi
    command -v uv >/dev/null
}

find_uv || {
    echo "uv, which brings Python 3.11 and the packages, cannot be installed" >&2
    exit 1
}

rm -rf "$venv"
export UV_HTTP_TIMEOUT=120
uv venv --quiet --python 3.11 "$venv" >&2
for try in 1 2 3; do
    if uv pip install --quiet --python "$venv/bin/python" --torch-backend=cpu \
        -r "$install" "$@" >&2; then
        exec "$venv/bin/python" "$installed" "${lists[@]}" -- "$@"
    fi
    echo "the packages could not be installed (try $try of 3)" >&2
    sleep $((try * 5))
done
exit 1
