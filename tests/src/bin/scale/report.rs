//! Tables for people.

use std::fmt;

/// Values of repetitions by name, in the order in which names came.
#[derive(Default)]
pub struct Table(Vec<(String, Vec<f64>)>);

impl Table {
    /// Adds one repetition's value.
    pub fn add(&mut self, name: &str, value: f64) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(value),
            None => self.0.push((name.to_string(), vec![value])),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| | median | lowest | highest |\n|---|---:|---:|---:|")?;
        for (name, values) in &self.0 {
            let mut values = values.clone();
            values.sort_by(f64::total_cmp);
            let (low, high) = (values[0], values[values.len() - 1]);
            let median = values[(values.len() - 1) / 2];
            writeln!(f, "| {name} | {} | {} | {} |", short(median), short(low), short(high))?;
        }
        Ok(())
    }
}

fn short(value: f64) -> String {
    match value.abs() {
        x if x >= 100.0 => format!("{value:.0}"),
        x if x >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Describes the machine in one line.
pub fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, value)| value)
    };
    let cpus = info.lines().filter(|line| line.starts_with("processor")).count();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split_whitespace().next().unwrap_or("unknown");
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!(
        "{cpus} x {} (family {}, model {}), Linux {}, load {load} before",
        field("model name"),
        field("cpu family"),
        // The line that is no "model name".
        info.lines()
            .find(|line| line.starts_with("model\t"))
            .and_then(|line| line.split_once(": "))
            .map_or("unknown", |(_, value)| value),
        kernel.trim()
    )
}
