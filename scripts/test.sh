#!/usr/bin/env bash
# Runs the test lanes and prints at the end how long each took, and what was skipped and why.
# Every lane runs, whatever failed before it; the exit code is 1 if any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

summary=()
failed=0

lane() { # name, command...
    local name=$1 start=$SECONDS word=passed
    shift
    echo "== lane $name: $*"
    "$@" || { word=FAILED; failed=1; }
    summary+=("$(printf '%-8s %-8s %4d s' "$name" "$word" $((SECONDS - start)))")
}

skip() { # name, reason
    summary+=("$(printf '%-8s %-8s %s' "$1" skipped "$2")")
}

# One selection of crates for everything: cargo chooses the features of dependencies by it, and
# another one would compile half of them again.
crates=(--workspace)
features=()
if [ -z "${LIBTORCH:-}" ] && [ ! -e third_party/libtorch/build-version ]; then
    crates+=(--exclude lacuna-mae)
fi
if [ -e third_party/features ]; then
    read -ra features < third_party/features
    PATH=$PWD/third_party/tools/bin:$PATH
fi

rust_lane() {
    # Process tests start binaries of other crates, which building the tests alone does not build.
    # Both at once: without tests, dependencies would have other features and be compiled twice.
    cargo build "${crates[@]}" "${features[@]}" --bins --tests || return
    # One thread: the bits of libtorch's results depend on the number of threads, and OpenMP's
    # spinning starves a machine that runs several workers.
    OMP_NUM_THREADS=1 cargo test "${crates[@]}" "${features[@]}" --no-fail-fast
}

lane rust rust_lane
if [ -z "${LACUNA_PEERS_PYTHON:-}" ] && [ -x third_party/peers/bin/python ]; then
    export LACUNA_PEERS_PYTHON=$PWD/third_party/peers/bin/python
fi
# The programs that the other lane built, and not older ones.
export LACUNA_BIN=${LACUNA_BIN:-$PWD/target/debug}
# After the other: some of them run the programs that it built.
lane scripts python3 -m unittest discover --start-directory scripts --pattern '*_test.py'
if [ ${#crates[@]} -eq 1 ]; then
    : # libtorch is there, and its crate among the others
elif [ -n "${CI:-}" ]; then
    echo "test: no libtorch, which CI must have (make setup)" >&2
    summary+=("torch    FAILED   no libtorch (make setup)")
    failed=1
else
    skip torch "no libtorch (make setup)"
fi
if [[ "${features[*]}" != *turbo* ]]; then
    skip turbo "no libjpeg-turbo, JPEG is decoded in Rust (make setup)"
fi
if [ -z "${LACUNA_PEERS_PYTHON:-}" ]; then
    skip peers "tests of grpcurl, buf, a Python client, TensorBoard: no environment (make peers)"
fi
if ! "${LACUNA_PEERS_PYTHON:-false}" -c "import torch, timm, transformers" 2> /dev/null; then
    skip timm "features and weights beside timm and transformers (docs/weights.md says how)"
fi
etcd=${LACUNA_ETCD:-third_party/tools/bin/etcd}
if [ ! -x "$etcd" ] && ! command -v etcd > /dev/null; then
    skip etcd "tests of several coordinators: no etcd (make peers)"
fi
if [ "${LACUNA_GPU_TESTS:-}" = 1 ]; then
    skip gpu "its tests ran inside the other lanes (LACUNA_GPU_TESTS=1)"
else
    skip gpu "needs a GPU (make gpu-check)"
fi

echo
echo "lanes:"
printf '  %s\n' "${summary[@]}"
exit $failed
