#!/usr/bin/env bash
# Checks a GPU: golden values, equal bits, arithmetic, NCCL, first numbers, and a run that trains
# to the same bits twice, and by two trainers over NCCL of which one is killed. One JSON file and
# some logs are the result, after five minutes at most.
#
#   gpu_check.sh          build; run if this machine has a GPU, else say how to run it elsewhere
#   gpu_check.sh build    put all that a machine without Rust needs into target/gpu-check/
#   gpu_check.sh run      run it here; arguments go to `lacuna-worker gpu-check`
#   gpu_check.sh bench    as without a word, for the comparison with PyTorch (bench/gpu.py)
#   gpu_check.sh run-bench
#
# Running needs the CUDA libraries of torch 2.11.0: LIBTORCH=folder, or `make setup CUDA=1` in this
# checkout, or the `torch` of python3. OUT=folder says where the results go (default: here).
# DEVICES says what the run trains on (default: cuda:0).
# Exit codes of `run`: 0 all passed, 3 what was tried passed but not all could be tried, 78 this
# machine cannot run it, others something failed (124: it took too long). Those of `run-bench` are
# bench/gpu.py's: 3 is that nothing failed but time was too short for some of it.
set -euo pipefail

torch_version=2.11.0
# A guard against growth: with a checkout's files beside it, the folder still travels in 64 MiB.
bytes_max=$((54 * 1024 * 1024))
golden_files=(golden.json micro.{grads.f64,io,weights.f32}.safetensors
    rect.{io,weights.f32}.safetensors mid.{io,weights.f32}.safetensors)

# The exit code of what did not fail but is not all there.
not_all=3

# For `run`, all of it. The comparison has five minutes of its own.
seconds_max=300

# They would choose other kernels than those that are checked, or let NCCL wait for ever.
unset CUBLASLT_WORKSPACE_SIZE NCCL_COMM_BLOCKING NCCL_COMM_ID NVIDIA_TF32_OVERRIDE \
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_BLAS_PREFER_CUBLASLT TORCH_CUBLASLT_UNIFIED_WORKSPACE

self=$(realpath "${BASH_SOURCE[0]}")
here=$(dirname "$self")

say() { echo "gpu-check: $*" >&2; }

# Seconds that a command may take: those given, or what is left of all.
at_most() { # seconds
    local left=$((ends - SECONDS))
    [ "$left" -ge 1 ] || left=1
    echo $(($1 < left ? $1 : left))
}

has_time() {
    [ $((ends - SECONDS)) -ge 20 ] && return
    say "FAILED: no time is left of $seconds_max s for what comes now"
    return 1
}

build() {
    cd "$here/.."
    local target=${CARGO_TARGET_DIR:-target} folder file
    folder=$target/gpu-check
    make --no-print-directory build
    rm -rf "$folder"
    mkdir -p "$folder/golden"
    for file in lacuna lacuna-worker; do strip -o "$folder/$file" "$target/release/$file"; done
    for file in "${golden_files[@]}"; do cp "tests/golden/$file" "$folder/golden/"; done
    cp "$self" "$folder/gpu_check.sh"
    mkdir "$folder/bench"
    cp "$here"/bench/{gpu,gpu_pair,gpu_tables,pytorch_step,step}.py "$here/common.py" \
        "$folder/bench/"
    cat > "$folder/bench.sh" <<'RUN'
#!/usr/bin/env bash
exec "$(dirname "${BASH_SOURCE[0]}")/gpu_check.sh" run-bench "$@"
RUN
    cat > "$folder/run.sh" <<'RUN'
#!/usr/bin/env bash
exec "$(dirname "${BASH_SOURCE[0]}")/gpu_check.sh" run "$@"
RUN
    chmod +x "$folder/run.sh" "$folder/bench.sh"
    local n_bytes
    n_bytes=$(du --bytes --summarize "$folder" | cut -f1)
    if [ "$n_bytes" -ge "$bytes_max" ]; then
        say "$folder takes $n_bytes bytes; it must stay below $bytes_max"
        return 1
    fi
    say "$folder: $((n_bytes / 1024)) KiB;" \
        "needs $(newest_symbol GLIBC) and $(newest_symbol GLIBCXX)"
}

