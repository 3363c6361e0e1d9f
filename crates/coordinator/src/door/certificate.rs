//! The role in a certificate: its organisational unit, as `lacuna tls init` writes it.

use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::Role;

/// Reads the role in a certificate whose chain was checked already.
pub(super) fn role_in(der: &[u8]) -> Option<Role> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let mut units = certificate.subject().iter_organizational_unit();
    units.find_map(|unit| unit.as_str().ok()?.parse().ok())
}
