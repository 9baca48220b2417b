#!/usr/bin/env bash
# Saves a datastore by an array of jobs, a share of its blocks each; the last one joins them.
#
#     sbatch --array=0-7 examples/slurm/array.sh DATA CHECKPOINT DSTORE [FLAGS]
#
# DSTORE lies in a folder that all machines see. A job that failed is submitted again alone:
# `sbatch --array=3 ...` with SHARES=8 in front, since the number of shares must stay the same.
#SBATCH --job-name=knnlm-save
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
set -euo pipefail
if (($# < 3)); then
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 2
fi
readonly DATA=$1 CHECKPOINT=$2 DSTORE=$3
shift 3
exec fairseq-knnlm save "$DATA" --path "$CHECKPOINT" --dstore "$DSTORE" "$@" \
    --num-shards "${SHARES:-$SLURM_ARRAY_TASK_COUNT}" --shard-id "$SLURM_ARRAY_TASK_ID"