# The newest version of a system library's symbols that the binary asks for.
newest_symbol() { # prefix
    objdump -T "$folder/lacuna-worker" 2>/dev/null | grep -o "$1_[0-9.]*" | sort -Vu | tail -n 1 ||
        echo "$1 of unknown version"
}

# The folder of libtorch with the CUDA half: the user's, this checkout's, Python's.
find_libtorch() {
    if [ -n "${LIBTORCH:-}" ]; then
        echo "$LIBTORCH"
    elif [ -e "$here/../third_party/wheels/torch/lib/libtorch_cuda.so" ]; then
        realpath "$here/../third_party/wheels/torch"
    else
        # Finds the package without importing it, which would load the libraries.
        python3 - <<'PYTHON' 2>/dev/null || true
import importlib.util
print(importlib.util.find_spec("torch").submodule_search_locations[0])
PYTHON
    fi
}

check_libtorch() { # folder
    if [ -z "$1" ] || [ ! -e "$1/lib/libtorch_cpu.so" ]; then
        say "no libtorch${1:+ in $1}: set LIBTORCH to the folder of torch $torch_version" \
            "(it holds lib/libtorch_cuda.so), run \`make setup CUDA=1\` in a checkout," \
            "or install torch for python3"
        return 78
    fi
    local found
    found=$(cat "$1/build-version" 2>/dev/null ||
        sed -n "s/^__version__ = '\(.*\)'/\1/p" "$1/version.py" 2>/dev/null || true)
    if [ "${found%%+*}" != "$torch_version" ]; then
        say "$1 is libtorch ${found:-of unknown version}; $torch_version is wanted"
        return 78
    fi
}

# Finds what was built, `folder`, and the libraries that it needs, `torch`.
prepare() {
    folder=$here
    [ -e "$folder/lacuna-worker" ] || folder=$(realpath -m "$here/..")/target/gpu-check
    if [ ! -x "$folder/lacuna-worker" ]; then
        say "no $folder/lacuna-worker: run \`scripts/gpu_check.sh build\` first"
        return 78
    fi
    torch=$(find_libtorch)
    check_libtorch "$torch"
}

run_bench() {
    local folder torch out code=0
    prepare || return
    out=${OUT:-.}/gpu-bench.json
    mkdir -p "${OUT:-.}"
    LD_LIBRARY_PATH=$torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} LIBTORCH=$torch \
        python3 "$folder/bench/gpu.py" --worker "$folder/lacuna-worker" \
        --out "$out" "$@" || code=$?
    if [ "$code" = "$not_all" ]; then
        say "not complete (exit code $code), see above; what was measured is in $out"
    fi
    return "$code"
}

run() {
    local folder torch out code=0 ends=$((SECONDS + seconds_max)) untried=
    prepare || return
    out=${OUT:-.}/gpu-check.json
    mkdir -p "${OUT:-.}"
    say "libtorch of $torch"
    # One CPU thread, as trainers have; cuBLAS then keeps one workspace and with it one algorithm.
    LD_LIBRARY_PATH=$torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} LIBTORCH=$torch \
        OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 \
        timeout --kill-after 10 "$(at_most 180)" "$folder/lacuna-worker" gpu-check \
        --golden "$folder/golden" --out "$out" "$@" || code=$?
    # What failed above may be no matter to a run.
    if [ "$code" != 78 ]; then
        LD_LIBRARY_PATH=$torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} \
            train_again "$folder" "${OUT:-.}" || [ "$code" != 0 ] || code=1
    fi
    if [ "$code" = 0 ] && [ -n "$untried" ]; then
        say "passed, but not: $untried; the record is $out"
        return "$not_all"
    fi
    case $code in
        0) say "passed; the record is $out" ;;
        78) say "could not run" ;;
        124) say "FAILED: it took too long and was ended; what it did is in $out" ;;
        *) say "FAILED (exit code $code); the record is $out" ;;
    esac
    return "$code"
}

