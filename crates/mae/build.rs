//! Points the loader at libtorch: binaries, examples and tests of this crate find it without
//! `LD_LIBRARY_PATH`.
//!
//! Only `torch_cpu` and `c10` are linked (by torch-sys, which links what the folder `$LIBTORCH/lib`
//! shows), so one binary serves machines with and without CUDA.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-changed=build.rs");
    let Some(root) = std::env::var_os("LIBTORCH").map(PathBuf::from) else {
        println!("cargo::error=LIBTORCH is not set and libtorch is needed here; run `make setup`");
        return;
    };
    let library = root.join("lib").join("libtorch_cpu.so");
    // `$LIBTORCH` may be a view made of links. The loader must search the folder of the real files,
    // because libtorch finds its own needs relative to it.
    let Ok(real) = library.canonicalize() else {
        let library = library.display();
        println!("cargo::error=libtorch is missing: no file `{library}`; run `make setup`");
        return;
    };
    println!("cargo::rerun-if-changed={}", library.display());
    if let Some(folder) = real.parent() {
        // First where `make install` puts it, beside the program.
        println!("cargo::rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib/lacuna/torch/lib");
        println!("cargo::rustc-link-arg=-Wl,-rpath,{}", folder.display());
        println!("cargo::metadata=folder={}", folder.display());
    }
    compile_shim(&root);
    println!("cargo::rustc-env=LACUNA_LIBTORCH_VERSION={}", version(&root));
}

/// Compiles the C++ that reaches what tch does not offer.
fn compile_shim(root: &Path) {
    println!("cargo::rerun-if-changed=shim");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .pic(true)
        // A few calls a process: optimising the headers would only take time.
        .opt_level(0)
        .debug(false)
        // Of libtorch's headers, not ours.
        .warnings(false)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .include(root.join("include"))
        .file("shim/autograd.cpp")
        .file("shim/context.cpp")
        .compile("lacuna_torch_shim");
}

/// Reads `2.11.0+cpu` of the file `build-version`; a libtorch without the file is called `unknown`.
fn version(root: &Path) -> String {
    let file = root.join("build-version");
    println!("cargo::rerun-if-changed={}", file.display());
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let version = text.trim();
    if version.is_empty() { "unknown".to_string() } else { version.to_string() }
}
