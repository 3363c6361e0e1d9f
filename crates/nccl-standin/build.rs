//! Compiles the device's kernels for the host.

fn main() {
    println!("cargo::rerun-if-changed=host/kernels.c");
    println!("cargo::rerun-if-changed=../device/kernels/exact.cu");
    cc::Build::new()
        .file("host/kernels.c")
        .opt_level(2)
        // One rounding for each operation, as on the device.
        .flag("-ffp-contract=off")
        .warnings(false)
        .compile("lacuna_standin_kernels");
}
