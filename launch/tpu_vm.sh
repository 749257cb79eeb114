#!/usr/bin/env bash
# Creates, sets up and deletes a TPU VM of one or many hosts, and trains on it. See usage.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/tpu_vm.sh ACTION --name=NAME --zone=ZONE [options] [-- training arguments]

  create   creates the TPU VM
  setup    puts the code and its packages on every worker
  train    trains on all workers, in the background. The arguments after -- are those of python -m vdm_jax.train
  logs     shows the end of every worker's log
  stop     stops the training on every worker, with a checkpoint
  ssh      logs in to worker 0
  delete   deletes the TPU VM

launch/tpu_vm.sh create --name=one --zone=us-west4-a --type=v5litepod-8
launch/tpu_vm.sh setup --name=one --zone=us-west4-a --repository=https://example.com/vdm_jax.git
launch/tpu_vm.sh train --name=one --zone=us-west4-a -- --config=configs/t2v_300m.py --workdir=gs://BUCKET/run
EOF
}

# shellcheck source=launch/cloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/cloud.sh"
tpu_vm v5litepod-8 "$@"
tpu=(gcloud compute tpus tpu-vm)

everywhere() { # runs a shell command on all workers
    run "${tpu[@]}" ssh "${opt[name]}" "${common[@]}" --worker=all --command="$1"
}

case "$action" in
    create)
        [[ "${opt[spot]}" == no ]] || common+=(--spot)
        run "${tpu[@]}" create "${opt[name]}" "${common[@]}" \
            "--accelerator-type=${opt[type]}" "--version=${opt[version]}"
        ;;
    setup)
        need repository
        everywhere "$("$here/startup.sh" setup "${opt[repository]}" "${opt[branch]}")"
        ;;
    train) everywhere "$("$here/startup.sh" train "${rest[@]}")" ;;
    logs) everywhere "tail -n 20 ~/train.log" ;;
    stop) everywhere "pkill -TERM -u \"\$USER\" -f 'python -m vdm_jax[.]train' || true" ;;
    ssh) run "${tpu[@]}" ssh "${opt[name]}" "${common[@]}" --worker=0 ;;
    delete) run "${tpu[@]}" delete "${opt[name]}" "${common[@]}" --quiet ;;
    *) die "unknown action '$action'; see --help" ;;
esac
