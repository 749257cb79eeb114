#!/usr/bin/env bash
# Trains on a queued resource, which continues after each loss of the machine. See usage.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/queued.sh ACTION --name=NAME --zone=ZONE [options] [-- training arguments]

  create   asks for the TPU slice. A start-up script sets up every worker and trains. After a restart of the machines,
           and after an error of the training, it continues from the newest checkpoint in --workdir
  watch    creates the resource, and creates it again each time it is taken away, until you delete it
  status   shows the state of the resource
  delete   deletes the resource and its machines

launch/queued.sh create --name=big --zone=us-east5-a --type=v5p-128 --version=v2-alpha-tpuv5 --spot=yes \
    --repository=https://example.com/vdm_jax.git -- --config=configs/t2v_pod.py --workdir=gs://BUCKET/run
EOF
}

# shellcheck source=launch/cloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/cloud.sh"
option every 300 "watch: seconds between two checks of the state"
tpu_vm v5litepod-256 "$@"
queued=(gcloud compute tpus queued-resources)

create() {
    local script more=()
    need repository
    ((${#rest[@]})) || die "training arguments are missing: give them after --; see --help"
    [[ "${opt[spot]}" == no ]] || more+=(--spot)
    script="${TMPDIR:-/tmp}/startup_of_${opt[name]}.sh"
    if [[ -n "$printing" ]]; then
        echo "cat >$(quoted "$script") <<'EOF'"
        startup
        echo EOF
    else
        startup >"$script"
    fi
    run "${queued[@]}" create "${opt[name]}" "${common[@]}" "--node-id=${opt[name]}" \
        "--accelerator-type=${opt[type]}" "--runtime-version=${opt[version]}" "${more[@]}" \
        "--metadata-from-file=startup-script=$script"
}

startup() { "$here/startup.sh" resume "${opt[repository]}" "${opt[branch]}" -- "${rest[@]}"; }

status() {
    run "${queued[@]}" describe "${opt[name]}" "${common[@]}" "--format=value(state.state)"
}

delete() {
    run "${queued[@]}" delete "${opt[name]}" "${common[@]}" --force --quiet
}

case "$action" in
    create) create ;;
    status) status ;;
    delete) delete ;;
    watch)
        create
        while [[ -z "$printing" ]]; do
            sleep "${opt[every]}"
            state="$(status || true)"
            case "$state" in
                SUSPENDED | FAILED) # it was taken away; its name is free after it is deleted
                    echo "$(date '+%F %T') ${opt[name]} is $state: it is created again"
                    delete
                    create
                    ;;
                "") # somebody deleted it
                    echo "$(date '+%F %T') ${opt[name]} is deleted"
                    break
                    ;;
            esac
        done
        ;;
    *) die "unknown action '$action'; see --help" ;;
esac
