use super::{HELLO_BYTES, Hello, Prover, REPLY_BYTES, Reply, prove};
use crate::Refusal;

fn hello() -> Hello {
    Hello {
        run_hash: [7; 32],
        generation: 0x0102_0304_0506_0708,
        world: 5,
        dialer: 3,
        acceptor: 1,
        nonce: [9; 32],
    }
}

#[test]
fn messages_come_back_as_they_were() {
    assert_eq!(Hello::decode(&hello().encode()), Some(hello()));
    for reply in [
        Reply::Challenge { nonce: [1; 32], proof: [2; 32] },
        Reply::Welcome,
        Reply::Refuse(Refusal::OtherRun),
        Reply::Refuse(Refusal::OtherGeneration),
        Reply::Refuse(Refusal::OtherGroup),
        Reply::Refuse(Refusal::WrongKey),
    ] {
        assert_eq!(Reply::decode(&reply.encode()), Some(reply));
    }
}

#[test]
fn other_protocols_are_not_read() {
    assert_eq!(Hello::decode(&[b'G'; HELLO_BYTES]), None);
    assert_eq!(Reply::decode(&[0; REPLY_BYTES]), None);
    assert_eq!(Reply::decode(&[9; REPLY_BYTES]), None);
}

#[test]
fn a_hello_must_fit_the_plan() {
    let expected = Hello { dialer: 0, nonce: [0; 32], ..hello() };
    let check = |change: fn(&mut Hello)| {
        let mut hello = hello();
        change(&mut hello);
        hello.check(&expected)
    };
    assert_eq!(check(|_| ()), Ok(()));
    assert_eq!(check(|hello| hello.run_hash[0] = 0), Err(Refusal::OtherRun));
    assert_eq!(check(|hello| hello.generation += 1), Err(Refusal::OtherGeneration));
    assert_eq!(check(|hello| hello.world = 6), Err(Refusal::OtherGroup));
    assert_eq!(check(|hello| hello.acceptor = 2), Err(Refusal::OtherGroup));
    assert_eq!(check(|hello| hello.dialer = 1), Err(Refusal::OtherGroup));
    assert_eq!(check(|hello| hello.dialer = 5), Err(Refusal::OtherGroup));
}

#[test]
fn a_proof_fits_one_connection_in_one_direction() {
    let base = prove(&[1; 32], Prover::Dialer, &hello(), &[2; 32]);
    assert_eq!(base, prove(&[1; 32], Prover::Dialer, &hello(), &[2; 32]));
    assert_ne!(base, prove(&[0; 32], Prover::Dialer, &hello(), &[2; 32]));
    assert_ne!(base, prove(&[1; 32], Prover::Acceptor, &hello(), &[2; 32]));
    assert_ne!(base, prove(&[1; 32], Prover::Dialer, &hello(), &[3; 32]));
    let changes: [fn(&mut Hello); 6] = [
        |hello| hello.run_hash[31] = 0,
        |hello| hello.generation = 1,
        |hello| hello.world = 4,
        |hello| hello.dialer = 2,
        |hello| hello.acceptor = 0,
        |hello| hello.nonce[31] = 0,
    ];
    for change in changes {
        let mut other = hello();
        change(&mut other);
        assert_ne!(base, prove(&[1; 32], Prover::Dialer, &other, &[2; 32]));
    }
}
