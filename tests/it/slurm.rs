//! An agent that is a Slurm job: it goes back into the queue when its time is over.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use lacuna_tests::Cluster;
use lacuna_types::exit;
use rustix::process::Signal;

use crate::fixture;

#[test]
fn a_job_whose_time_is_over_leaves_in_order_and_is_queued_again() {
    let fixture = fixture();
    let (bin, said) = (fixture.path("bin"), fixture.path("scontrol.said"));
    std::fs::create_dir(&bin).unwrap();
    let scontrol = bin.join("scontrol");
    std::fs::write(&scontrol, "#!/bin/sh\necho \"$@\" >> \"$SCONTROL_SAID\"\n").unwrap();
    std::fs::set_permissions(&scontrol, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let env = [
        ("PATH", path.as_str()),
        ("SLURM_JOB_ID", "4242"),
        ("SCONTROL_SAID", said.to_str().unwrap()),
    ];
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&fixture.spec("queued", 4000, &[("elastic.workers", "\"1:2\"")]));
    let requeue = ["--on-drain", "slurm-requeue"];
    cluster.add_with("a", 1, &requeue, &env);
    cluster.add_with("b", 1, &requeue, &env);
    cluster.wait(&run, "steps of two", |seen| {
        seen.step() >= 10 && seen.run.workers.iter().filter(|w| w.rank.is_some()).count() == 2
    });
    let agent = cluster.take("a");
    agent.signal(Signal::USR1);
    assert_eq!(agent.wait().code(), Some(i32::from(exit::DRAINED)));
    assert_eq!(std::fs::read_to_string(&said).unwrap(), "requeue 4242\n");
    // What an operator takes out is not to come back.
    let agent = cluster.take("b");
    let (code, ..) = lacuna_tests::said(&fixture.run(&["drain", "b:cpu0", "-c", &cluster.url]));
    assert_eq!(code, i32::from(exit::OK));
    assert_eq!(agent.wait().code(), Some(i32::from(exit::DRAINED)));
    assert_eq!(std::fs::read_to_string(&said).unwrap(), "requeue 4242\n");
}

#[test]
fn only_a_slurm_job_can_be_queued_again() {
    let fixture = fixture();
    let output = Command::new(&fixture.binaries.worker)
        .args(["--on-drain", "slurm-requeue", "--devices", "cpu:1"])
        .env_remove("SLURM_JOB_ID")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(i32::from(exit::USAGE)), "{said}");
    assert!(said.contains("SLURM_JOB_ID is not set"), "{said}");
}
