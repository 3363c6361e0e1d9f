//! `lacuna-worker gpu-check`: the checks, run on the CPU, and what it, an agent and `features` say
//! without a GPU.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Far above the seconds that the checks take; a process that is not done by then hangs.
const DEADLINE: Duration = Duration::from_secs(180);

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

/// A run of the checks on small slots.
struct Run {
    command: Command,
    out: PathBuf,
}

impl Run {
    fn new(dir: &Path, golden: &Path, device: &str) -> Self {
        let out = dir.join("gpu-check.json");
        let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna-worker"));
        command.arg("gpu-check").arg("--golden").arg(golden).arg("--out").arg(&out);
        command.args(["--device", device, "--model", "micro", "--images", "2,4", "--slots", "2"]);
        command.env("OMP_NUM_THREADS", "1");
        Run { command, out }
    }

    /// Runs to the end; returns exit code, standard output and error, and the file.
    fn end(mut self) -> (i32, String, String, Value) {
        let output = wait(self.command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        let file = std::fs::read_to_string(&self.out).unwrap_or_else(|_| panic!("{stderr}"));
        let file = serde_json::from_str(&file).unwrap();
        (output.status.code().unwrap(), stdout, stderr, file)
    }
}

fn wait(command: &mut Command) -> Output {
    let child = command.spawn().unwrap();
    let pid = child.id();
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    let waiter = std::thread::spawn(move || sender.send(child.wait_with_output()));
    let start = Instant::now();
    let Ok(output) = receiver.recv_timeout(DEADLINE) else {
        let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        panic!("gpu-check still ran after {:?}", start.elapsed());
    };
    waiter.join().unwrap().unwrap();
    output.unwrap()
}

fn item<'a>(file: &'a Value, name: &str) -> &'a Value {
    let items = file["items"].as_array().unwrap();
    items.iter().find(|item| item["name"] == name).unwrap_or_else(|| panic!("no item `{name}`"))
}

#[test]
fn everything_passes_on_a_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let (code, stdout, stderr, file) = Run::new(dir.path(), &golden(), "cpu").end();
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert_eq!(file["format"], "lacuna-gpu-check/1");
    assert_eq!((&file["passed"], &file["device"]), (&true.into(), &"cpu".into()));
    assert_eq!(file["complete"], true);
    assert!(file["error"].is_null() && file["cuda"].is_null());
    for tag in ["micro", "rect", "mid"] {
        for kind in ["f32", "f64"] {
            for what in ["loss", "latent", "pred"] {
                let item = item(&file, &format!("golden.{tag}.{kind}.{what}"));
                let (off, most) = (&item["detail"]["off"], &item["detail"]["tolerance"]);
                assert!(off.as_f64().unwrap() < most.as_f64().unwrap(), "{item}");
            }
        }
    }
    for name in ["golden.micro.f32.gradients", "golden.micro.f64.gradients", "order.micro.8"] {
        assert_eq!(item(&file, name)["passed"], true);
    }
    let digests = item(&file, "repeat.micro.2")["detail"]["digests"].as_array().unwrap();
    assert!(digests.len() > 1 && digests.iter().all(|digest| *digest == digests[0]));
    // Two sizes, with and without deterministic kernels.
    let timed = file["throughput"].as_array().unwrap();
    assert_eq!(timed.len(), 4);
    assert!(timed.iter().all(|timed| timed["images_per_second"].as_f64().unwrap() > 0.0));
    assert!(stdout.lines().last().unwrap().contains("items passed"), "{stdout}");
}

/// All other tests here look at processes of their own, so these switches are this one's.
#[test]
fn the_switches_that_choose_kernels_are_read_back() {
    use lacuna_mae::context::{Kernels, kernels, set_kernels};
    for (deterministic, tf32) in [(true, false), (false, true), (false, false), (true, true)] {
        let wanted = Kernels { deterministic, tf32 };
        set_kernels(wanted).expect("libtorch takes them");
        assert_eq!(kernels(), Some(wanted));
    }
}

