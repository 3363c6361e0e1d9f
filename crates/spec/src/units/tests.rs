use super::*;

#[test]
fn lengths_and_cadences_print_as_they_read() {
    for text in ["800ep", "500step", "1ep", "9007199254740992step"] {
        assert_eq!(text.parse::<Length>().unwrap().to_string(), text);
        assert_eq!(text.parse::<Cadence>().unwrap().to_string(), text);
    }
    for (text, printed) in [("30s", "30s"), ("90min", "90min"), ("60s", "1min"), ("120min", "2h")] {
        assert_eq!(text.parse::<Cadence>().unwrap().to_string(), printed);
    }
}

#[test]
fn sizes_and_times() {
    assert_eq!(parse_bytes("256MiB"), Ok(256 << 20));
    assert_eq!(parse_bytes("500GB"), Ok(500_000_000_000));
    assert_eq!(parse_duration("15min"), Ok(Duration::from_secs(900)));
    assert_eq!(parse_bytes("256M").unwrap_err().suggestion(), Some("MiB"));
    assert!(parse_bytes("99999999999999999999GiB").is_err());
    assert!(parse_duration("0s").is_err());
}

#[test]
fn anything_else_is_refused_with_a_reason() {
    let mut out = String::new();
    for text in ["", "ep", "5", "5 ep", "5.5ep", "-5ep", "5epochs", "5min", "0ep", "4294967296ep"] {
        let error = text.parse::<Length>().unwrap_err();
        out += &format!("{text:?}: {error}");
        if let Some(unit) = error.suggestion() {
            out += &format!(" -> {unit}");
        }
        out += "\n";
    }
    expect_test::expect![[r#"
        "": is not a whole number with a unit, such as "800ep" or "500step"
        "ep": is not a whole number with a unit, such as "800ep" or "500step"
        "5": needs a unit, such as "800ep" or "500step"
        "5 ep": is not a whole number with a unit, such as "800ep" or "500step"
        "5.5ep": is not a whole number with a unit, such as "800ep" or "500step"
        "-5ep": is not a whole number with a unit, such as "800ep" or "500step"
        "5epochs": has the unit `epochs`, which is none of ep, step -> ep
        "5min": has the unit `min`, which is none of ep, step
        "0ep": must be from 1 to 4294967295ep
        "4294967296ep": must be from 1 to 4294967295ep
    "#]]
    .assert_eq(&out);
}

#[test]
fn sizes_read_as_they_were_written() {
    for text in ["500GB", "3TB", "256MiB", "7B", "1GiB", "1500MB"] {
        let bytes: Bytes = text.parse().unwrap();
        assert_eq!(bytes.to_string(), text);
    }
}

#[test]
fn guesses_can_be_read() {
    let length = |text| guess::<Length>(text);
    assert_eq!(length("800 epochs").as_deref(), Some("800ep"));
    assert_eq!(length("10,000step").as_deref(), Some("10000step"));
    assert_eq!(length("5EP").as_deref(), Some("5ep"));
    for text in ["", "5", "-5ep", "1.5ep", "0ep", "5min", "ep", "..", "99999999999999999999 ep"] {
        assert_eq!(length(text), None, "{text}");
    }
    let cadence = |text| guess::<Cadence>(text);
    assert_eq!(cadence("15 Minutes").as_deref(), Some("15min"));
    assert_eq!(cadence("1.5h").as_deref(), Some("90min"));
    assert_eq!(cadence("2days").as_deref(), Some("48h"));
    assert_eq!(cadence("0.1s"), None);
    assert_eq!(cadence("1,5h").as_deref(), Some("90min"));
    assert_eq!(cadence("1,500s").as_deref(), Some("1500s"));
    let size = |text| guess::<Bytes>(text);
    assert_eq!(size("1.5 TB").as_deref(), Some("1500GB"));
    assert_eq!(size("500 gb").as_deref(), Some("500GB"));
    assert_eq!(size("1.5TB").as_deref(), Some("1500GB"));
}

#[test]
fn sizes_for_people() {
    let got = [0, 1023, 1024, 1 << 20, 3 << 39].map(size);
    assert_eq!(got, ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.5 TiB"]);
}
