//! The `lacuna` command for tests.
fn main() -> std::process::ExitCode {
    lacuna_cli::main()
}
