//! Members on one machine agree on shared memory, link by link.
//!
//! Each dialer offers what it made, and its peer opens it or declines; then the socket carries the
//! bytes. Offers all go out before anybody waits, so no order of ranks can wait in a circle.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::exchange::{TICK, sleep_on};
use crate::form::Group;
use crate::link::Link;
use crate::rings::{Place, Rings, Secret, place_of};
use crate::{AbortHandle, CollectiveError, MissingPeer};

const OFFER_BYTES: usize = 32;
const OFFER_MAGIC: [u8; 4] = *b"lcSM";
const ANSWER_BYTES: usize = 8;
const ANSWER_MAGIC: [u8; 4] = *b"lcSA";

/// Gives links to members at the same address shared memory, where both ends want it and can.
pub(crate) fn share(
    links: &mut [Link],
    group: &Group,
    wanted: bool,
    abort: &AbortHandle,
    deadline: Instant,
) -> Result<(), CollectiveError> {
    let own_ip = group.members[group.rank].ip();
    let is_local = |link: &&mut Link| link.addr.ip() == own_ip;
    let mut made: Vec<(&mut Link, Option<(Rings, OwnedFd)>)> = Vec::new();
    let mut opened: Vec<&mut Link> = Vec::new();
    for link in links.iter_mut().filter(is_local) {
        if link.rank > group.rank {
            opened.push(link);
            continue;
        }
        let (offer, rings) = if wanted { make() } else { (encode_offer(None), None) };
        send(&link.stream, &offer).map_err(|error| lost(link, &error))?;
        made.push((link, rings));
    }
    for link in opened {
        let offer = receive::<OFFER_BYTES>(link, abort, deadline)?;
        let place = decode_offer(&offer).map_err(|error| lost(link, &error))?;
        let rings = place.filter(|_| wanted).map(|place| Rings::open(&place));
        if let Some(Err(error)) = &rings {
            tracing::debug!(rank = link.rank, %error, "no shared memory with a member here");
        }
        link.rings = rings.and_then(Result::ok);
        let answer = encode_answer(link.rings.is_some());
        send(&link.stream, &answer).map_err(|error| lost(link, &error))?;
    }
    for (link, rings) in made {
        let answer = receive::<ANSWER_BYTES>(link, abort, deadline)?;
        let takes = decode_answer(&answer).map_err(|error| lost(link, &error))?;
        link.rings = rings.filter(|_| takes).map(|(rings, _)| rings);
    }
    Ok(())
}

/// Makes memory to offer; where that fails, the offer is that there is none.
fn make() -> ([u8; OFFER_BYTES], Option<(Rings, OwnedFd)>) {
    let made = fresh_secret().and_then(|secret| Ok((secret, Rings::create(secret)?)));
    match made {
        Ok((secret, (rings, fd))) => {
            let offer = encode_offer(Some(&place_of(&fd, secret)));
            (offer, Some((rings, fd)))
        }
        Err(error) => {
            tracing::debug!(%error, "no shared memory can be made");
            (encode_offer(None), None)
        }
    }
}

fn fresh_secret() -> io::Result<Secret> {
    let mut secret = Secret::default();
    rustix::rand::getrandom(&mut secret, rustix::rand::GetRandomFlags::empty())?;
    Ok(secret)
}

/// Sends a message at once: the kernel has room for the first bytes of a link.
fn send(mut stream: &TcpStream, message: &[u8]) -> io::Result<()> {
    match stream.write(message)? {
        n if n == message.len() => Ok(()),
        _ => Err(ErrorKind::WriteZero.into()),
    }
}

fn receive<const N: usize>(
    link: &Link,
    abort: &AbortHandle,
    deadline: Instant,
) -> Result<[u8; N], CollectiveError> {
    let (mut message, mut filled) = ([0; N], 0);
    while filled < N {
        match (&link.stream).read(&mut message[filled..]) {
            Ok(0) => return Err(lost(link, &ErrorKind::UnexpectedEof.into())),
            Ok(n) => filled += n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                abort.check()?;
                let left: Duration = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(lost(link, &ErrorKind::TimedOut.into()));
                }
                let mut fds = [PollFd::new(&link.stream, PollFlags::IN)];
                sleep_on(&mut fds, left.min(TICK))?;
            }
            Err(error) => {
                // A shutdown by `abort` looks like a lost peer; the abort is the reason.
                abort.check()?;
                return Err(lost(link, &error));
            }
        }
    }
    Ok(message)
}

fn lost(link: &Link, error: &io::Error) -> CollectiveError {
    let detail = format!("connected, and then: {error}");
    let missing = MissingPeer { rank: link.rank, addr: link.addr, detail };
    CollectiveError::NotFormed { missing: vec![missing] }
}

fn encode_offer(place: Option<&Place>) -> [u8; OFFER_BYTES] {
    let mut out = [0; OFFER_BYTES];
    out[..4].copy_from_slice(&OFFER_MAGIC);
    if let Some(Place { pid, fd, secret }) = place {
        out[4] = 1;
        out[8..12].copy_from_slice(&pid.to_le_bytes());
        out[12..16].copy_from_slice(&fd.to_le_bytes());
        out[16..].copy_from_slice(secret);
    }
    out
}

fn decode_offer(bytes: &[u8; OFFER_BYTES]) -> io::Result<Option<Place>> {
    if bytes[..4] != OFFER_MAGIC {
        return Err(io::Error::new(ErrorKind::InvalidData, "no offer of shared memory"));
    }
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
    let mut secret = Secret::default();
    secret.copy_from_slice(&bytes[16..]);
    Ok((bytes[4] == 1).then(|| Place { pid: word(8), fd: word(12), secret }))
}

fn encode_answer(takes: bool) -> [u8; ANSWER_BYTES] {
    let mut out = [0; ANSWER_BYTES];
    out[..4].copy_from_slice(&ANSWER_MAGIC);
    out[4] = u8::from(takes);
    out
}

fn decode_answer(bytes: &[u8; ANSWER_BYTES]) -> io::Result<bool> {
    if bytes[..4] != ANSWER_MAGIC {
        return Err(io::Error::new(ErrorKind::InvalidData, "no answer to an offer"));
    }
    Ok(bytes[4] == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_as_they_were() {
        let place = Place { pid: 70_000, fd: 9, secret: [3; 16] };
        assert_eq!(decode_offer(&encode_offer(Some(&place))).unwrap(), Some(place));
        assert_eq!(decode_offer(&encode_offer(None)).unwrap(), None);
        assert!(decode_offer(&[0; OFFER_BYTES]).is_err());
        assert!(decode_answer(&encode_answer(true)).unwrap());
        assert!(!decode_answer(&encode_answer(false)).unwrap());
        assert!(decode_answer(&[0; ANSWER_BYTES]).is_err());
    }
}
