//! The kernels' source, run on the host behind the stand-in driver, and compiled for devices.

use lacuna_cuda::{Compiler, Driver};

use crate::{Kernels, conformance};

#[test]
fn the_kernels_conform() {
    let library = lacuna_nccl_standin::path();
    let driver = Driver::load(Some(&library)).expect("the stand-in loads");
    let compiler = Compiler::load(Some(&library)).expect("the stand-in loads");
    let device = driver.device(0).expect("it has devices");
    conformance::run(&Kernels::compile(&device, &compiler).expect("it takes the source"));
}

/// The real compiler, where it is installed: needs no device.
#[test]
fn the_kernels_compile_for_all_supported_devices() {
    use lacuna_cuda::{Architecture, CompileError};
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../third_party");
    let fetched = std::path::Path::new(root).join("nvidia/cu13/lib/libnvrtc.so.13");
    let compiler = match Compiler::load(fetched.is_file().then_some(fetched.as_path())) {
        Ok(compiler) => compiler,
        Err(CompileError::Missing { tried }) if !fetched.is_file() => {
            return println!("skipped: no NVRTC here (`make setup` fetches one): {tried}");
        }
        Err(err) => panic!("{err}"),
    };
    for name in ["sm_80", "sm_90", "sm_90a", "sm_100"] {
        let architecture = Architecture::named(name);
        let cubin = compiler.compile("exact.cu", crate::SOURCE, &architecture);
        let cubin = cubin.unwrap_or_else(|err| panic!("{err}"));
        assert!(cubin.starts_with(b"\x7fELF"), "{name}: a cubin is an ELF file");
    }
    let error = compiler.compile("wrong.cu", "void f( {", &Architecture::named("sm_80"));
    let error = error.expect_err("it is not a source").to_string();
    assert!(error.contains("wrong.cu(1)"), "{error}");
}
