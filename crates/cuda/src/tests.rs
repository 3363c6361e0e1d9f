use std::path::Path;
use std::time::{Duration, Instant};

use crate::driver::kernel_version;
use crate::{CudaError, Device, DeviceBuffer, Driver, Event, PinnedBuffer, Stream};

fn device() -> Device {
    let driver = Driver::load(Some(&lacuna_nccl_standin::path())).expect("the stand-in loads");
    driver.device(1).expect("the stand-in has devices")
}

fn wait(event: &Event) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !event.is_done().expect("nothing fails") {
        assert!(Instant::now() < deadline, "the stream does not come to the mark");
        std::thread::yield_now();
    }
}

#[test]
fn bytes_go_to_the_device_and_back_in_order() {
    let device = device();
    let (stream, event) = (Stream::new(&device).unwrap(), Event::new(&device).unwrap());
    assert!(event.is_done().unwrap(), "an event that was never recorded is done");
    let mut there = PinnedBuffer::new(&device, 1000).unwrap();
    let mut back = PinnedBuffer::new(&device, 1000).unwrap();
    let mut buffer = DeviceBuffer::new(&device, 1000).unwrap();
    there.bytes_mut().iter_mut().enumerate().for_each(|(idx, byte)| *byte = idx as u8);
    // SAFETY: the buffers outlive the wait below, and nothing else touches them.
    unsafe {
        buffer.load(&there, 1000, &stream).unwrap();
        buffer.store(&mut back, 600, &stream).unwrap();
    }
    event.record(&stream).unwrap();
    wait(&event);
    assert!(stream.is_idle().unwrap());
    assert_eq!(back.bytes()[..600], there.bytes()[..600]);
    assert!(back.bytes()[600..].iter().all(|byte| *byte == 0), "pinned memory starts as zeros");
}

#[test]
fn a_stream_waits_for_another() {
    let device = device();
    let (first, second) = (Stream::new(&device).unwrap(), Stream::new(&device).unwrap());
    let (before, after) = (Event::new(&device).unwrap(), Event::new(&device).unwrap());
    before.record(&first).unwrap();
    second.wait_for(&before).unwrap();
    after.record(&second).unwrap();
    wait(&after);
    assert!(before.is_done().unwrap());
}

#[test]
fn a_machine_without_a_driver_is_told_so() {
    let nowhere = Path::new("/nowhere/libcuda.so.1");
    let error = Driver::load(Some(nowhere)).expect_err("nothing is there");
    assert!(matches!(error, CudaError::DriverMissing { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.starts_with("no NVIDIA driver: /nowhere/libcuda.so.1"), "{text}");
}

#[test]
fn a_library_without_the_functions_is_too_old() {
    let libc = Path::new("libc.so.6");
    let error = Driver::load(Some(libc)).expect_err("the C library is not a driver");
    let expected = "the NVIDIA driver in `libc.so.6` is too old: it has no `cuInit`";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn devices_are_described_and_numbered_from_zero() {
    let driver = Driver::load(Some(&lacuna_nccl_standin::path())).unwrap();
    let devices = driver.devices().unwrap();
    assert_eq!(devices.len(), 64);
    assert_eq!((devices[0].name.as_str(), devices[0].capability), ("stand-in", (9, 0)));
    assert_eq!(devices[0].capability_text(), "9.0");
    assert_eq!(driver.version().unwrap().cuda, "13.0");
    let error = driver.device(64).expect_err("there are 64");
    assert_eq!(error.to_string(), "there is no CUDA device 64: the driver shows 64");
}

#[test]
fn memory_that_does_not_fit_is_refused_and_nothing_else_suffers() {
    let device = device();
    let (_, total) = device.memory().unwrap();
    let error = DeviceBuffer::new(&device, total + 1).expect_err("it does not fit");
    assert!(error.is_out_of_memory() && !error.is_sticky(), "{error}");
    let text = "`cuMemAlloc` failed: out of memory (CUDA_ERROR_OUT_OF_MEMORY, 2)";
    assert_eq!(error.to_string(), text);
    DeviceBuffer::new(&device, 0).expect("nothing is a size");
}

#[test]
fn faults_of_the_device_are_told_from_others() {
    let call =
        |code| CudaError::Call { call: "cuEventQuery", name: "".into(), text: "".into(), code };
    assert!(call(700).is_sticky() && call(719).is_sticky());
    assert!(!call(2).is_sticky() && !call(201).is_sticky());
}

#[test]
fn versions_of_the_kernel_module_are_found() {
    let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build";
    let closed =
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC 12.2.0";
    assert_eq!(kernel_version(open).as_deref(), Some("580.65.06"));
    assert_eq!(kernel_version(closed).as_deref(), Some("550.54.15"));
    assert_eq!(kernel_version(""), None);
}
