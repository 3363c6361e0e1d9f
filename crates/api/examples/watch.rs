//! A client of the gRPC API: lists the runs, or follows one until it ends.
//!
//! ```text
//! cargo run -p lacuna-api --example watch -- http://127.0.0.1:7070 [RUN]
//! ```
//!
//! `LACUNA_TOKEN_FILE` and `LACUNA_TLS_DIR` name what it proves itself with.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use lacuna_api::client::Client;
use lacuna_api::tls::Credentials;
use lacuna_api::v1::watch_run_response::Update;

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let url = words.next().ok_or("usage: watch URL [RUN]")?;
    let file = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let (token, tls) = (file("LACUNA_TOKEN_FILE"), file("LACUNA_TLS_DIR"));
    let credentials = Credentials::read(token.as_deref(), tls.as_deref())?;
    let mut client = Client::connect_as(&url, PATIENCE, &credentials).await?;
    match words.next() {
        Some(run) => follow(&mut client, &run).await,
        None => {
            for run in client.list_runs().await? {
                println!("{} {} step {} of {}", run.run_id, run.state, run.step, run.total_steps);
            }
            Ok(())
        }
    }
}

/// Prints what happens to a run until it has ended.
async fn follow(client: &mut Client, run: &str) -> Result<(), Box<dyn Error>> {
    let mut updates = client.watch_run(run, 0).await?;
    while let Some(response) = updates.message().await? {
        match response.update {
            Some(Update::Figures(figures)) => {
                println!("{}: step {} loss {:.4}", response.seq, figures.step, figures.loss);
            }
            Some(Update::Event(event)) => println!("{}: {}", response.seq, event.text),
            Some(Update::Snapshot(run)) => {
                println!("{} is {} in generation {}", run.run_id, run.state, run.generation);
                if run.exit_code.is_some() {
                    break;
                }
            }
            Some(Update::Picture(_)) | None => {}
        }
    }
    Ok(())
}
