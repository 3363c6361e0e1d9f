use std::io::{Read as _, Write as _};
use std::net::{TcpListener as StdListener, TcpStream as StdStream};
use std::time::Instant as StdInstant;

use super::*;

/// Far above what anything here takes.
const SOON: Duration = Duration::from_secs(10);
/// Long enough for a byte over loopback to have come, had it been let through.
const A_WHILE: Duration = Duration::from_millis(150);

/// A connection through a proxy: the dialer's end, the target's end.
struct Pair {
    proxy: Proxy,
    dialer: StdStream,
    target: StdStream,
    listener: StdListener,
    _network: Network,
}

fn pair() -> Pair {
    let network = Network::new().unwrap();
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let proxy = network.open(listener.local_addr().unwrap()).unwrap();
    let dialer = dial(&proxy);
    let (target, _) = listener.accept().unwrap();
    target.set_read_timeout(Some(SOON)).unwrap();
    Pair { proxy, dialer, target, listener, _network: network }
}

fn dial(proxy: &Proxy) -> StdStream {
    let dialer = StdStream::connect(proxy.addr()).unwrap();
    dialer.set_read_timeout(Some(SOON)).unwrap();
    dialer
}

fn expect_bytes(stream: &mut StdStream, want: &[u8]) {
    let mut got = vec![0; want.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got, want);
}

fn expect_silence(stream: &mut StdStream) {
    stream.set_read_timeout(Some(A_WHILE)).unwrap();
    let err = stream.read(&mut [0]).unwrap_err();
    assert!(matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{err}");
    stream.set_read_timeout(Some(SOON)).unwrap();
}

#[test]
fn bytes_and_ends_pass() {
    let mut pair = pair();
    pair.dialer.write_all(b"ping").unwrap();
    expect_bytes(&mut pair.target, b"ping");
    pair.target.write_all(b"pong").unwrap();
    expect_bytes(&mut pair.dialer, b"pong");
    let large = vec![7u8; 3 << 20];
    let mut end = pair.dialer.try_clone().unwrap();
    let copy = large.clone();
    let sender = std::thread::spawn(move || {
        end.write_all(&copy).unwrap();
        end.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    pair.target.read_to_end(&mut got).unwrap();
    assert_eq!(got, large, "the half-closed end came after the last byte");
    sender.join().unwrap();
    pair.target.write_all(b"late").unwrap();
    expect_bytes(&mut pair.dialer, b"late");
    assert_eq!(pair.proxy.connections(), 1);
    assert_eq!(pair.proxy.bytes(), [4 + (3 << 20), 8]);
}

#[test]
fn a_cut_is_silent_one_way_and_loses_nothing() {
    let mut pair = pair();
    pair.proxy.obey("cut up".parse().unwrap());
    pair.dialer.write_all(b"held").unwrap();
    expect_silence(&mut pair.target);
    pair.target.write_all(b"other way").unwrap();
    expect_bytes(&mut pair.dialer, b"other way");
    pair.proxy.obey(Order::Resume);
    expect_bytes(&mut pair.target, b"held");
}

#[test]
fn a_cut_hides_the_end_and_new_connections() {
    let mut pair = pair();
    pair.proxy.obey(Order::Cut(Way::Both));
    pair.dialer.shutdown(std::net::Shutdown::Both).unwrap();
    expect_silence(&mut pair.target);
    let mut second = dial(&pair.proxy);
    second.write_all(b"hello").unwrap();
    expect_silence(&mut second);
    pair.listener.set_nonblocking(true).unwrap();
    assert_eq!(pair.listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    pair.listener.set_nonblocking(false).unwrap();
    pair.proxy.obey(Order::Resume);
    assert_eq!(pair.target.read(&mut [0]).unwrap(), 0, "the end arrives");
    let (mut second, _) = pair.listener.accept().unwrap();
    second.set_read_timeout(Some(SOON)).unwrap();
    expect_bytes(&mut second, b"hello");
}

#[test]
fn delay_and_throttle_take_their_time() {
    let mut pair = pair();
    pair.proxy.obey("delay 80".parse().unwrap());
    let started = StdInstant::now();
    pair.dialer.write_all(b"a").unwrap();
    expect_bytes(&mut pair.target, b"a");
    assert!(started.elapsed() >= Duration::from_millis(80));
    pair.proxy.obey(Order::Resume);
    pair.proxy.obey("throttle 10000".parse().unwrap());
    let started = StdInstant::now();
    pair.target.write_all(&[1; 2000]).unwrap();
    expect_bytes(&mut pair.dialer, &[1; 2000]);
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(195), "{took:?}");
}

#[test]
fn a_reset_ends_connections_and_lets_new_ones_in() {
    let mut pair = pair();
    pair.dialer.write_all(b"x").unwrap();
    expect_bytes(&mut pair.target, b"x");
    pair.proxy.obey(Order::Reset);
    let err = pair.dialer.read(&mut [0]).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::ConnectionReset);
    assert!(!matches!(pair.target.read(&mut [0]), Ok(n) if n > 0), "the target's end is over");
    let mut second = dial(&pair.proxy);
    second.write_all(b"again").unwrap();
    let (mut target, _) = pair.listener.accept().unwrap();
    target.set_read_timeout(Some(SOON)).unwrap();
    expect_bytes(&mut target, b"again");
}

#[test]
fn a_target_that_is_gone_resets_the_dialer() {
    let pair = pair();
    drop(pair.listener);
    let mut second = dial(&pair.proxy);
    assert!(!matches!(second.read(&mut [0]), Ok(n) if n > 0));
}

#[test]
fn orders_are_read() {
    assert_eq!("cut".parse(), Ok(Order::Cut(Way::Both)));
    assert_eq!(" cut  down ".parse(), Ok(Order::Cut(Way::Down)));
    assert_eq!("throttle 0".parse(), Ok(Order::Throttle(1)));
    assert_eq!("resume".parse(), Ok(Order::Resume));
    assert_eq!("melt".parse::<Order>(), Err("`melt`: no such order".to_string()));
    assert!("delay soon".parse::<Order>().is_err());
}

#[test]
fn only_loopback_is_forwarded_to() {
    let network = Network::new().unwrap();
    let err = network.open("192.0.2.1:80".parse().unwrap()).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::InvalidInput);
}