/// What a machine with a GPU checks beyond that, over a library that stands in for its own.
#[test]
fn the_device_half_passes_over_the_stand_in() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = Run::new(dir.path(), &golden(), "cpu");
    let library = lacuna_nccl_standin::path();
    run.command.arg("--nccl-library").arg(&library).arg("--cuda-library").arg(&library);
    let (code, stdout, stderr, file) = run.end();
    assert_eq!(code, 0, "{stdout}{stderr}");
    for name in [
        "device.arithmetic",
        "device.engine.f32",
        "device.engine.bf16",
        "device.task.f32",
        "device.task.bf16",
        "nccl.single",
        "nccl.pair",
    ] {
        assert_eq!(item(&file, name)["passed"], true, "{stdout}");
    }
    let steps = |name: &str| -> Vec<&str> {
        let heard = item(&file, name)["detail"]["heard"].as_array().unwrap();
        let of_first = heard.iter().filter(|entry| entry["rank"] == 0);
        of_first.map(|entry| entry["step"].as_str().unwrap()).collect()
    };
    assert_eq!(steps("nccl.single"), ["formed", "summed", "aborted", "left", "reformed"]);
    assert_eq!(steps("nccl.pair"), ["formed", "summed", "lost", "left", "reformed"]);
}

#[test]
fn a_wrong_value_fails_its_item_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let wrong = dir.path().join("golden");
    std::fs::create_dir(&wrong).unwrap();
    for entry in std::fs::read_dir(golden()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, wrong.join(path.file_name().unwrap())).unwrap();
    }
    let path = wrong.join("golden.json");
    let mut values: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    // What the known mistake of mixed orders gives: 7e-5 off.
    values["micro"]["loss"] = values["micro"]["loss_seed_bug"].clone();
    std::fs::write(&path, values.to_string()).unwrap();
    std::fs::remove_file(wrong.join("rect.io.safetensors")).unwrap();

    let (code, stdout, _, file) = Run::new(dir.path(), &wrong, "cpu").end();
    assert_eq!((code, &file["passed"]), (1, &false.into()), "{stdout}");
    let failed: Vec<&str> = file["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|item| item["passed"] == false)
        .map(|item| item["name"].as_str().unwrap())
        .collect();
    let want =
        ["golden.micro.f32.loss", "golden.micro.f64.loss", "golden.rect.f32", "golden.rect.f64"];
    assert_eq!(failed, want);
    let text = item(&file, "golden.rect.f32")["text"].as_str().unwrap();
    assert!(text.contains("rect.io.safetensors"), "{text}");
}

/// Tells whether this machine has a driver, so that its absence cannot be tested.
fn has_driver() -> bool {
    let here = Path::new("/dev/nvidia0").exists();
    if here {
        println!("skipped: this machine has an NVIDIA device");
    }
    here
}

#[test]
fn without_cuda_it_says_what_is_missing() {
    if has_driver() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (code, stdout, stderr, file) = Run::new(dir.path(), &golden(), "cuda").end();
    assert_eq!((code, stdout.as_str()), (78, ""), "{stderr}");
    let error = file["error"].as_str().unwrap();
    assert!(error.starts_with("no CUDA library: ") || error.starts_with("no NVIDIA driver: "));
    assert_eq!(stderr.lines().last(), Some(format!("error: gpu-check: {error}").as_str()));
    assert_eq!((&file["passed"], file["items"].as_array().unwrap().len()), (&false.into(), 0));
    assert_eq!(file["complete"], false);
}

/// Makes what a loader finds on another machine: a CUDA half of libtorch with nothing in it, and
/// the stand-in as the driver, where there is one. Returns the path to look in.
fn loader_path(dir: &Path, with_driver: bool) -> OsString {
    let library = dir.join("libtorch_cuda.so");
    let source = dir.join("empty.c");
    std::fs::write(&source, "int lacuna_nothing;\n").unwrap();
    let compiled = wait(Command::new("cc").arg("-shared").arg("-o").arg(&library).arg(&source));
    assert!(compiled.status.success(), "{compiled:?}");
    if with_driver {
        let driver = dir.join("libcuda.so.1");
        std::os::unix::fs::symlink(lacuna_nccl_standin::path(), driver).unwrap();
    }
    let mut paths: Vec<PathBuf> = vec![dir.to_path_buf()];
    let known = std::env::var_os("LD_LIBRARY_PATH");
    paths.extend(known.iter().flat_map(std::env::split_paths));
    std::env::join_paths(paths).unwrap()
}

/// Runs `lacuna-worker` on a machine of `n_devices`; returns exit code and standard error.
fn worker(path: &OsStr, n_devices: &str, words: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna-worker"));
    command.args(words).env("LD_LIBRARY_PATH", path).env("LACUNA_STANDIN_DEVICES", n_devices);
    // What hides devices from the real driver; the stand-in has as many as it is told.
    command.env("CUDA_VISIBLE_DEVICES", if n_devices == "0" { "-1" } else { "0" });
    command.env_remove("LACUNA_CUDA_LIBRARY").env_remove("RUST_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = wait(&mut command);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap_or_else(|| panic!("a signal ended it: {said}")), said)
}

/// An agent for devices whose coordinator is nowhere.
const AGENT: [&str; 6] =
    ["--devices", "cuda", "--coordinator", "http://127.0.0.1:1", "--node-name", "a"];

#[test]
fn with_the_library_alone_it_misses_the_driver() {
    if has_driver() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = loader_path(dir.path(), false);
    let mut run = Run::new(dir.path(), &golden(), "cuda");
    run.command.env("LD_LIBRARY_PATH", &path);
    let (code, _, stderr, file) = run.end();
    assert_eq!(code, 78);
    let error = file["error"].as_str().unwrap();
    assert!(error.starts_with("no NVIDIA driver: libcuda.so.1: "), "{error}");
    assert!(stderr.contains(error), "{stderr}");

    let (code, said) = worker(&path, "1", &AGENT);
    assert_eq!(code, 78, "{said}");
    assert!(said.contains("error: no NVIDIA driver: libcuda.so.1: "), "{said}");
}

/// As with a driver that is too old for this libtorch: it has devices, and libtorch none.
#[test]
fn devices_that_libtorch_does_not_see_are_told() {
    if has_driver() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = loader_path(dir.path(), true);
    let text = "libtorch sees 0 devices and the NVIDIA driver shows 1: the driver is for CUDA 13.0 \
                and older, libtorch for ";
    let mut run = Run::new(dir.path(), &golden(), "cuda");
    run.command.env("LD_LIBRARY_PATH", &path).env("LACUNA_STANDIN_DEVICES", "1");
    let (code, _, stderr, file) = run.end();
    assert_eq!(code, 78, "{stderr}");
    assert!(file["error"].as_str().unwrap().starts_with(text), "{file}");

    // Its agent counts devices alone; the trainer is told, and not started again.
    let (code, said) = worker(&path, "1", &AGENT);
    assert_eq!(code, 78, "{said}");
    let told = format!("[a:cuda0] error: prepare the device: cuda0 cannot be used: {text}");
    assert_eq!(said.matches(&told).count(), 1, "{said}");
}

/// Somebody hid all devices: that is said, by its variable.
#[test]
fn hidden_devices_are_named_by_what_hides_them() {
    if has_driver() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = loader_path(dir.path(), true);
    let text = "the NVIDIA driver shows no device (CUDA_VISIBLE_DEVICES is `-1`)";
    let mut run = Run::new(dir.path(), &golden(), "cuda");
    run.command.env("LD_LIBRARY_PATH", &path).env("LACUNA_STANDIN_DEVICES", "0");
    run.command.env("CUDA_VISIBLE_DEVICES", "-1");
    let (code, _, stderr, file) = run.end();
    assert_eq!((code, file["error"].as_str()), (78, Some(text)), "{stderr}");

    let weights = golden().join("mid.weights.f32.safetensors");
    let out = dir.path().join("features.npy");
    let of_weights = ["--heads", "4", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"];
    let files = [weights.to_str().unwrap(), "--data", "nowhere", "--out", out.to_str().unwrap()];
    let features = ["features", "--device", "cuda"];
    let features = [&features[..], &files[..], &of_weights[..]].concat();
    for words in [&AGENT[..], &features] {
        let (code, said) = worker(&path, "0", words);
        assert_eq!(code, 78, "{words:?}: {said}");
        assert_eq!(said.lines().last(), Some(format!("error: {text}").as_str()), "{words:?}");
    }
    assert!(!out.exists());
}

#[test]
fn bad_arguments_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = Run::new(dir.path(), &dir.path().join("nowhere"), "cpu");
    let output = wait(run.command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("read golden values"));
}
