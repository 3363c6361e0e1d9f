use super::*;

#[test]
fn names_are_checked() {
    assert_eq!("gpu-05:cuda0".parse::<WorkerId>().unwrap().as_str(), "gpu-05:cuda0");
    for bad in ["", "a/b", "a b", "..", ".hidden", "a\n"] {
        let err = bad.parse::<RunId>().unwrap_err().to_string();
        assert!(err.contains("run id"), "{err}");
    }
    assert!("x".repeat(NAME_BYTES_MAX + 1).parse::<RunId>().is_err());
}

#[test]
fn time_saturates() {
    let early = Timestamp::from_millis(5);
    let late = early + Duration::from_millis(7);
    assert_eq!(late.since(early), Duration::from_millis(7));
    assert_eq!(early.since(late), Duration::ZERO);
    assert_eq!(early + Duration::MAX, Timestamp(u64::MAX));
}
