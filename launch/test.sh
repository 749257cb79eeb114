#!/usr/bin/env bash
# Lint, format check, documentation and test suite in a .venv of its own.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/test.sh [--no-peers] [--jax=VERSION] [pytest arguments]

Installs the package into .venv at the top of the repository. This is quick the second time. Then runs ruff, builds the
documentation with warnings as errors, and runs pytest on the CPU.

  --no-peers   installs neither PyTorch nor diffusers, and skips the tests that need them
  --jax=0.7.2  uses this version of JAX, in .venv-jax-0.7.2 (Colab's TPU machines have 0.7.2)
  --help       shows this text

Other arguments go to pytest:    launch/test.sh -k samplers
One process, with output:        launch/test.sh -n 0 -s
A certain Python:                PYTHON=python3.12 launch/test.sh
EOF
}

extras=(test app docs doom peers metrics prepare wandb)
arguments=()
for argument in "$@"; do
    case "$argument" in
        -h | --help)
            usage
            exit 0
            ;;
        --no-peers) extras=(test app docs doom prepare wandb) ;;
        --jax=*) JAX_VERSION="${argument#*=}" ;;
        *) arguments+=("$argument") ;;
    esac
done

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"
ensure_venv "${extras[@]}"
export JAX_PLATFORMS=cpu

"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" -m properdocs build --strict --quiet --site-dir "$ROOT/.cache/site"
# One worker on each core, but at most 8, because each worker loads JAX. A few tests take long, so idle workers take
# tests from busy workers.
exec "$PY" -m pytest -n auto --maxprocesses 8 --dist worksteal ${arguments[@]+"${arguments[@]}"}
