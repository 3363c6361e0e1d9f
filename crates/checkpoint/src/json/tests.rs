use super::*;

#[test]
fn canonical_text_has_sorted_keys() {
    let value = parse_strict(br#" { "b": [1, -2, 0.41, 1e300], "a": {"z": null, "y": "\n"} } "#);
    let text = canonical(&value.unwrap());
    assert_eq!(text, r#"{"a":{"y":"\n","z":null},"b":[1,-2,0.41,1e300]}"#);
    assert_eq!(canonical(&parse_strict(text.as_bytes()).unwrap()), text);
}

#[test]
fn keys_that_appear_twice_are_refused() {
    let error = parse_strict(br#"{"a": {"x": 1, "x": 1}}"#).unwrap_err();
    assert!(error.to_string().contains("key \"x\" appears twice"), "{error}");
    assert!(parse_strict(br#"{"a": 1} x"#).is_err());
}

#[test]
fn digests_have_one_spelling() {
    assert_eq!(Hex64::try_from("00000000000000ff".to_string()), Ok(Hex64(255)));
    for text in ["ff", "00000000000000FF", "+0000000000000ff", "00000000000000fg"] {
        assert!(Hex64::try_from(text.to_string()).is_err(), "{text}");
    }
}

#[test]
fn a_seal_covers_everything_but_itself() {
    let mut value = parse_strict(br#"{"schema": "s/1", "x": 0.1}"#).unwrap();
    let seal = seal_of(&value);
    value["self"] = seal.clone().into();
    assert_eq!(seal_of(&value), seal);
    let text = canonical(&value);
    let open = |text: &str| open_sealed::<Value>(text.as_bytes(), "s/1", canonical);
    assert!(open(&text).is_ok());
    assert!(matches!(open(&text.replace("0.1", "0.2")), Err(SealError::Digest { .. })));
    assert!(matches!(open(&text.replace("s/1", "s/2")), Err(SealError::Schema { .. })));
    assert!(matches!(
        open(&text.replace(':', ": ")),
        Err(SealError::Form | SealError::Digest { .. })
    ));
    assert!(matches!(open(&text.replace("0.1", "0.10")), Err(SealError::Form)));
}
