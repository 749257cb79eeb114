#!/usr/bin/env bash
# Training as a Slurm job, one process a node, put back in the queue when it is ended early. See usage.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/slurm.sh --nodes=N [options] -- training arguments

Submits a job that runs python -m vdm_jax.train on each node; the processes find each other by what Slurm tells. The
environment .venv must be there: bash -c 'source launch/env.sh; ensure_venv cuda'. Slurm sends SIGTERM two minutes
before the time is up; that, exit code 75 (a peer was lost) and a death by signal put the job back in the queue, where
it goes on from the newest checkpoint.

launch/slurm.sh --nodes=2 --gpus=8 --time=24:00:00 -- --config=configs/t2v_300m.py --workdir=/shared/run
EOF
}

# shellcheck source=launch/cloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/cloud.sh"
option nodes 1 "number of nodes"
option gpus 8 "GPUs a node; 0 for none"
option cpus 16 "CPU cores a node"
option time 24:00:00 "time limit"
option partition "" "partition; the site's own unless given"
option account "" "account; the site's own unless given"
option name vdm_jax "name of the job"
parse "$@"
((${#rest[@]})) || die "training arguments are missing: give them behind --; see --help"
root="$(dirname "$here")"

job() {
    cat <<EOF
#!/bin/bash
#SBATCH --job-name=${opt[name]}
#SBATCH --nodes=${opt[nodes]}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=${opt[cpus]}
#SBATCH --time=${opt[time]}
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=${opt[name]}-%j.log
EOF
    [[ "${opt[gpus]}" == 0 ]] || echo "#SBATCH --gpus-per-node=${opt[gpus]}"
    [[ -z "${opt[partition]}" ]] || echo "#SBATCH --partition=${opt[partition]}"
    [[ -z "${opt[account]}" ]] || echo "#SBATCH --account=${opt[account]}"
    cat <<EOF

cd $(quoted "$root") || exit 2
stopped=""
srun --kill-on-bad-exit=1 $(quoted .venv/bin/python -m vdm_jax.train "${rest[@]}") &
running=\$!
trap 'stopped=yes; kill -TERM \$running' TERM
while true; do # a signal ends one wait, not the job
    wait \$running
    code=\$?
    kill -0 \$running 2>/dev/null || break
done
if [ \$code -eq 75 ] || [ \$code -ge 128 ] || [ -n "\$stopped" ]; then
    scontrol requeue "\$SLURM_JOB_ID"
fi
exit \$code
EOF
}

if [[ -n "$printing" ]]; then
    echo "sbatch <<'EOF'"
    job
    echo EOF
else
    job | sbatch
fi
