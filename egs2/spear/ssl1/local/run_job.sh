#!/usr/bin/env bash
# Run a command, or an array of jobs at once, on this machine, with a log for each.
# Fails if a job fails, and then shows the end of its log.
set -euo pipefail

help_message="Usage: $0 [--gpu N] [--num_threads N] [JOB=first:last] <log> <command>...
  --gpu 0          hides the GPUs from the command (else it sees all that are visible)
  --num_threads N  threads of numerical libraries per process of a job (OMP_NUM_THREADS)
  --num_nodes 1    this machine alone; more need cmd_backend=slurm (see cmd.sh)
JOB in the log's name and in the command is replaced by the job's number."

first=1
last=1
while [ $# -gt 0 ]; do
    case $1 in
    --gpu)
        [ "$2" -gt 0 ] || export CUDA_VISIBLE_DEVICES=
        shift 2
        ;;
    --num_threads)
        export OMP_NUM_THREADS=$2
        shift 2
        ;;
    --num_nodes)
        if [ "$2" -ne 1 ]; then
            echo "$0: --num_nodes $2: jobs run on this machine alone; with Slurm use cmd_backend=slurm (see cmd.sh)" >&2
            exit 2
        fi
        shift 2
        ;;
    JOB=*)
        first=${1#JOB=}
        last=${first#*:}
        first=${first%:*}
        shift
        ;;
    *) break ;;
    esac
done
if [ $# -lt 2 ] || [[ $1 == -* ]]; then
    echo "${help_message}" >&2
    exit 2
fi
log=$1
shift
command=$1

pids=()
# A training that is told to stop writes a checkpoint first. A second signal does not wait.
stop() {
    local status=143 pid signal=TERM
    # srun passes SIGUSR1 on to its tasks, and kills them when it gets SIGTERM.
    [ "${command}" != srun ] || signal=USR1
    trap - TERM INT
    # Some may have ended by themselves.
    if [ ${#pids[@]} -gt 0 ]; then kill -s "${signal}" "${pids[@]}" 2>/dev/null || true; fi
    for pid in "${pids[@]}"; do wait "${pid}" || status=$?; done
    exit "${status}"
}
trap stop TERM INT
for ((job = first; job <= last; job++)); do
    job_log=${log//JOB/${job}}
    mkdir -p "$(dirname "${job_log}")"
    {
        printf '# %s\n# started %s on %s\n' "${*//JOB/${job}}" "$(date)" "$(hostname)"
        exec "${@//JOB/${job}}"
    } >"${job_log}" 2>&1 </dev/null &
    pids+=($!)
done

failed=()
for ((job = first; job <= last; job++)); do
    wait "${pids[job - first]}" || failed+=("${job}")
done
if [ ${#failed[@]} -gt 0 ]; then
    job_log=${log//JOB/${failed[0]}}
    {
        tail -n 20 "${job_log}"
        echo "$0: ${#failed[@]} of $((last - first + 1)) jobs failed: ${failed[*]}; the end of ${job_log} is above"
    } >&2
    exit 1
fi
