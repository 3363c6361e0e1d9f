//! Bytes that mean harm: an error or a picture, never a panic, never memory that a header claims.

use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof};
use proptest::{collection, prop_assert, prop_assert_eq, proptest, sample};

use super::*;

/// An image of each kind that is read.
fn sound() -> Vec<Vec<u8>> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let names = [
        "palette.png",
        "alpha.png",
        "grey.jpg",
        "photo-420.jpg",
        "progressive.jpg",
        "cmyk.jpg",
        "lossless.webp",
        "lossy.webp",
    ];
    let mut all: Vec<Vec<u8>> =
        names.iter().map(|name| std::fs::read(folder.join(name)).unwrap()).collect();
    all.push(png(&noise(24 * 24, 4), 24, 24, Color::L8));
    all.push(jpeg(&noise(24 * 24, 4), 24, 24, Color::L8));
    all
}

/// Noise, noise behind the first bytes of an image, and images edited or cut off anywhere. Half of
/// the edits hit the first bytes, where sizes are.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let noise = collection::vec(any::<u8>(), 0..400);
    let image = || sample::select(sound());
    let headed = (image(), 0usize..60, noise.clone())
        .prop_map(|(image, keep, noise)| [&image[..keep], &noise].concat());
    let edit = (prop_oneof![0usize..64, any::<usize>()], any::<u8>());
    let edited = (image(), collection::vec(edit, 1..8)).prop_map(|(mut bytes, edits)| {
        let n = bytes.len();
        edits.into_iter().for_each(|(at, byte)| bytes[at % n] = byte);
        bytes
    });
    let cut = (image(), any::<sample::Index>()).prop_map(|(mut bytes, at)| {
        bytes.truncate(at.index(bytes.len()));
        bytes
    });
    prop_oneof![1 => noise, 2 => headed, 6 => edited, 2 => cut, 1 => Just(Vec::new())]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn hostile_bytes(bytes in hostile(), corner in (any::<u32>(), any::<u32>())) {
        let probed = probe(&bytes).ok().map(|info| info.size);
        let mut decoder = Decoder::new();
        if let Ok(size) = decoder.decode(&bytes) {
            prop_assert_eq!(Some(size), probed);
            let pixels = size.height as usize * size.width as usize;
            prop_assert_eq!(decoder.whole(3).len(), 3 * pixels);
        }
        let target = shape(8, 9, 3);
        let mut out = vec![0; target.bytes()];
        let choose = |size: Size| {
            let (top, left) = (corner.0 % size.height, corner.1 % size.width);
            let (height, width) = ((size.height - top).min(50), (size.width - left).min(50));
            (CropBox { top, left, height, width }, true)
        };
        let part = decoder.decode_and_render(&bytes, choose, target, &mut out);
        prop_assert!(part.is_err() || part.ok() == probed);
        #[cfg(feature = "turbo")]
        if let Ok(Some(layout)) = decoder.planes(&bytes, &mut PlaneBuffers::default()) {
            prop_assert_eq!(Some(layout.size), probed);
        }
    }
}

/// Sets the size that the header of an image claims.
fn claim(bytes: &mut [u8], width: u16, height: u16) {
    if bytes.starts_with(b"RIFF") {
        assert_eq!(bytes[12..16], *b"VP8L");
        let packed = u32::from(width - 1) & 0x3FFF | (u32::from(height - 1) & 0x3FFF) << 14;
        bytes[21..25].copy_from_slice(&packed.to_le_bytes());
    } else if bytes[0] == 0xFF {
        let at = bytes.windows(2).position(|pair| matches!(pair, [0xFF, 0xC0..=0xC2])).unwrap();
        bytes[at + 5..at + 7].copy_from_slice(&height.to_be_bytes());
        bytes[at + 7..at + 9].copy_from_slice(&width.to_be_bytes());
    } else {
        bytes[16..20].copy_from_slice(&u32::from(width).to_be_bytes());
        bytes[20..24].copy_from_slice(&u32::from(height).to_be_bytes());
        let mut crc = flate_crc(&bytes[12..29]).to_be_bytes();
        bytes[29..33].swap_with_slice(&mut crc);
    }
}

/// The checksum of PNG's chunks.
fn flate_crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 }
        })
    })
}

/// Bytes of memory that this process has had at most.
fn most_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
}

const PRINT_MEMORY: &str = "LACUNA_TEST_PRINT_MEMORY";

/// Decodes images that claim far more than they hold, for the process of the next test.
#[test]
fn memory_of_this_process() {
    if std::env::var_os(PRINT_MEMORY).is_none() {
        return;
    }
    let before = most_memory();
    let all = sound();
    for i in [0, 1, 2, 3, 4, 5, 6] {
        // Beyond the limit, and just below it.
        for (width, height) in [(65_500, 65_500), (8192, 8192), (16_383, 4096)] {
            let mut bytes = all[i].clone();
            claim(&mut bytes, width, height);
            let mut decoder = Decoder::new();
            let result = decoder.decode(&bytes);
            assert!(result.is_err(), "image {i} of {width}x{height}");
            #[cfg(feature = "turbo")]
            assert!(!matches!(decoder.planes(&bytes, &mut PlaneBuffers::default()), Ok(Some(_))));
            println!("{i} {width}x{height}: {} MiB", (most_memory() - before) >> 20);
        }
    }
    println!("memory {}", most_memory() - before);
}

#[test]
fn memory_is_for_bytes_that_are_there() {
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tests::hostile::memory_of_this_process", "--nocapture"])
        .env(PRINT_MEMORY, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("memory ")).unwrap_or_else(|| {
        panic!("{text}\n{}", String::from_utf8_lossy(&child.stderr));
    });
    // What is claimed takes 64 to 512 MiB each time.
    assert!(line.parse::<u64>().unwrap() < 48 << 20, "{text}");
}
