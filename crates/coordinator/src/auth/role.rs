//! Roles: what a caller may do.

use std::fmt;
use std::str::FromStr;

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Look.
    View,
    /// Look, submit runs, stop and checkpoint them.
    Submit,
    /// Compute.
    Worker,
    /// Everything.
    Admin,
}

impl Role {
    /// All roles.
    pub const ALL: [Role; 4] = [Role::View, Role::Submit, Role::Worker, Role::Admin];

    /// Returns the word in files and certificates.
    pub fn word(self) -> &'static str {
        match self {
            Role::View => "view",
            Role::Submit => "submit",
            Role::Worker => "worker",
            Role::Admin => "admin",
        }
    }

    /// Tells whether who has this role may do what `needed` is needed for.
    pub fn may(self, needed: Role) -> bool {
        match self {
            Role::Admin => true,
            Role::Submit => matches!(needed, Role::Submit | Role::View),
            Role::Worker | Role::View => self == needed,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A word that is no role.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a role: expected view, submit, worker or admin")]
pub struct NotARole(String);

impl FromStr for Role {
    type Err = NotARole;

    fn from_str(text: &str) -> Result<Self, NotARole> {
        let role = Role::ALL.into_iter().find(|role| role.word() == text);
        role.ok_or_else(|| NotARole(text.to_string()))
    }
}
