//! Probes against their definitions: how a head moves, and what it says of an image.

use lacuna_recipe::state::Layout;

use super::*;

fn probe(optimizer: Optimizer) -> TaskSpec {
    TaskSpec { optimizer, ..task(TaskKind::Linear, Pool::Pixels) }
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Two updates of LARS: a matrix moves by the ratio of its norms and decays, a bias does neither.
#[test]
fn a_probe_in_large_batches_follows_lars() {
    let mut engine = engine(&spec(probe(Optimizer::Lars)));
    let layout = engine.layout().clone();
    let params = |engine: &TaskEngine, name: &str| -> Vec<f64> {
        let range = layout.range(layout.find(name).unwrap());
        let mut values = vec![0f32; range.len()];
        engine.read(Section::Param, range, &mut values).unwrap();
        values.into_iter().map(f64::from).collect()
    };
    let mean: Vec<f32> = (0..layout.numel()).map(|i| (i as f32 * 0.7).sin()).collect();
    let of = |name: &str| -> Vec<f64> {
        mean[layout.range(layout.find(name).unwrap())].iter().map(|g| f64::from(*g)).collect()
    };
    let (lr, decay) = (0.5, 0.1);
    let adamw = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: decay };
    let mut moments: Vec<Vec<f64>> =
        ["head.weight", "head.bias"].map(|n| vec![0.0; of(n).len()]).into();
    for t in 1..=2 {
        let mut wanted = Vec::new();
        for (name, moment) in ["head.weight", "head.bias"].into_iter().zip(&mut moments) {
            let (mut values, grad) = (params(&engine, name), of(name));
            let decay = if name == "head.weight" { decay } else { 0.0 };
            let moved: Vec<f64> = values.iter().zip(&grad).map(|(p, g)| g + decay * p).collect();
            let trust = match name {
                "head.weight" => 0.001 * norm(&values) / norm(&moved),
                _ => 1.0,
            };
            for ((p, m), d) in values.iter_mut().zip(moment).zip(moved) {
                *m = 0.9 * *m + trust * d;
                *p -= lr * *m;
            }
            wanted.push((name, values));
        }
        let update = UpdateScalars { lr, t, adamw: adamw.clone(), decay_tokens: false };
        engine.apply(&mean, &update).unwrap();
        for (name, wanted) in wanted {
            let got = params(&engine, name);
            let off = got.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(off < 1e-6, "{name} is off by {off:e} after {t}");
        }
    }
}

/// A probe's logits are its head on features that are normalised by statistics of the training set.
#[test]
fn a_probe_reads_normalised_features() {
    let (task, model) = (probe(Optimizer::Sgd), micro());
    let layout = Layout::new(classifier_params(&task, &model));
    let params: Vec<f32> = (0..layout.numel()).map(|i| (i as f32 * 0.3).sin()).collect();
    let mut head = Head::new(&task, &model, (&[0.5; 3], &[0.25; 3]), None, &params);
    assert!(head.wants_statistics());
    let pixels: Vec<u8> = (0..4 * 8 * 8 * 3).map(|i| (i * 37 % 251) as u8).collect();
    let features: Vec<f64> = head.features(&pixels).into_iter().map(f64::from).collect();
    let d = head.feature_width();
    let rows: Vec<&[f64]> = features.chunks(d).collect();
    assert_eq!((rows.len(), d), (4, 8 * 8 * 3));
    let total = |of: fn(f64) -> f64| -> Vec<f64> {
        (0..d).map(|j| rows.iter().map(|row| of(row[j])).sum()).collect()
    };
    let (sums, squares) = (total(|x| x), total(|x| x * x));
    head.set_statistics(4, &sums, &squares);
    assert!(!head.wants_statistics());

    let logits = head.logits(&pixels);
    let weight = &params[layout.range(layout.find("head.weight").unwrap())];
    let bias = &params[layout.range(layout.find("head.bias").unwrap())];
    for (i, row) in rows.iter().enumerate() {
        for class in 0..5 {
            let mut want = f64::from(bias[class]);
            for j in 0..d {
                let mean = sums[j] / 4.0;
                let var = squares[j] / 4.0 - mean * mean;
                want += f64::from(weight[class * d + j]) * (row[j] - mean) / (var + 1e-6).sqrt();
            }
            let got = f64::from(logits[i * 5 + class]);
            assert!((got - want).abs() < 1e-3, "image {i}, class {class}: {got} and {want}");
        }
    }
}
