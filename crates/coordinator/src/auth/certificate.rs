//! The role in a certificate: its organisational unit, as `lacuna tls init` writes it.

use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::Bearer;

/// Reads role and name in a certificate whose chain was checked already.
pub(super) fn bearer_in(der: &[u8]) -> Option<Bearer> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let role = subject.iter_organizational_unit().find_map(|unit| unit.as_str().ok()?.parse().ok());
    let name = subject.iter_common_name().find_map(|name| name.as_str().ok()).unwrap_or_default();
    role.map(|role| Bearer { role, name: name.to_string() })
}
