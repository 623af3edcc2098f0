# What the run.sh of all recipes begin with, after their options got defaults: reads the
# options (parse_options.sh), and has functions for stages, steps and locks. To be sourced
# with the arguments of run.sh in the recipe's folder, where there is the function log.
# shellcheck shell=bash disable=SC2154
: "${help_message:?}"
# shellcheck source=parse_options.sh
. ../ssl1/local/parse_options.sh
if [ $# -gt 0 ]; then
    log "ERROR: unexpected argument '$1' (see --help)"
    exit 2
fi

# wanted <stage>: is it to be run?
wanted() { [ "${stage}" -le "$1" ] && [ "${stop_stage}" -ge "$1" ]; }

# step <options of step.py> -- <command>: run it unless it was done before
step() { python ../ssl1/local/step.py --dry_run "${dry_run}" "$@"; }

lock_fd=

# lock <folder>: what writes there does so alone; held until unlock, the next lock or the
# end, also by what a killed run.sh left running.
lock() {
    [ "${dry_run}" = false ] || return 0
    unlock
    mkdir -p "$1"
    exec {lock_fd}>>"$1/.lock"
    local status=0
    flock --nonblock --conflict-exit-code 99 "${lock_fd}" || status=$?
    if [ "${status}" -eq 99 ]; then
        log "ERROR: another run works in $1 ($(tail -n 1 "$1/.lock")); wait for it, stop it, or choose other folders or another tag (see --help)"
        exit 1
    elif [ "${status}" -ne 0 ]; then
        log "ERROR: $1 cannot be locked (see above); its file system has to be mounted with locks (Lustre: flock)"
        exit 1
    fi
    echo "$(hostname), process $$, since $(date)" >"$1/.lock"
}

unlock() {
    [ -n "${lock_fd}" ] || return 0
    exec {lock_fd}>&-
    lock_fd=
}

# count_gpus: sets ngpu to the number that torch sees, unless it was given
count_gpus() {
    [ -n "${ngpu}" ] || ngpu=$(python -c "import torch; print(torch.cuda.device_count())")
}

# quoted <text>: one word for step, which reads words as sh does; in any locale, where
# printf %q writes letters beyond ASCII in a way that only bash knows
quoted() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

# train_runner <gpus> <machines> <cores> <log>: words for step --runner
train_runner() {
    echo "${cuda_cmd} --gpu $1 --num_nodes $2 --num_threads $3 $(quoted "$4")" \
        "env OMP_NUM_THREADS=${OMP_NUM_THREADS}"
}

# launch_options <folder>: sets launch, how a training in it is started
launch_options() {
    launch=(--ngpu "${ngpu}" --multiprocessing_distributed true --resume true)
    if [ "${num_nodes}" -gt 1 ]; then
        launch+=(--dist_launcher slurm
            --dist_init_method "file://$(realpath -m "$1")/.dist_init.$$.$(date +%s)")
    fi
}

# check_training <task> <model to be used later> <folder> <options of the training>: what it
# would refuse stops the run here, before hours are spent on data
check_training() {
    local opts=(--task "$1" --inference_model "$2" --exp_dir "$3")
    shift 3
    python ../ssl1/local/check_training.py "${opts[@]}" -- --output_dir unused "$@"
}

# prepare_corpus <set> <corpus> <parts> <options of spear_filter>: from a corpus of db.sh
# to dump/raw/<set>
prepare_corpus() {
    local corpus=$2 source=${datadir}/local/$1 org=${dumpdir}/raw/org/$1
    local raw=${dumpdir}/raw/$1 parts
    read -ra parts <<<"${3//,/ }"
    shift 3
    [ "${partial}" = false ] || parts+=(--partial)
    # In a shell of its own: the folders of corpora are exported there.
    (
        # shellcheck disable=SC1091
        . ../ssl1/db.sh
        root=${corpus^^} # name of the variable that holds the folder
        input=()
        [ ! -e "${!root:-}" ] || input=(--source "${!root}")
        step --mark "${source}/.done.json" "${input[@]}" --output "${source}/wav.scp" \
            -- python "../ssl1/local/data_${corpus}.py" --root "${!root:-}" \
            --out_dir "${source}" --parts "${parts[@]}"
    )
    step --mark "${org}/.done.json" --input "${source}" --input "${source}/.done.json" \
        --output "${org}/wav.scp" \
        -- python -m espnet2_spear.bin.spear_format --in_dir "${source}" \
        --out_dir "${org}" + --nj "${nj}"
    step --mark "${raw}/.done.json" --input "${org}" --output "${raw}/wav.scp" \
        --output "${raw}/feats_type" \
        -- python -m espnet2_spear.bin.spear_filter --in_dir "${org}" \
        --out_dir "${raw}" "$@"
}
