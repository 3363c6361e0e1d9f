//! What is said where NCCL is missing, old, or lacks something.

use std::path::Path;
use std::time::Instant;

use super::{library, on_each};
use crate::{
    Capabilities, CommConfig, Communicator, Library, LoadError, NcclError, Origin, Progress,
    ResultCode, Seat, StartError, Version,
};

#[test]
fn versions_are_read_from_their_codes() {
    assert_eq!(Version::from_code(22809).to_string(), "2.28.9");
    assert_eq!(Version::from_code(2708).to_string(), "2.7.8");
    assert!(Version::from_code(23007) > Version::from_code(22809));
}

#[test]
fn the_library_says_what_it_is_and_can() {
    let library = library();
    assert_eq!(library.version().to_string(), "2.28.9");
    assert_eq!(*library.origin(), Origin::File(lacuna_nccl_standin::path()));
    // It has the symbols of newer versions too: here their names are checked.
    let expected = Capabilities { shrink: true, revoke: true, grow: true };
    assert_eq!(library.capabilities(), expected);
}

#[test]
fn what_a_library_lacks_is_an_error_when_it_is_called() {
    let library = library().without_options();
    let expected = Capabilities { shrink: false, revoke: false, grow: false };
    assert_eq!(library.capabilities(), expected);
    let id = super::draw(&library);
    let me = super::Rank::start(&library, &id, 1, 0).unwrap().ready().unwrap();
    let error = me.comm.revoke().expect_err("it is not there");
    assert!(matches!(error, NcclError::Unsupported { .. }), "{error:?}");
    assert_eq!(error.to_string(), "NCCL 2.28.9 has no `ncclCommRevoke`");
}

/// NVIDIA's own library, as far as it goes without a device; `make setup CUDA=1` fetches it.
#[test]
fn the_true_library_is_understood() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../third_party");
    let fetched = Path::new(root).join("wheels/nvidia/nccl/lib/libnccl.so.2");
    if !fetched.is_file() {
        return println!("skipped: no NCCL here (`make setup CUDA=1` fetches one)");
    }
    let library = Library::open(&fetched).expect("it has all that is needed");
    let (version, found) = (library.version(), library.capabilities());
    let since = |code| version >= Version::from_code(code);
    let expected = Capabilities { shrink: since(22700), revoke: since(22807), grow: since(22900) };
    assert_eq!(found, expected, "{version}");
    let end = || Instant::now() + super::PATIENT;
    let id = library.unique_id(end(), || false).expect("loopback works");
    if Path::new("/dev/nvidiactl").exists() {
        return println!("skipped: starting without a device, since there is one");
    }
    let (seat, config) = (Seat { id, world: 1, rank: 0 }, CommConfig::default());
    let enter = || Ok::<(), std::io::Error>(());
    let started = Communicator::start(&library, seat, config, enter, end(), || false);
    let Err(StartError::Nccl(error)) = started else { panic!("{started:?}") };
    println!("NCCL {version} without a device: {error}");
    assert!(matches!(error, NcclError::Call { .. }), "{error:?}");
    assert_eq!(error.code(), Some(ResultCode::UnhandledCudaError), "{error}");
}

#[test]
fn a_missing_library_is_looked_for_everywhere() {
    let error = match Library::find(Some(Path::new("/nowhere/libnccl.so"))) {
        Ok(library) => return println!("skipped: this machine has {library:?}"),
        Err(error) => error,
    };
    let text = error.to_string();
    assert!(matches!(error, LoadError::Missing { .. }), "{error:?}");
    for place in ["not in this process", "libnccl.so.2", "/nowhere/libnccl.so"] {
        assert!(text.contains(place), "{text}");
    }
}

#[test]
fn a_library_that_is_found_by_its_path_comes_last() {
    let library = Library::find(Some(&lacuna_nccl_standin::path())).expect("it is there");
    if *library.origin() != Origin::File(lacuna_nccl_standin::path()) {
        println!("skipped: this machine has {library:?}");
    }
}

#[test]
fn another_library_is_no_nccl() {
    let error = Library::open(Path::new("libc.so.6")).expect_err("the C library is not NCCL");
    let expected = "the NCCL in `libc.so.6` has no `ncclGetVersion`: version 2.18.0 or newer is \
                    needed";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_newer_function_is_called_where_the_library_has_it() {
    on_each(1, |library, id, rank| {
        let me = super::Rank::start(library, id, 1, rank).unwrap().ready().unwrap();
        assert_eq!(me.comm.revoke(), Ok(Progress::Going), "it is there");
        me.comm.wait(Instant::now() + super::PATIENT, || false).expect("it comes to its end");
        let invalid = Some(ResultCode::InvalidUsage);
        assert_eq!(super::sum(&me).expect_err("it is revoked").code(), invalid);
        me.comm.aborter().abort(super::PATIENT).expect("it can be freed");
    });
}

#[test]
fn no_device_is_an_error_and_not_a_crash() {
    let library = library();
    let id = super::draw(&library);
    // Nothing makes a device current.
    let (seat, config) = (Seat { id, world: 1, rank: 0 }, CommConfig::default());
    let enter = || Ok::<(), std::io::Error>(());
    let end = Instant::now() + super::PATIENT;
    let error = Communicator::start(&library, seat, config, enter, end, || false);
    let StartError::Nccl(error) = error.expect_err("no device is current") else { panic!() };
    assert!(matches!(error, NcclError::Call { call: "ncclCommInitRankConfig", .. }), "{error:?}");
    let text = "`ncclCommInitRankConfig` failed: unhandled cuda error: Cuda failure 201 'invalid \
                device context'";
    assert_eq!(error.to_string(), text);
}
