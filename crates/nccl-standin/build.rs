//! Compiles the device's kernels for the host.

fn main() {
    println!("cargo::rerun-if-changed=host/kernels.c");
    println!("cargo::rerun-if-changed=../device/kernels/exact.cu");
    cc::Build::new()
        .file("host/kernels.c")
        .opt_level(2)
        // One rounding for each operation, as on the device.
        .flag("-ffp-contract=off")
        // A device refuses what lies at no multiple of its size; a processor would not mind.
        .flag("-fsanitize=alignment")
        .flag("-fsanitize-undefined-trap-on-error")
        .warnings(false)
        .compile("lacuna_standin_kernels");
}
