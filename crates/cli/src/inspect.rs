//! Commands that look at runs beyond their newest state, or compare them.

use std::path::Path;
use std::time::Duration;

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;
use lacuna_api::client::{Client, ClientError};
use lacuna_api::error::Reason;
use lacuna_api::v1;
use lacuna_api::v1::watch_run_response::Update;
use lacuna_spec::RunSpec;
use lacuna_types::exit;

use crate::client::Output;
use crate::connect::Connect;
use crate::verbosity::talk;
use crate::{Coded, runtime, spec};

/// `lacuna events`.
#[derive(Args, Debug)]
pub struct EventsArgs {
    /// Name of the run.
    run: String,
    /// Go on with what happens.
    #[arg(long, short)]
    follow: bool,
    /// Only those that a person should look at.
    #[arg(long)]
    warnings: bool,
    /// How the result is printed; JSON is one object a line.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    connect: Connect,
}

/// `lacuna diff`.
#[derive(Args, Debug)]
pub struct DiffArgs {
    /// A run, or a specification's file.
    old: String,
    /// Another.
    new: String,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    connect: Connect,
}

/// `lacuna completions`.
#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// `lacuna man`.
#[derive(Args, Debug)]
pub struct ManArgs {
    /// Folder for the pages.
    folder: std::path::PathBuf,
}

/// How a file leaves a value open.
const OPEN: &str = "\"auto\"";

/// Prints what happened to a run, the oldest first.
pub fn events(args: EventsArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let print = print_events(&args);
        tokio::select! {
            printed = print => printed,
            _ = tokio::signal::ctrl_c() => Ok(exit::OK),
        }
    })
}

async fn print_events(args: &EventsArgs) -> anyhow::Result<u8> {
    let mut seen = 0;
    loop {
        match print_some(args, &mut seen).await {
            Ok(()) if !args.follow => return Ok(exit::OK),
            Err(err) if !args.follow || is_final(&err) => return Err(err.into()),
            // The stream broke: it goes on where it was.
            _ => tokio::time::sleep(Duration::from_secs(1)).await,
        }
    }
}

/// Tells whether the coordinator has answered, and will answer the same again.
pub(crate) fn is_final(err: &ClientError) -> bool {
    match err {
        ClientError::Unreachable { .. } | ClientError::NoLeader { .. } | ClientError::Late => false,
        ClientError::Refused(status) => match lacuna_api::error::reason(status) {
            Some(Reason::NotLeader | Reason::ShuttingDown | Reason::Starting) | None => false,
            Some(_) => true,
        },
        _ => true,
    }
}

async fn print_some(args: &EventsArgs, seen: &mut u64) -> Result<(), ClientError> {
    let mut client = args.connect.client().await?;
    let last = client.get_run(&args.run).await?.last_seq;
    let mut updates = client.watch_run(&args.run, *seen).await?;
    while args.follow || *seen < last {
        let Some(v1::WatchRunResponse { update, seq }) = updates.message().await? else { break };
        *seen = (*seen).max(seq);
        if let Some(Update::Event(event)) = update
            && (event.warning || !args.warnings)
        {
            print_event(args.output, seq, &event);
        }
    }
    Ok(())
}

fn print_event(output: Output, seq: u64, event: &v1::RunEvent) {
    let v1::RunEvent { kind, warning, text, at_ms } = event;
    match output {
        Output::Json => println!(
            "{}",
            serde_json::json!({
                "seq": seq, "at_ms": at_ms, "kind": kind, "warning": warning, "text": text,
            })
        ),
        Output::Table => {
            let at = time::OffsetDateTime::from_unix_timestamp((at_ms / 1000) as i64);
            let at = at.unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
            let (date, clock) = (at.date(), at.time());
            let (h, m, s) = clock.as_hms();
            let mark = if *warning { '!' } else { ' ' };
            println!("{date} {h:02}:{m:02}:{s:02}Z {mark} {kind:<12} {text}");
        }
    }
}

/// Compares two specifications, with what each difference means.
pub fn diff(args: DiffArgs) -> anyhow::Result<u8> {
    let (old, new) = runtime()?.block_on(async {
        let old = spec_of(&args.old, &args.connect).await?;
        anyhow::Ok((old, spec_of(&args.new, &args.connect).await?))
    })?;
    let mut differences = lacuna_spec::diff(&old, &new);
    // What a file leaves open is settled when it is submitted: it is no other value.
    let is_file = |name: &str| Path::new(name).is_file();
    if is_file(&args.old) != is_file(&args.new) {
        differences.retain(|d| {
            let of_file = if is_file(&args.old) { &d.old } else { &d.new };
            of_file != OPEN
        });
    }
    if args.output == Output::Json {
        let of = |d: &lacuna_spec::FieldDiff| {
            let mark = d.mark.to_string();
            let key = d.path.to_string();
            serde_json::json!({ "key": key, "old": d.old, "new": d.new, "mark": mark })
        };
        let all: Vec<serde_json::Value> = differences.iter().map(of).collect();
        println!("{}", serde_json::Value::from(all));
        return Ok(exit::OK);
    }
    if differences.is_empty() {
        talk!("no difference");
    }
    for difference in differences {
        println!("{difference}");
    }
    Ok(exit::OK)
}

async fn spec_of(name: &str, connect: &Connect) -> anyhow::Result<RunSpec> {
    if Path::new(name).is_file() {
        return spec::read(Path::new(name), &[]);
    }
    let mut client: Client = connect.client().await?;
    let run = client.get_run(name).await.map_err(|err| match &err {
        ClientError::Refused(_) => {
            Coded::error(exit::USAGE, format!("`{name}` is neither a file nor a run: {err}"))
        }
        _ => err.into(),
    })?;
    Ok(serde_json::from_str(&run.spec)?)
}

/// Prints a script that completes the command line.
pub fn completions(args: CompletionsArgs) -> anyhow::Result<u8> {
    let mut command = crate::Args::command();
    // Written at once: the generator panics where nobody reads on.
    let mut script: Vec<u8> = Vec::new();
    clap_complete::generate(args.shell, &mut command, "lacuna", &mut script);
    print!("{}", String::from_utf8_lossy(&script));
    Ok(exit::OK)
}

/// Writes manual pages: one of the command, and one of each of its own.
pub fn man(args: ManArgs) -> anyhow::Result<u8> {
    std::fs::create_dir_all(&args.folder)?;
    clap_mangen::generate_to(crate::Args::command(), &args.folder)?;
    println!("look at them with: man -l {}/lacuna.1", args.folder.display());
    Ok(exit::OK)
}
