# How jobs are run; sourced by run.sh. Choose with cmd_backend=local|slurm ./run.sh ...
# A command is called as ${train_cmd} [--gpu N] [--num_threads N] [JOB=1:n] LOG command...
# with JOB in the log's name and in the command standing for the number of the job.
# shellcheck shell=bash disable=SC2034

cmd_backend=${cmd_backend:-local}

case ${cmd_backend} in
local)
    # All jobs of an array at once on this machine.
    train_cmd=../ssl1/local/run_job.sh
    cuda_cmd=../ssl1/local/run_job.sh
    ;;
slurm)
    # sbatch is given these options besides; e.g. --partition=gpu --time=24:00:00
    train_cmd="../ssl1/local/slurm_job.sh ${slurm_cpu_opts:-}"
    cuda_cmd="../ssl1/local/slurm_job.sh ${slurm_gpu_opts:-}"
    ;;
*)
    echo "cmd.sh: cmd_backend must be local or slurm, not '${cmd_backend}'" >&2
    exit 2
    ;;
esac
