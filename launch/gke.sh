#!/usr/bin/env bash
# Trains on GKE: a JobSet with one pod on each TPU host. See usage.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/gke.sh --image=IMAGE [options] -- training arguments

Applies a JobSet. The cluster needs JobSet (https://jobset.sigs.k8s.io). IMAGE is a container image that has this
repository in /vdm_jax and its packages installed. GKE gives every pod the addresses of the others. When a pod fails,
all pods start again, and training continues from the newest checkpoint.

launch/gke.sh --image=REGION-docker.pkg.dev/PROJECT/REPO/vdm_jax --topology=4x4 --hosts=4 \
    -- --config=configs/t2v_300m.py --workdir=gs://BUCKET/run
EOF
}

# shellcheck source=launch/cloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/cloud.sh"
option name vdm-jax "name of the JobSet"
option image "" "container image"
option namespace default "namespace"
option accelerator tpu-v5-lite-podslice "node label cloud.google.com/gke-tpu-accelerator"
option topology 2x4 "node label cloud.google.com/gke-tpu-topology"
option hosts 1 "hosts of the slice"
option chips 8 "chips of each host"
option restarts 100 "number of times that all pods may start again"
parse "$@"
need image
((${#rest[@]})) || die "training arguments are missing: give them after --; see --help"

yaml_list() { # writes words as a YAML list of quoted strings
    local word
    for word in "$@"; do
        word="${word//\\/\\\\}"
        echo "                  - \"${word//\"/\\\"}\""
    done
}

manifest() {
    cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: ${opt[name]}
  namespace: ${opt[namespace]}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${opt[restarts]}
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: ${opt[hosts]}
          completions: ${opt[hosts]}
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: ${opt[accelerator]}
                cloud.google.com/gke-tpu-topology: ${opt[topology]}
              containers:
              - name: train
                image: "${opt[image]}"
                workingDir: /vdm_jax
                ports:
                  - containerPort: 8471
                  - containerPort: 8080
                command:
$(yaml_list python -m vdm_jax.train "${rest[@]}")
                resources:
                  limits:
                    google.com/tpu: ${opt[chips]}
EOF
}

if [[ -n "$printing" ]]; then
    echo "kubectl apply -f - <<'EOF'"
    manifest
    echo EOF
else
    manifest | kubectl apply -f -
fi
