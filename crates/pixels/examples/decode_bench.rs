//! Times decoding, cropping and resizing of a folder of images on one thread, as in pre-training.
//!
//! ```text
//! decode_bench FOLDER [--rounds N] [--what part|whole|decode|planes]
//! ```
//!
//! Prints one JSON line: images a second of CPU time (median round). `part` decodes what the crop
//! needs, `whole` decodes everything and crops then, `decode` does not crop,
//! `planes` starts from planes decoded before. The files lie in memory.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use lacuna_pixels::{DECODER_ID, Decoder, ImageShape, PlaneBuffers, PlaneLayout, Planes};
use lacuna_recipe::augment::{Augment, Size};
use rustix::time::{ClockId, clock_gettime};

const SHAPE: ImageShape = ImageShape { height: 224, width: 224, channels: 3 };

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = PathBuf::from(args.next().ok_or("usage: decode_bench FOLDER [--rounds N]")?);
    let (mut rounds, mut what) = (5u32, "part".to_string());
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("`{flag}` needs a value"))?;
        match flag.as_str() {
            "--rounds" => rounds = value.parse()?,
            "--what" => what = value,
            _ => return Err(format!("`{flag}` is not known").into()),
        }
    }
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<_>>()?;
    paths.sort();
    let files: Vec<Vec<u8>> = paths.iter().map(std::fs::read).collect::<std::io::Result<_>>()?;
    let mut decoder = Decoder::new();
    let mut out = vec![0; SHAPE.bytes()];
    let kept = match what.as_str() {
        "planes" => planes_of(&files)?,
        _ => Vec::new(),
    };
    let mut times: Vec<f64> = Vec::new();
    for round in 0..rounds {
        let start = cpu();
        for (id, bytes) in (0u64..).zip(&files) {
            let choose = |size: Size| Augment::PRETRAIN.draw(0, round, id, size);
            match what.as_str() {
                "part" => {
                    decoder.decode_and_render(bytes, choose, SHAPE, &mut out)?;
                }
                "whole" => {
                    let (crop, flip) = choose(decoder.decode(bytes)?);
                    decoder.render(crop, flip, SHAPE, &mut out)?;
                }
                "decode" => {
                    decoder.decode(bytes)?;
                }
                "planes" => {
                    let (layout, rows) = &kept[id as usize];
                    let (crop, flip) = choose(layout.size);
                    let planes = Planes { layout: *layout, first_band: 0, rows };
                    decoder.render_planes(planes, crop, flip, SHAPE, &mut out)?;
                }
                _ => return Err(format!("`{what}` is not part, whole, decode or planes").into()),
            }
        }
        times.push((cpu() - start).as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let rate = files.len() as f64 / times[times.len() / 2];
    let bytes = files.iter().map(Vec::len).sum::<usize>() / files.len();
    println!(
        "{{\"what\": \"{what}\", \"decoder\": \"{DECODER_ID}\", \"images\": {}, \
         \"mean_bytes\": {bytes}, \"images_per_s\": {rate:.1}}}",
        files.len()
    );
    Ok(())
}

/// Decodes all planes.
fn planes_of(files: &[Vec<u8>]) -> Result<Vec<(PlaneLayout, PlaneBuffers)>, Box<dyn Error>> {
    let mut decoder = Decoder::new();
    let mut all = Vec::new();
    for bytes in files {
        let mut kept = PlaneBuffers::default();
        let layout = decoder.planes(bytes, &mut kept)?;
        all.push((layout.ok_or("an image whose planes are not kept")?, kept));
    }
    Ok(all)
}

/// CPU time of this thread.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
