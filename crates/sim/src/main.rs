//! `lacuna-sim`: histories by the thousand, and one at a time.

use lacuna_sim::bugs::Bug;
use lacuna_sim::history;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("replay") => {
            let seed: u64 = args[2].parse().unwrap();
            let script = history::draw(seed, Bug::None);
            print!("{script}");
            let outcome = history::play(&script, true);
            for line in outcome.transcript {
                println!("{line}");
            }
        }
        _ => {
            let (from, to): (u64, u64) = (args[2].parse().unwrap(), args[3].parse().unwrap());
            let mut bad = 0;
            let mut events = 0;
            let start = std::time::Instant::now();
            let mut cov = lacuna_sim::coverage::Coverage::default();
            for seed in from..to {
                let script = history::draw(seed, Bug::None);
                let outcome = history::play(&script, false);
                events += outcome.counts.events;
                cov.add(&outcome.coverage);
                if let Some(v) = outcome.violation {
                    bad += 1;
                    println!("{seed}: {v}");
                }
            }
            let t = start.elapsed().as_secs_f64();
            let n = (to - from) as f64;
            println!("{}", cov.tables());
            println!("{bad} bad of {n}, {:.2} ms each, {:.0} events each", t * 1e3 / n, events as f64 / n);
        }
    }
}
