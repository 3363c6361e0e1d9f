#!/usr/bin/env bash
# Puts what `make setup` built into a folder that can be copied to other machines: programs, and
# beside them the libtorch that they find there, wherever the folder lies.
#
#   scripts/install.sh PREFIX          # bin/lacuna, bin/lacuna-worker, lib/lacuna/
set -euo pipefail
prefix=${1:?"say where: scripts/install.sh PREFIX"}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

built=${CARGO_TARGET_DIR:-target}/release
libraries=$prefix/lib/lacuna
torch=$(realpath "${LIBTORCH:-third_party/libtorch}/lib/libtorch_cpu.so")
torch=${torch%/*}

mkdir -p "$prefix/bin" "$libraries/torch/lib"
for program in lacuna lacuna-worker; do
    strip -o "$prefix/bin/$program" "$built/$program"
done
cp --update "$torch"/*.so* "$libraries/torch/lib/"
# Libraries that libtorch finds beside its own folder, as in a site-packages.
if [ -d "$torch/../../nvidia" ]; then
    (cd "$torch/../.." && find nvidia -name '*.so*' -print0 |
        tar --create --null --files-from -) | tar --extract --directory "$libraries"
fi

# Whatever the worker needs of libtorch must come from the folder.
elsewhere=$(ldd "$prefix/bin/lacuna-worker" | grep -E 'torch|nvidia|libc10|libgomp' |
    grep -vF "$(realpath "$prefix")" || true)
if [ -n "$elsewhere" ]; then
    echo "install: these do not come from $prefix:" >&2
    echo "$elsewhere" >&2
    exit 1
fi
"$prefix/bin/lacuna-worker" --version
echo "install: $prefix, $(du --human-readable --summarize "$prefix" | cut -f1)"
