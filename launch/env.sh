# shellcheck shell=bash
# Sourced by the scripts beside it. `ensure_venv EXTRA...` makes .venv at the top of the repository, installs this
# package (editable) with the extras named, and sets PY to its Python. It needs Python 3.11+ and pip, nothing else.
#
# One stamp a set of requirements records what was installed from which setup.py, so a second call takes no time, and
# a call that names fewer extras leaves the others in place. With JAX_VERSION set, that version is installed, into a
# .venv-jax-VERSION of its own.

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
    [[ -n "$base" ]] || die "Python 3.11 or newer is needed, and ${candidates[0]} is" \
        "'$("${candidates[0]}" --version 2>&1 || true)': install one, or name it: PYTHON=/path/to/python3.11 $0"
    echo "making $(basename "$VENV") with $("$base" --version)"
    # Some distributions ship venv without ensurepip; then the pip of the base Python puts one in.
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
    is_new_enough "$PY" || make_venv # also where the Python under an old .venv is gone
    hash="$({
        echo "$ROOT"
        cat "$ROOT/setup.py"
    } | "$PY" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
    for name in base $extras; do
        [[ "$(cat "$VENV/.installed-$name" 2>/dev/null)" == "$hash" ]] || missing="yes"
    done
    [[ -n "$missing" ]] || return 0
    echo "installing vdm_jax${extras:+ with extras $extras} into $(basename "$VENV") (some minutes the first time)"
    # PYTHONWARNINGS: the build back end warns of every editable package that is not in a src folder
    PYTHONWARNINGS=ignore "$PY" -m pip install --quiet --disable-pip-version-check --editable "$ROOT${extras:+[${extras// /,}]}" \
        ${JAX_VERSION:+"jax==$JAX_VERSION"}
    for name in base $extras; do
        echo "$hash" >"$VENV/.installed-$name"
    done
}
