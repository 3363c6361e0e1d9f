//! `lacuna token` and `lacuna tls`: what callers prove with who they are.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use lacuna_coordinator::auth::{Role, TokenLine, new_token};
use lacuna_types::exit;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

use crate::Coded;

/// `lacuna token`.
#[derive(Args, Debug)]
pub struct TokenArgs {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a token: it goes to stdout, its digest into the coordinator's file.
    New(NewArgs),
}

#[derive(Args, Debug)]
struct NewArgs {
    /// What its bearer may do: view, submit (and view), worker, or admin (everything).
    #[arg(long, value_parser = role)]
    role: Role,
    /// Whose it is; stands in the file beside the digest.
    #[arg(long, default_value = "")]
    name: String,
    /// The coordinator's file of tokens, which gets a line; made where it is not there.
    #[arg(long, value_name = "FILE")]
    add_to: Option<PathBuf>,
    /// File for the token, which must not exist, instead of stdout; only its owner may read it.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

fn role(text: &str) -> Result<Role, String> {
    text.parse().map_err(|err: lacuna_coordinator::auth::NotARole| err.to_string())
}

/// `lacuna tls`.
#[derive(Args, Debug)]
pub struct TlsArgs {
    #[command(subcommand)]
    command: TlsCommand,
}

#[derive(Debug, Subcommand)]
enum TlsCommand {
    /// Make an authority and certificates: a folder for the coordinator, and one for each role.
    /// Again with the same folder, the authority stays and the rest is made anew.
    Init(InitArgs),
}

#[derive(Args, Debug)]
struct InitArgs {
    /// Folder to write to.
    folder: PathBuf,
    /// Name or address that clients and workers reach the coordinator by; may be given often.
    #[arg(long = "host", value_name = "HOST", default_values = ["localhost", "127.0.0.1", "::1"])]
    hosts: Vec<String>,
    /// Days until the certificates expire; the authority's has ten times as many.
    #[arg(long, default_value_t = 365)]
    days: u32,
}

/// Makes a token.
pub fn token(args: TokenArgs) -> anyhow::Result<u8> {
    let TokenCommand::New(NewArgs { role, name, add_to, out }) = args.command;
    if name.chars().any(char::is_control) {
        return Err(Coded::error(exit::USAGE, "`--name` holds a control character"));
    }
    let token = new_token();
    let line = TokenLine::of(&token, role, &name);
    // First the file that may exist already: nobody has the token of a line without one.
    if let Some(path) = &out {
        write_secret(path, &format!("{token}\n"))?;
    }
    match &add_to {
        Some(path) => {
            let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
            let written = file.and_then(|mut file| writeln!(file, "{line}"));
            written.with_context(|| format!("write `{}`", path.display()))?;
        }
        None => eprintln!("add this line to the coordinator's `--token-file`:\n{line}"),
    }
    if out.is_none() {
        println!("{token}");
    }
    Ok(exit::OK)
}

/// Writes a new file that only its owner may read.
fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    if file.as_ref().is_err_and(|err| err.kind() == std::io::ErrorKind::AlreadyExists) {
        let text = format!("`{}` exists: choose another file, or remove it", path.display());
        return Err(Coded::error(exit::USAGE, text));
    }
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
    written.with_context(|| format!("write `{}`", path.display()))
}

/// Makes certificates.
pub fn tls(args: TlsArgs) -> anyhow::Result<u8> {
    let TlsCommand::Init(InitArgs { folder, hosts, days }) = args.command;
    if days == 0 {
        return Err(Coded::error(exit::USAGE, "`--days` must be at least 1"));
    }
    let (ca, issuer) = authority(&folder.join("ca"), days)?;
    let server = params("lacuna coordinator", None, &hosts, days)
        .map_err(|err| Coded::error(exit::USAGE, format!("`--host`: {err}")))?;
    write_party(&folder.join("server"), &ca, &issuer, server)?;
    for role in Role::ALL {
        let client = params(&format!("lacuna {role}"), Some(role), &[], days)?;
        write_party(&folder.join(role.word()), &ca, &issuer, client)?;
    }
    let at = folder.display();
    println!("coordinator   --tls-dir {at}/server   (reached as {})", hosts.join(", "));
    println!("workers       --tls-dir {at}/worker");
    println!("clients       --tls-dir {at}/submit   (or view, admin)");
    println!("keep {at}/ca where nobody gets it; who has it can make every certificate");
    Ok(exit::OK)
}

/// Reads the authority in a folder, or makes one; returns its certificate as PEM.
fn authority(folder: &Path, days: u32) -> anyhow::Result<(String, Issuer<'static, KeyPair>)> {
    let (cert_path, key_path) = (folder.join("cert.pem"), folder.join("key.pem"));
    if key_path.exists() {
        let read = |path: &Path| {
            std::fs::read_to_string(path).with_context(|| format!("read `{}`", path.display()))
        };
        let (cert, key) = (read(&cert_path)?, read(&key_path)?);
        let used = || format!("use the authority in `{}`", folder.display());
        let key = KeyPair::from_pem(&key).with_context(used)?;
        return Ok((cert.clone(), Issuer::from_ca_cert_pem(&cert, key).with_context(used)?));
    }
    let mut params = params("lacuna authority", None, &[], days.saturating_mul(10))?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.extended_key_usages = Vec::new();
    let issuer = CertifiedIssuer::self_signed(params.clone(), KeyPair::generate()?)
        .context("make the authority")?;
    let (cert, key) = (issuer.pem(), issuer.key().serialize_pem());
    make_folder(folder)?;
    write_secret(&key_path, &key)?;
    replace(&cert_path, &cert)?;
    let key = KeyPair::from_pem(&key).context("read the new authority's key")?;
    Ok((cert, Issuer::new(params, key)))
}

/// Describes a certificate: a coordinator's with its hosts, or a client's with its role.
fn params(
    name: &str,
    role: Option<Role>,
    hosts: &[String],
    days: u32,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(hosts.to_vec())?;
    params.distinguished_name.push(DnType::CommonName, name);
    let now = OffsetDateTime::now_utc();
    // Clocks of a cluster differ a little.
    params.not_before = now - Duration::hours(1);
    params.not_after = now + Duration::days(i64::from(days));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![match role {
        Some(_) => ExtendedKeyUsagePurpose::ClientAuth,
        None => ExtendedKeyUsagePurpose::ServerAuth,
    }];
    if let Some(role) = role {
        params.distinguished_name.push(DnType::OrganizationalUnitName, role.word());
    }
    Ok(params)
}

/// Writes the three files of a party, over those that are there.
fn write_party(
    folder: &Path,
    ca: &str,
    issuer: &Issuer<'static, KeyPair>,
    params: CertificateParams,
) -> anyhow::Result<()> {
    let key = KeyPair::generate().context("make a key")?;
    let cert = params.signed_by(&key, issuer).context("sign a certificate")?;
    make_folder(folder)?;
    let key_path = folder.join("key.pem");
    if let Err(err) = std::fs::remove_file(&key_path)
        && err.kind() != std::io::ErrorKind::NotFound
    {
        return Err(err).with_context(|| format!("replace `{}`", key_path.display()));
    }
    write_secret(&key_path, &key.serialize_pem())?;
    replace(&folder.join("cert.pem"), &cert.pem())?;
    replace(&folder.join("ca.pem"), ca)
}

fn make_folder(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("create `{}`", folder.display()))
}

fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let written = File::create(path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.with_context(|| format!("write `{}`", path.display()))
}
