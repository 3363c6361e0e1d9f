use super::*;

#[test]
fn paths_are_those_of_the_format() {
    let dir = RunDir::new("/ckpt", "r-7f3a".parse().unwrap());
    let attempt = Attempt::new(Generation(7), AttemptSeq(1));
    let part = PartId { rank: 0, world: 8 };
    let text = |path: PathBuf| path.display().to_string();
    assert_eq!(
        text(dir.attempt(Step(12000), attempt).join(part.file_name())),
        "/ckpt/r-7f3a/ckpt/step-000012000/attempt-00000007.0001/part-00000-of-00008.safetensors"
    );
    assert_eq!(part.receipt_name(), "receipt-00000-of-00008.json");
    assert_eq!(text(dir.claim(CoordEpoch(7))), "/ckpt/r-7f3a/claims/00000007.json");
    assert_eq!(text(dir.manifest(Step(3))), "/ckpt/r-7f3a/ckpt/step-000000003/manifest.json");
    assert_eq!(text(dir.latest()), "/ckpt/r-7f3a/latest.json");
}

#[test]
fn names_parse_back() {
    for step in [0, 12000, 999_999_999, 12_345_678_901] {
        let name = format!("step-{step:09}");
        assert_eq!(RunDir::parse_step(&name), Some(Step(step)));
    }
    for (generation, sequence) in [(0, 0), (7, 1), (123_456_789, 10_000)] {
        let attempt = Attempt::new(Generation(generation), AttemptSeq(sequence));
        assert_eq!(RunDir::parse_attempt(&format!("attempt-{attempt}")), Some(attempt));
    }
    let part = PartId { rank: 3, world: 8 };
    assert_eq!(PartId::parse(&part.file_name()), Some(part));
    assert_eq!(RunDir::parse_claim("00000007.json"), Some(CoordEpoch(7)));
}

#[test]
fn other_names_do_not_parse() {
    for name in ["step-", "step-12", "step-0000012000", "step-00001200x", "step-+00012000"] {
        assert_eq!(RunDir::parse_step(name), None, "{name}");
    }
    for name in ["part-00008-of-00008.safetensors", "part-00000-of-00008.safetensors.partial"] {
        assert_eq!(PartId::parse(name), None, "{name}");
    }
    let error = "7.1".parse::<Attempt>().unwrap_err();
    assert_eq!(error.to_string(), "`7.1` is not an attempt (00000007.0001)");
}

#[test]
fn a_place_is_a_folder_or_a_url() {
    let run = || "r-7f3a".parse::<RunId>().unwrap();
    assert_eq!(RunDir::open("/ckpt", run()).unwrap().path(), PathBuf::from("/ckpt/r-7f3a"));
    for url in ["s3://bucket/a/b", "s3://bucket/a/b/"] {
        let dir = RunDir::open(url, run()).unwrap();
        let latest = "s3://bucket/a/b/r-7f3a/latest.json";
        assert_eq!(dir.latest().display().to_string(), latest, "{url}");
        let dir = RunDir::open_url("s3://bucket/a/b/r-7f3a/").unwrap().unwrap();
        assert_eq!((dir.run().as_str(), dir.latest()), ("r-7f3a", PathBuf::from(latest)));
    }
    assert!(RunDir::open_url("/ckpt/r-7f3a").is_none());
    for (url, why) in [
        ("http://host/ckpt/r-7f3a", "plain HTTP cannot create"),
        ("ftp://host/ckpt/r-7f3a", "is not an address of a store"),
        ("s3://r-7f3a", "it names no run"),
        ("s3://bucket/a b", "not a name of a run"),
    ] {
        let text = crate::chain(&RunDir::open_url(url).unwrap().unwrap_err());
        assert!(text.contains("failed to open `") && text.contains(why), "{url}: {text}");
    }
}
