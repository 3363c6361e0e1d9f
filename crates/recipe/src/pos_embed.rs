//! Fixed two-dimensional sine-cosine position tables.

/// Computes the table of a `grid` (rows, columns) at `width` (a multiple of 4).
///
/// # Shapes
/// Returns `[1 + rows·columns, width]`, row-major; row 0 belongs to the class token and is zero.
/// The first half of a row encodes the **column**, the second half the row; each half is sine then
/// cosine. Every published checkpoint has it that way round.
///
/// Computed in f64 and rounded to f32 at the end.
pub fn sincos_2d(width: usize, grid: [usize; 2]) -> Vec<f32> {
    assert!(width.is_multiple_of(4), "position tables need a width that 4 divides, not {width}");
    let [rows, columns] = grid;
    let quarter = width / 4;
    let omega: Vec<f64> =
        (0..quarter).map(|k| 1.0 / libm::pow(10000.0, k as f64 / quarter as f64)).collect();
    let mut out: Vec<f32> = vec![0.0; width];
    out.reserve_exact(rows * columns * width);
    for i in 0..rows {
        for j in 0..columns {
            for place in [j, i] {
                out.extend(omega.iter().map(|w| libm::sin(place as f64 * w) as f32));
                out.extend(omega.iter().map(|w| libm::cos(place as f64 * w) as f32));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(file: &str) -> serde_json::Value {
        let path = format!("{}/../../tests/golden/{file}", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn assert_near(got: &[f32], want: &serde_json::Value) {
        let want: Vec<f64> = want.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((f64::from(*g) - w).abs() <= 1e-6, "{g} against {w}");
        }
    }

    /// T1.
    #[test]
    fn tables_of_the_reference() {
        let golden_file = golden("golden.json");
        let table = sincos_2d(768, [14, 14]);
        let row = |i: usize| &table[i * 768..(i + 1) * 768];
        let g = &golden_file["pos_embed_768_14x14"];
        assert!(row(0).iter().all(|&x| x == 0.0));
        assert_near(&row(2)[..3], &g["p_i0_j1_first3"]);
        assert_near(&row(15)[384..387], &g["p_i1_j0_idx384_386"]);
        assert_near(&row(15)[..3], &g["p_i1_j0_first3"]);
        assert_near(&row(196)[765..], &g["p_i13_j13_last3"]);
        assert_near(&row(2)[192..195], &g["p_i0_j1_idx192_194"]);
        let sum: f64 = table.iter().map(|&x| f64::from(x)).sum();
        let abs_sum: f64 = table.iter().map(|&x| f64::from(x.abs())).sum();
        assert!((sum - g["sum_f64"].as_f64().unwrap()).abs() < 1e-2);
        assert!((abs_sum - g["abs_sum_f64"].as_f64().unwrap()).abs() < 1e-2);

        let decoder = sincos_2d(512, [14, 14]);
        let g = &golden_file["pos_embed_512_14x14"];
        let sum: f64 = decoder.iter().map(|&x| f64::from(x)).sum();
        assert!((sum - g["sum_f64"].as_f64().unwrap()).abs() < 1e-2);
        let at = (1 + 3 * 14 + 5) * 512;
        assert_near(&decoder[at..at + 2], &g["p_i3_j5_first2"]);
    }

    #[test]
    fn every_entry_of_a_small_table() {
        let want = &golden("extra.json")["pos_embed_8_2x3"];
        let table = sincos_2d(8, [2, 3]);
        for (i, row) in want.as_array().unwrap().iter().enumerate() {
            assert_near(&table[i * 8..(i + 1) * 8], row);
        }
        assert_eq!(table.len(), 7 * 8);
    }
}
