#!/usr/bin/env bash
# Starts a Ray on the machines of a job, and has it save a datastore and build its index.
#
#     sbatch --nodes=4 examples/slurm/ray.sh DATA CHECKPOINT DSTORE [FLAGS]
#
# DSTORE lies in a folder that all machines see. Given again, it goes on where it was stopped.
#SBATCH --job-name=knnlm-ray
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
set -euo pipefail
if (($# < 3)); then
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 2
fi
readonly DATA=$1 CHECKPOINT=$2 DSTORE=$3
shift 3
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
readonly head workers=$((SLURM_JOB_NUM_NODES * SLURM_CPUS_PER_TASK))

ray_run() { # COMMAND...: on the first machine, with a Ray over all of them
    srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
        --num-cpus "$SLURM_CPUS_PER_TASK" -- "$@"
}

ray_run fairseq-knnlm cluster save --ray auto --workers "$workers" \
    "$DATA" --path "$CHECKPOINT" --dstore "$DSTORE" "$@"
ray_run fairseq-knnlm cluster build-index --ray auto --workers "$workers" --dstore "$DSTORE"
