#!/usr/bin/env bash
# Run a command, or an array of jobs, by Slurm, and wait until all are done.
# Takes the arguments of local/run_job.sh, and before them options of sbatch. With
# --num_nodes above 1 the command is started by srun, once on each node.
set -euo pipefail

# Not requeued after a node failed: its ranks would meet the rendezvous file of the first
# start. The same command of run.sh goes on from the last checkpoint.
sbatch_opts=(--wait --no-requeue --job-name=spear)
job_opts=()
array=1:1
num_nodes=1
launcher_opts=(--export=ALL)
while [ $# -gt 0 ]; do
    case $1 in
    --gpu)
        [ "$2" -eq 0 ] || sbatch_opts+=("--gres=gpu:$2")
        job_opts+=(--gpu "$2")
        shift 2
        ;;
    --num_threads)
        sbatch_opts+=("--cpus-per-task=$2")
        # Of sbatch alone srun has not known it since Slurm 22.05.
        launcher_opts+=("--cpus-per-task=$2")
        job_opts+=(--num_threads "$2")
        shift 2
        ;;
    --num_nodes)
        num_nodes=$2
        shift 2
        ;;
    --*)
        sbatch_opts+=("$1")
        shift
        ;;
    JOB=*)
        array=${1#JOB=}
        shift
        ;;
    *) break ;;
    esac
done
if [ $# -lt 2 ]; then
    echo "Usage: $0 [sbatch options] [--gpu N] [--num_threads N] [JOB=first:last] <log> <command>..." >&2
    exit 2
fi
log=$1
shift
launcher=()
if [ "${num_nodes}" -gt 1 ]; then
    sbatch_opts+=("--nodes=${num_nodes}" --ntasks-per-node=1)
    launcher=(srun --kill-on-bad-exit=1 "${launcher_opts[@]}")
fi
mkdir -p "$(dirname "${log}")"
script=${log//JOB/all}.sbatch
{
    echo "#!/usr/bin/env bash"
    printf 'cd %q\n' "${PWD}"
    printf 'exec %q ' "$(dirname "$0")/run_job.sh"
    # shellcheck disable=SC2016  # expanded on the node
    printf '%s JOB="${SLURM_ARRAY_TASK_ID}:${SLURM_ARRAY_TASK_ID}"' \
        "${job_opts[*]}"
    printf ' %q' "${log}" "${launcher[@]}" "$@"
    echo
} >"${script}"
submitted=${script%.sbatch}.submitted
# The locks of folders end with run.sh: a job that goes on would meet the next one there.
# It gets SIGTERM, and a training writes a checkpoint.
cancel() {
    trap - INT TERM HUP
    [ -n "${!-}" ] || exit 143 # nothing has been submitted
    scancel "$(grep -oE '[0-9]+' "${submitted}" | tail -n 1)" || true
    wait "$!" || true # until the job has ended
    exit 143
}
trap cancel INT TERM HUP
sbatch "${sbatch_opts[@]}" --array="${array/:/-}" \
    --output="${log//JOB/all}.slurm-%a" "${script}" >"${submitted}" &
if ! wait "$!"; then
    echo "$0: sbatch or a job failed; see ${log//JOB/'<job>'}" >&2
    exit 1
fi
