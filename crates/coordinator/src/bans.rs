//! Machines that an operator keeps out of every run for some time.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, UNIX_EPOCH};

use crate::clock::{now_ms, rfc3339};
use crate::registry::lock;
use crate::store::Ban;

/// Who is kept out, by machine.
#[derive(Debug, Default)]
pub(crate) struct Bans(Mutex<BTreeMap<String, Ban>>);

impl Bans {
    /// Takes those that are remembered.
    pub fn of(bans: Vec<Ban>) -> Self {
        Bans(Mutex::new(bans.into_iter().map(|ban| (ban.node.clone(), ban)).collect()))
    }

    /// Makes the ban of a machine for some time from now on.
    pub fn ban(node: &str, time: Duration, why: String) -> Ban {
        let until_ms = now_ms().saturating_add(time.as_millis() as u64);
        Ban { node: node.to_string(), until_ms, why }
    }

    /// Keeps a machine out, or lets it back in where the time is over.
    pub fn set(&self, ban: Ban) {
        let mut bans = lock(&self.0);
        bans.retain(|_, ban| ban.until_ms > now_ms());
        if ban.until_ms > now_ms() {
            bans.insert(ban.node.clone(), ban);
        } else {
            bans.remove(&ban.node);
        }
    }

    /// Lists who is kept out, by machine.
    pub fn list(&self) -> Vec<Ban> {
        let now = now_ms();
        lock(&self.0).values().filter(|ban| ban.until_ms > now).cloned().collect()
    }

    /// Says why a machine is kept out, if it is.
    pub fn of_node(&self, node: &str) -> Option<String> {
        let bans = lock(&self.0);
        let ban = bans.get(node).filter(|ban| ban.until_ms > now_ms())?;
        let until = rfc3339(UNIX_EPOCH + Duration::from_millis(ban.until_ms));
        let why = if ban.why.is_empty() { "an operator wants it" } else { &ban.why };
        Some(format!("node {node} is kept out until {until}: {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ban_ends_by_itself_or_by_hand() {
        let bans = Bans::of(vec![Ban { node: "old".into(), until_ms: 1, why: String::new() }]);
        assert_eq!(bans.of_node("old"), None);
        bans.set(Bans::ban("gpu-05", Duration::from_secs(3600), "its fan is loud".into()));
        let why = bans.of_node("gpu-05").unwrap();
        assert!(why.starts_with("node gpu-05 is kept out until 20"), "{why}");
        assert!(why.ends_with(": its fan is loud"), "{why}");
        assert_eq!(bans.of_node("gpu-06"), None);
        assert_eq!(bans.list().iter().map(|ban| &ban.node[..]).collect::<Vec<_>>(), ["gpu-05"]);
        bans.set(Bans::ban("gpu-05", Duration::ZERO, String::new()));
        assert_eq!(bans.of_node("gpu-05"), None);
    }
}
