use super::*;

#[test]
fn steps_are_split_off() {
    assert_eq!(split_step("runs/a@120"), (Path::new("runs/a"), Some(120)));
    assert_eq!(split_step("runs/a"), (Path::new("runs/a"), None));
    assert_eq!(split_step("me@home/a"), (Path::new("me@home/a"), None));
}

#[test]
fn folders_that_are_no_run() {
    let root = tempfile::tempdir().unwrap();
    let message = |path: &Path| run_dir(path).unwrap_err().to_string();
    assert!(message(&root.path().join("none")).contains("neither a spec file nor the folder"));
    fs::create_dir_all(root.path().join("a/ckpt")).unwrap();
    assert!(message(root.path()).contains("/a`"), "{}", message(root.path()));
    assert_eq!(run_dir(&root.path().join("a")).unwrap().run().as_str(), "a");
}
