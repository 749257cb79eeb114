# shellcheck shell=bash
# Sourced by other scripts in this folder. `ensure_venv EXTRA...` makes .venv at the top of the repository and installs
# this package (editable) with the named extras. It needs Python 3.11 or newer and pip. $PY is the Python of .venv.
#
# A file .venv/.installed-EXTRA records the setup.py that an extra was installed from. So a second call takes no time,
# and a call with fewer extras keeps the others. If JAX_VERSION is set, that version of JAX is installed, into
# .venv-jax-VERSION.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv${JAX_VERSION:+-jax-$JAX_VERSION}"
PY="$VENV/bin/python"

die() {
    echo "error: $*" >&2
    exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

make_venv() {
    local candidate base="" candidates=(python3 python3.13 python3.12 python3.11)
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if is_new_enough "$candidate"; then
            base="$candidate"
            break
        fi
    done
    [[ -n "$base" ]] || die "Python 3.11 or newer is needed, but ${candidates[0]} is" \
        "'$("${candidates[0]}" --version 2>&1 || true)': install a newer one, or name it: PYTHON=/path/to/python3.11 $0"
    echo "making $(basename "$VENV") with $("$base" --version)"
    # Some distributions ship venv without ensurepip. There the pip of the base Python installs pip.
    if "$base" -c 'import ensurepip' 2>/dev/null; then
        "$base" -m venv --clear "$VENV"
    else
        "$base" -m venv --clear --without-pip "$VENV"
        "$base" -m pip --python "$PY" install --quiet pip ||
            die "$base has neither ensurepip nor pip: install its venv or pip package"
    fi
}

ensure_venv() {
    local extras="$*" name hash missing=""
    is_new_enough "$PY" || make_venv # also if the Python of an old .venv was removed
    hash="$({
        echo "$ROOT"
        cat "$ROOT/setup.py"
    } | "$PY" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
    for name in base $extras; do
        [[ "$(cat "$VENV/.installed-$name" 2>/dev/null)" == "$hash" ]] || missing="yes"
    done
    [[ -n "$missing" ]] || return 0
    echo "installing vdm_jax${extras:+ with extras $extras} into $(basename "$VENV") (some minutes the first time)"
    # PYTHONWARNINGS: else the build back end warns, because the package is not in a folder src. editable_mode: else a
    # script that lies beside the clone would import the clone's folder, which has the same name as the package.
    PYTHONWARNINGS=ignore "$PY" -m pip install --quiet --disable-pip-version-check \
        --config-settings editable_mode=compat --editable "$ROOT${extras:+[${extras// /,}]}" ${JAX_VERSION:+"jax==$JAX_VERSION"}
    for name in base $extras; do
        echo "$hash" >"$VENV/.installed-$name"
    done
}
