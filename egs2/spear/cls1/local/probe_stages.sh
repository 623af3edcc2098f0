# Stages 2 to 4 of a probe: format, features, table. To be sourced by run.sh, which sets
# the options, `source` (data directory with labels and, if it has them, groups and
# splits) and `min_seconds`, and has the functions log, lock, step and wanted.
# shellcheck shell=bash disable=SC2154

raw=${dumpdir}/raw/$(basename "${source}")

if wanted 2; then
    log "Stage 2: format and filter"
    lock "${raw}"
    step --mark "${raw}_org/.done.json" --input "${source}" --output "${raw}_org/wav.scp" \
        -- python -m espnet2_spear.bin.spear_format --in_dir "${source}" \
        --out_dir "${raw}_org" + --nj "${nj}"
    # Only silence and clicks are left out.
    step --mark "${raw}/.done.json" --input "${raw}_org" --output "${raw}/wav.scp" \
        -- python -m espnet2_spear.bin.spear_filter --in_dir "${raw}_org" \
        --out_dir "${raw}" --min_seconds "${min_seconds}" --max_seconds inf
    unlock
fi

if [ "${stop_stage}" -ge 3 ]; then lock "${exp}"; fi

# features <name> <checkpoint or YAML, or empty> <options of features.py>
features() {
    local name=$1 inputs=()
    [ -z "$2" ] || inputs=(--input "$2")
    shift 2
    log "features: ${name}"
    step --mark "${exp}/features/${name}.json" --input "${raw}/wav.scp" "${inputs[@]}" \
        --output "${exp}/features/${name}.npz" -- python local/features.py \
        --wav_scp "${raw}/wav.scp" --output "${exp}/features/${name}.npz" "$@" \
        + --device "${device}"
}

tables=("log-mel=${exp}/features/logmel.npz"
    "student, random weights=${exp}/features/random_s{seed}.npz"
    "student, pre-trained=${exp}/features/student.npz")
if wanted 3; then
    log "Stage 3: features"
    features logmel "" --system logmel
    for seed in ${seeds}; do
        features "random_s${seed}" "${ckpt}" --system random --path "${ckpt}" --seed "${seed}"
    done
    features student "${ckpt}" --system student --path "${ckpt}"
fi
for teacher in ${teachers}; do
    name=${teacher%%=*}
    tables+=("teacher ${name}=${exp}/features/${name}.npz")
    if wanted 3; then features "${name}" "${teacher#*=}" --system teacher --path "${teacher#*=}"; fi
done

if wanted 4; then
    log "Stage 4: probes"
    inputs=(--input "${source}/labels")
    tables_of=()
    for table in groups splits; do # of own data
        [ -e "${source}/${table}" ] || continue
        tables_of+=("--${table}" "${source}/${table}")
        inputs+=(--input "${source}/${table}")
    done
    for file in "${exp}"/features/*.npz; do inputs+=(--input "${file}"); done
    # shellcheck disable=SC2086
    step --mark "${exp}/probe.json" "${inputs[@]}" --output "${exp}/RESULTS.md" \
        -- python local/probe.py --labels "${source}/labels" "${tables_of[@]}" \
        --seeds ${seeds} --output "${exp}/RESULTS.md" --features "${tables[@]}"
fi