# Trains the same small run twice, in new processes, and once more by two trainers, of which one is
# killed; compares the digests of the states. Sets `untried` where it cannot do all of that.
train_again() { # folder, results
    local folder results work name code=0 digests=()
    folder=$(realpath "$1") results=$(realpath "$2") work=$(mktemp -d)
    (
        cd "$work"
        "$folder/lacuna" data synthetic data --n 512 --size 28x28 --channels 1 --seed 1
        "$folder/lacuna" init --preset demo --name first --data data
    ) > "$results/train-setup.log" 2>&1 || { say "FAILED: $results/train-setup.log"; return 1; }
    local device=${DEVICES:-cuda:0}
    device=${device%%,*}
    local length=(--set 'train.duration="80step"' --set train.batch=32 --set train.slot_batch=8)
    for name in first second; do
        has_time || return 1
        (
            cd "$work"
            LACUNA_WORKER=$folder/lacuna-worker \
                timeout --kill-after 10 "$(at_most 60)" "$folder/lacuna" train run.toml \
                --devices "${DEVICES:-cuda:0}" --set name="$name" "${length[@]}"
        ) > "$results/train-$name.log" 2>&1 || code=$?
        # The workers' log says why, where one failed.
        cp "$work/runs/$name/logs/workers.log" "$results/train-$name-workers.log" || true
        if [ "$code" != 0 ]; then
            say "FAILED: $results/train-$name.log"
            return 1
        fi
        digests+=("$(grep -o 'state digest [0-9a-f]*' "$results/train-$name.log" | tail -n 1)")
    done
    if [ -z "${digests[0]}" ] || [ "${digests[0]}" != "${digests[1]}" ]; then
        say "FAILED: two runs gave '${digests[0]}' and '${digests[1]}'"
        return 1
    fi
    say "trained twice on ${DEVICES:-cuda:0}: ${digests[0]}"
    length+=(--set track.every=10step)
    if ! command -v python3 > /dev/null; then
        rm -rf "$work"
        untried="two trainers over NCCL, of which one is killed (there is no python3)"
        return
    fi
    has_time || return 1
    timeout --kill-after 10 "$(at_most 90)" python3 "$folder/bench/gpu_pair.py" \
        --bin "$folder" --work "$work" --log "$results" --device "$device" \
        --want "${digests[0]##* }" "${length[@]}" > "$results/train-pair.log" 2>&1 || code=$?
    rm -rf "$work"
    tail -n 1 "$results/train-pair.log" >&2
    if [ "$code" != 0 ]; then
        say "FAILED: $results/train-pair.log"
        return 1
    fi
}

has_gpu() { [ -e /dev/nvidia0 ] || nvidia-smi --list-gpus >/dev/null 2>&1; }

check() {
    if [ -z "${LIBTORCH:-}" ] && [ ! -e "$here/../third_party/libtorch/build-version" ]; then
        echo "gpu-check: skipped: no libtorch to build with (make setup)"
        return
    fi
    build
    if has_gpu; then
        "$1"
        return
    fi
    local script=run.sh
    [ "$1" = run ] || script=bench.sh
    cat <<EOT
gpu-check: skipped: no GPU here. To run it on a machine that has one, with torch $torch_version for
  python3 or LIBTORCH set (Rust is not needed there), copy the folder and start it:
    scp -r ${CARGO_TARGET_DIR:-target}/gpu-check HOST: && ssh HOST gpu-check/$script
EOT
}

case ${1:-check} in
    check) check run ;;
    bench) check run_bench ;;
    build) build ;;
    run-bench) shift; run_bench "$@" ;;
    run) shift; run "$@" ;;
    *) say "unknown mode \`$1\`: build, run, bench or run-bench"; exit 2 ;;
esac
