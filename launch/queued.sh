#!/usr/bin/env bash
# Training on a queued resource, spot if asked, that takes itself up again after each loss of the machine. See usage.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/queued.sh ACTION --name=NAME --zone=ZONE [options] [-- training arguments]

  create   asks for the slice. Its start-up script sets up every worker and trains; whenever the machines start again,
           and whenever training ends with an error, it goes on from the newest checkpoint in --workdir
  watch    creates the resource, and again each time it is taken away, until it is deleted by hand or training is done
  status   shows the state of the resource
  delete   gives it back

launch/queued.sh create --name=big --zone=us-east5-a --type=v5p-128 --version=v2-alpha-tpuv5 --spot=yes \
    --repository=https://example.com/vdm_jax.git -- --config=configs/t2v_pod.py --workdir=gs://BUCKET/run
EOF
}

# shellcheck source=launch/cloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/cloud.sh"
option every 300 "watch: seconds between two looks"
tpu_vm v5litepod-256 "$@"
queued=(gcloud compute tpus queued-resources)

create() {
    local script more=()
    need repository
    ((${#rest[@]})) || die "training arguments are missing: give them behind --, e.g. -- --config=... --workdir=gs://..."
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
                SUSPENDED | FAILED) # taken away: its name is free only when it is deleted
                    echo "$(date '+%F %T') ${opt[name]} is $state: once more"
                    delete
                    create
                    ;;
                "") # deleted by hand
                    echo "$(date '+%F %T') ${opt[name]} is gone"
                    break
                    ;;
            esac
        done
        ;;
    *) die "unknown action '$action'; see --help" ;;
esac
