#!/usr/bin/env bash
# Prints shell commands that set up a TPU host and train on it. See usage.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/startup.sh setup REPOSITORY BRANCH
       launch/startup.sh train [training arguments]
       launch/startup.sh resume REPOSITORY BRANCH -- training arguments

  setup    prints commands that put the code and its packages into ~/vdm_jax
  train    prints a command that trains in the background. Its log is ~/train.log
  resume   prints a start-up script that does both, and trains again after each error. Its log is /root/train.log

launch/tpu_vm.sh and launch/queued.sh send these commands to the hosts.
EOF
}

# shellcheck source=launch/cloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/cloud.sh"

setup() {
    cat <<EOF
set -e
cd
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    sudo apt-get update -qq
    sudo apt-get install -y -qq python3.11 python3.11-venv
fi
[ -d vdm_jax ] || git clone --depth=1 --branch $(quoted "$2") $(quoted "$1") vdm_jax
cd vdm_jax
git fetch --depth=1 --quiet origin $(quoted "$2")
git checkout --quiet FETCH_HEAD
bash -c 'source launch/env.sh; ensure_venv tpu'
EOF
}

# Every host of a slice runs the same command. With --distributed=yes the hosts find each other.
training() { quoted .venv/bin/python -m vdm_jax.train --distributed=yes "$@"; }

case "${1:-}" in
    -h | --help) usage ;;
    setup)
        (($# == 3)) || die "setup takes a repository and a branch; see --help"
        setup "$2" "$3"
        ;;
    train)
        shift
        echo "cd ~/vdm_jax; nohup $(training "$@") </dev/null >>~/train.log 2>&1 &"
        ;;
    resume)
        [[ "${4:-}" == -- ]] || die "resume takes a repository, a branch and -- arguments; see --help"
        echo '#! /bin/bash'
        echo 'export HOME=/root'
        echo '{'
        setup "$2" "$3"
        shift 4
        # Training ends with 0 when it is finished and when a signal stops it. 2 is wrong input: a new try cannot help.
        cat <<EOF
set +e
while true; do
    $(training "$@")
    code=\$?
    [ \$code -ne 0 ] && [ \$code -ne 2 ] || break
    echo "training ended with exit code \$code: it starts again in 30 s"
    sleep 30
done
} >>/root/train.log 2>&1
EOF
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac
