//! `lacuna-worker gpu-bench` on the CPU, and over a library that stands for a device's driver.

use std::process::Command;

use serde_json::Value;

/// Runs a few cases; returns the exit code, a line for each, and standard error.
fn bench(words: &[&str]) -> (i32, Vec<Value>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_lacuna-worker"))
        .args(["gpu-bench", "--device", "cpu0", "--steps", "2", "--warmup", "1"])
        .args(words)
        .envs(lacuna_mae::runtime::CPU_ENV.iter().copied())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let lines = text(&output.stdout);
    let lines = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (output.status.code().unwrap(), lines, text(&output.stderr))
}

#[test]
fn steps_are_timed_and_repeat_themselves() {
    let sums =
        ["exact", "exact32", "fast", "exact:free"].map(|reduce| format!("micro:4:2:f32:{reduce}"));
    let words: Vec<&str> = sums.iter().flat_map(|case| ["--case", case]).collect();
    let (code, lines, err) = bench(&words);
    assert_eq!((code, lines.len()), (0, 4), "{err}");
    for (line, case) in lines.iter().zip(&sums) {
        assert_eq!((line["case"].as_str().unwrap(), &line["error"]), (&case[..], &Value::Null));
        assert_eq!((&line["repeats"], &line["images_a_step"]), (&true.into(), &8.0.into()));
        assert_eq!(line["digests"].as_array().unwrap().len(), 2, "{line}");
        let ms = |key: &str| line["step_ms"][key].as_f64().unwrap();
        assert!(0.0 < ms("p10") && ms("p10") <= ms("median") && ms("median") <= ms("p90"));
        let rate = line["images_per_s"].as_f64().unwrap();
        assert!((rate * ms("median") / 8000.0 - 1.0).abs() < 1e-9, "{line}");
        assert!(line["mfu"].as_f64().unwrap() > 0.0, "{line}");
    }
    let kernels = lines.iter().map(|line| line["kernels"].as_str().unwrap());
    assert_eq!(kernels.collect::<Vec<&str>>(), ["exact", "exact", "exact", "free"]);
    // The state of a step that sums there has the bits of one that sums on the host.
    let library = lacuna_nccl_standin::path();
    let there = ["--cuda-library", library.to_str().unwrap(), "--case", &sums[0]];
    let (code, on_device, err) = bench(&there);
    assert_eq!(code, 0, "{err}");
    assert_eq!(on_device[0]["digests"], lines[0]["digests"]);
}

#[test]
fn what_cannot_run_says_why_and_the_rest_runs() {
    let library = lacuna_nccl_standin::path();
    let words = ["--case", "micro:4:1:tf32:exact", "--case", "micro:4:1:f32:exact"];
    let (code, lines, err) =
        bench(&[&["--cuda-library", library.to_str().unwrap()], &words[..]].concat());
    assert_eq!((code, lines.len()), (1, 2), "{err}");
    assert!(lines[0]["error"].as_str().unwrap().contains("needs a CUDA device"), "{}", lines[0]);
    assert!(lines[0]["repeats"].is_null() && lines[0]["step_ms"].is_null());
    assert!(lines[1]["error"].is_null() && lines[1]["images_per_s"].as_f64().unwrap() > 0.0);
    for (case, why) in [
        ("micro:4", "a case is MODEL:IMAGES:SLOTS:PRECISION:REDUCE"),
        ("vast:4:1:f32:exact", "no preset is named `vast`"),
        ("micro:0:1:f32:exact", "`0` must be a number from 1 to 4096"),
        ("micro:4:1:f8:exact", "no precision is called `f8`: f32"),
        ("micro:4:1:f32:near", "no sum is called `near`: exact"),
    ] {
        let (code, _, err) = bench(&["--case", case]);
        assert!(code == 2 && err.contains(why), "{case}: {err}");
    }
}
