use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::{CudaError, find_mapping, loaded, nvrtc_near, open_library, places};
use crate::context::cuda_version;

#[test]
fn the_library_is_looked_for_beside_the_cpu_half_first() {
    let cpu = || Some(PathBuf::from("/a/lib/libtorch_cpu.so"));
    let own = |root: &str| Some(OsString::from(root));
    let shown = |places: Vec<PathBuf>| {
        places.iter().map(|path| path.display().to_string()).collect::<Vec<String>>()
    };
    let (beside, other) = ("/a/lib/libtorch_cuda.so", "/b/lib/libtorch_cuda.so");
    assert_eq!(shown(places(cpu(), own("/b"))), [beside, other]);
    assert_eq!(shown(places(cpu(), own("/a"))), [beside]);
    assert_eq!(shown(places(None, own("/b"))), [other]);
    assert!(places(None, None).is_empty());
}

#[test]
fn nvrtc_is_found_in_every_package_of_libtorch() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "").unwrap();
        path
    };
    let torch = make("torch/lib/libtorch_cpu.so");
    make("torch/lib/libnvrtc-builtins-0a1b2c3d.so.13.0");
    make("torch/lib/libnvrtc-0a1b2c3d.alt.so.13");
    assert_eq!(nvrtc_near(&torch), None);
    let packed = make("torch/lib/libnvrtc-0a1b2c3d.so.13");
    assert_eq!(nvrtc_near(&torch), Some(packed));
    let wheel = make("nvidia/cu13/lib/libnvrtc.so.13");
    assert_eq!(nvrtc_near(&torch), Some(wheel));
}

#[test]
fn mappings_name_loaded_libraries() {
    let maps = "\
7f00-7f01 r--p 00000000 fe:00 12   /opt/my torch/lib/libtorch_cpu.so
7f02-7f03 rw-p 00000000 00:00 0
7f04-7f05 r-xp 00001000 fe:00 13   /opt/lib/libc.so.6
7f06-7f07 rw-p 00000000 00:00 0    [stack]
";
    let found = find_mapping(maps, "libtorch_cpu.so");
    assert_eq!(found.as_deref(), Some(Path::new("/opt/my torch/lib/libtorch_cpu.so")));
    assert_eq!(find_mapping(maps, "libtorch_cuda.so"), None);
    tch::set_num_threads(1);
    assert!(loaded("libtorch_cpu.so").is_some(), "this process computes with it");
}

#[test]
fn a_file_that_is_no_library_is_broken_and_not_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("libtorch_cuda.so");
    std::fs::write(&path, "text").unwrap();
    match open_library(&[dir.path().join("nowhere"), path.clone()]) {
        Err(CudaError::LibraryBroken { path: named, .. }) => {
            assert_eq!(named, path.display().to_string());
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn versions_are_read_as_people_write_them() {
    assert_eq!(cuda_version(13000), "13.0");
    assert_eq!(cuda_version(12040), "12.4");
}

#[test]
fn what_the_driver_says_is_said_once() {
    let hidden = lacuna_cuda::CudaError::NoDevice { visible: "`-1`".to_string() };
    let text = lacuna_checkpoint::chain(&CudaError::from(hidden));
    assert_eq!(text, "the NVIDIA driver shows no device (CUDA_VISIBLE_DEVICES is `-1`)");
}
