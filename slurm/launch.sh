#!/usr/bin/env bash
# What the scripts beside this one share: runs a command of clipq (train, eval) on all tasks of a job.
#   CLIPQ_VENV   the virtual environment to use; unset: the one that is active where the job is submitted
#   CLIPQ_LOGS   where the logs of the nodes go, if there are several; unset: the folder that the job is submitted from
set -euo pipefail
command="$1"
shift
# shellcheck disable=SC1091
[ -z "${CLIPQ_VENV:-}" ] || source "$CLIPQ_VENV/bin/activate"
# srun passes this variable of the job's on to the tasks, but does not read it.
options=(--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
if [ "$SLURM_NNODES" -gt 1 ]; then
    mkdir -p "${CLIPQ_LOGS:=.}"
    logs="$CLIPQ_LOGS/${SLURM_JOB_NAME}_${SLURM_JOB_ID}_node"
    options+=(--output="${logs}%n.log" --open-mode=append)
fi
# A signal to this script alone, as of --signal=B:USR1@120 and scancel --batch, is passed on. Bash would else die of it.
step='' heard=no
trap 'heard=yes; [ -z "$step" ] || kill -USR1 "$step" || :' USR1
# No torchrun: signals reach the ranks themselves, and theirs is the exit code. Rank 0 is on the first node, whatever
# the default of the cluster. A minute after the first rank ends the others are killed: where it has failed, they would
# wait for it.
srun "${options[@]}" --distribution=block --wait=60 --kill-on-bad-exit=0 python -m "clipq.cli.$command" "$@" &
step=$!
while heard=no code=0; wait "$step" || code=$?; [ "$heard" = yes ]; do :; done # ended by the trap, srun still runs
case "$code" in
    0) ;;
    75 | 138) # asked to end, and saved; 138: asked in the second before signals are handled, nothing done
        echo "asked to end: job $SLURM_JOB_ID queues itself again"
        scontrol requeue "$SLURM_JOB_ID"
        ;;
    *)
        echo "clipq-$command has failed with code $code on $SLURM_JOB_NODELIST"
        [ -z "${logs:-}" ] || tail -n 20 "$logs"*.log
        ;;
esac
exit "$code"
