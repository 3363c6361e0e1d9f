//! What the commands say, word for word: `tests/cmd/*.trycmd`, each a shell session.
//!
//! `TRYCMD=overwrite cargo test -p lacuna-cli --test transcripts` writes what is said; read it as
//! the person who typed the command would.

#[test]
fn commands_say_what_they_said() {
    let cases = trycmd::TestCases::new();
    cases
        .default_bin_path(env!("CARGO_BIN_EXE_lacuna"))
        .env("LACUNA_COORDINATOR", "http://127.0.0.1:1")
        .env("COLUMNS", "100")
        .env("NO_COLOR", "1")
        .case("tests/cmd/*.trycmd");
}

#[test]
fn without_a_reader_a_command_ends_quietly() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lacuna"));
    let said = command.arg("--version").stdout(writer).output().unwrap();
    assert_eq!(said.status.code(), Some(i32::from(lacuna_types::exit::NO_READER)));
    assert_eq!(String::from_utf8_lossy(&said.stderr), "");
}
