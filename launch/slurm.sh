#!/usr/bin/env bash
# Trains as a Slurm job with one process on each node. See usage.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/slurm.sh --nodes=N [options] -- training arguments

Submits a job that runs python -m vdm_jax.train on each node. Slurm tells every process where the others are. Make the
environment .venv first: bash -c 'source launch/env.sh; ensure_venv cuda'.

The job is put back into the queue, and then continues from the newest checkpoint, in three cases: the time limit is two
minutes away (Slurm sends SIGTERM), training ends with exit code 75 (another process was lost), or a signal kills it.

launch/slurm.sh --nodes=2 --gpus=8 --time=24:00:00 -- --config=configs/t2v_300m.py --workdir=/shared/run
EOF
}

# shellcheck source=launch/cloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/cloud.sh"
option nodes 1 "number of nodes"
option gpus 8 "GPUs of each node; 0 for none"
option cpus 16 "CPU cores of each node"
option time 24:00:00 "time limit"
option partition "" "partition; default: the default of the site"
option account "" "account; default: the default of the site"
option name vdm_jax "name of the job"
parse "$@"
((${#rest[@]})) || die "training arguments are missing: give them after --; see --help"
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
while true; do # a signal ends a wait, but not the training
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
