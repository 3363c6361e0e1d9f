//! Reports of evaluations as a page to look at: one HTML file with everything in it.

use std::fmt::Write as _;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use base64::Engine as _;
use image::{DynamicImage, GrayImage, RgbImage};
use lacuna_data::pack::class_names;
use lacuna_data::{Dataset, ImageShape, SampleReader};
use lacuna_recipe::eval::metrics::Tally;
use lacuna_types::SampleId;

use super::batches::ViewArgs;
use super::feature_file::Partial;
use super::io;

/// Classes of which a confusion matrix is drawn whole; of more, the pairs that are confused most.
const MATRIX_MAX: usize = 40;
/// Pairs of classes that are listed instead.
const PAIRS_MAX: usize = 40;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:24px auto;\
padding:0 20px;color:#1b1f24;background:#fff}h1{font-size:22px}h2{font-size:16px;margin-top:28px}\
.soft{color:#5b6570}table{border-collapse:collapse;font-size:13px}td,th{padding:4px 8px;\
text-align:right;font-variant-numeric:tabular-nums;border:1px solid #e4e8ec;font-weight:400}\
th{color:#5b6570;text-align:left}.scroll{overflow-x:auto}.tiles{display:flex;flex-wrap:wrap;\
gap:12px}figure{margin:0;width:112px;font-size:12px;line-height:1.35}img{width:112px;height:auto;\
image-rendering:pixelated;border-radius:4px;display:block;background:#f5f7f9}.bad{color:#b42318}\
.good{color:#1a7f37}.row{display:flex;gap:12px;margin:10px 0}.row figure:first-child{margin-right:\
16px}";

/// A page that grows section by section.
#[derive(Debug)]
pub struct Page {
    body: String,
    classes: Vec<String>,
}

/// A sample that was taken for another class.
#[derive(Clone, Copy, Debug)]
pub struct Mistake {
    /// Which.
    pub id: u64,
    /// Its class.
    pub truth: u32,
    /// What it was taken for.
    pub said: u32,
    /// How sure the model was, 0 to 1.
    pub share: f64,
}

/// An image with what is nearest to it.
#[derive(Clone, Debug)]
pub struct Neighbours {
    /// Which image.
    pub id: u64,
    /// Its class.
    pub class: u32,
    /// Samples with their classes and cosines, the nearest first.
    pub near: Vec<(u64, u32, f32)>,
}

/// Makes text safe to stand in a page.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

impl Page {
    /// Begins a page about the data in `data`.
    pub fn new(title: &str, facts: &str, data: &Path) -> Self {
        let (title, facts) = (escaped(title), escaped(facts));
        let body = format!(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\
             <style>{STYLE}</style><h1>{title}</h1><p class=\"soft\">{facts}</p>\n"
        );
        Page { body, classes: class_names(data) }
    }

    fn name(&self, class: u32) -> String {
        match self.classes.get(class as usize) {
            Some(name) => escaped(name),
            None => class.to_string(),
        }
    }

    fn add(&mut self, text: &str) {
        self.body.push_str(text);
        self.body.push('\n');
    }

    /// Adds shares of right predictions.
    pub fn scores(&mut self, tally: &Tally) {
        let percent = |share: f64| format!("{:.2} %", 100.0 * share);
        self.add(&format!(
            "<p><b>{}</b> top-1 · {} top-5 · {} mean of the classes · {} images</p>",
            percent(tally.top1()),
            percent(tally.top5()),
            percent(tally.mean_per_class()),
            tally.n()
        ));
    }

    /// Adds what was taken for what: a row for each class.
    pub fn confusion(&mut self, tally: &Tally, n_classes: u32) {
        self.add("<h2>What was taken for what</h2>");
        if n_classes as usize > MATRIX_MAX {
            return self.confused_pairs(tally);
        }
        let mut table = String::from("<div class=\"scroll\"><table><tr><th>class</th>");
        for class in 0..n_classes {
            let _ = write!(table, "<th>{}</th>", self.name(class));
        }
        table.push_str("<th>right</th></tr>");
        for (class, row) in tally.confusion(n_classes).iter().enumerate() {
            let all: u64 = row.iter().sum();
            let _ = write!(table, "<tr><th>{}</th>", self.name(class as u32));
            for (said, &n) in row.iter().enumerate() {
                let share = if all == 0 { 0.0 } else { n as f64 / all as f64 };
                let color = if said == class { "26,127,55" } else { "180,35,24" };
                let cell = if n == 0 { String::new() } else { n.to_string() };
                let _ = write!(
                    table,
                    "<td style=\"background:rgba({color},{:.3})\">{cell}</td>",
                    0.75 * share.sqrt()
                );
            }
            let right = if all == 0 { 0.0 } else { 100.0 * row[class] as f64 / all as f64 };
            let _ = write!(table, "<td>{right:.1} %</td></tr>");
        }
        table
            .push_str("</table></div><p class=\"soft\">Rows are classes, columns predictions.</p>");
        self.add(&table);
    }

    fn confused_pairs(&mut self, tally: &Tally) {
        let mut pairs = tally.confusion_cells();
        pairs.retain(|(truth, said, _)| truth != said);
        pairs.sort_by_key(|(truth, said, n)| (std::cmp::Reverse(*n), *truth, *said));
        let mut table =
            String::from("<table><tr><th>class</th><th>taken for</th><th>images</th></tr>");
        for (truth, said, n) in pairs.into_iter().take(PAIRS_MAX) {
            let (truth, said) = (self.name(truth), self.name(said));
            let _ = write!(table, "<tr><th>{truth}</th><th>{said}</th><td>{n}</td></tr>");
        }
        table.push_str("</table>");
        self.add(&table);
    }

    /// Adds the mistakes that the model was surest of.
    pub fn mistakes(
        &mut self,
        mistakes: &[Mistake],
        images: &mut Pictures<'_>,
    ) -> anyhow::Result<()> {
        self.add("<h2>Mistakes it was surest of</h2>");
        if mistakes.is_empty() {
            self.add("<p class=\"soft\">There is none.</p>");
            return Ok(());
        }
        let mut tiles = String::from("<div class=\"tiles\">");
        for Mistake { id, truth, said, share } in mistakes {
            let _ = write!(
                tiles,
                "<figure><img src=\"{}\" alt=\"image {id}\"><span class=\"bad\">{}</span>, {:.0} \
                 %<br>is {}<br><span class=\"soft\">image {id}</span></figure>",
                images.data_uri(*id)?,
                self.name(*said),
                100.0 * share,
                self.name(*truth),
            );
        }
        tiles.push_str("</div>");
        self.add(&tiles);
        Ok(())
    }

    /// Adds images of `val` with those of `train` that are nearest to them.
    pub fn neighbours(
        &mut self,
        rows: &[Neighbours],
        val: &mut Pictures<'_>,
        train: &mut Pictures<'_>,
    ) -> anyhow::Result<()> {
        self.add("<h2>Nearest neighbours</h2>");
        for Neighbours { id, class, near } in rows {
            let mut row = format!(
                "<div class=\"row\"><figure><img src=\"{}\" alt=\"image {id}\"><b>{}</b><br>\
                 <span class=\"soft\">image {id}</span></figure>",
                val.data_uri(*id)?,
                self.name(*class)
            );
            for (sample, of, cosine) in near {
                let tone = if of == class { "good" } else { "bad" };
                let _ = write!(
                    row,
                    "<figure><img src=\"{}\" alt=\"image {sample}\"><span class=\"{tone}\">{}\
                     </span><br><span class=\"soft\">{cosine:.3}</span></figure>",
                    train.data_uri(*sample)?,
                    self.name(*of)
                );
            }
            row.push_str("</div>");
            self.add(&row);
        }
        Ok(())
    }

    /// Writes the page, and returns where it is.
    pub fn write(&self, mut file: Partial) -> anyhow::Result<PathBuf> {
        file.write(self.body.as_bytes())?;
        file.publish()
    }
}

/// Reads single images of a data set, as a model sees them.
#[derive(Debug)]
pub struct Pictures<'a> {
    dataset: &'a Dataset,
    shape: ImageShape,
    view: ViewArgs,
    reader: SampleReader,
}

impl<'a> Pictures<'a> {
    /// Reads from `dataset`, in the shape of a model's images.
    pub fn new(dataset: &'a Dataset, shape: ImageShape, view: ViewArgs) -> Self {
        Pictures { dataset, shape, view, reader: SampleReader::default() }
    }

    /// Returns an image as a PNG that stands in the page itself.
    fn data_uri(&mut self, id: u64) -> anyhow::Result<String> {
        let mut pixels = vec![0u8; self.shape.bytes()];
        let part = self.view.crop_pct;
        let read = self.reader.centered(self.dataset, SampleId(id), part, self.shape, &mut pixels);
        read.map_err(|error| io(lacuna_checkpoint::chain(&error)))?;
        let ImageShape { height, width, channels } = self.shape;
        let image = match channels {
            3 => RgbImage::from_raw(width, height, pixels).map(DynamicImage::from),
            // Of other numbers of channels the first is shown.
            n => {
                let first = pixels.into_iter().step_by(n as usize).collect();
                GrayImage::from_raw(width, height, first).map(DynamicImage::from)
            }
        };
        let mut png: Vec<u8> = Vec::new();
        let image = image.context("as many bytes as pixels")?;
        image.write_to(&mut Cursor::new(&mut png), image::ImageFormat::Png)?;
        let text = base64::engine::general_purpose::STANDARD.encode(png);
        Ok(format!("data:image/png;base64,{text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_of_classes_are_text_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let names = r#"{"version": 1, "name": "x", "input": "y", "n_samples": 2,
            "classes": ["<b>shoe</b>", "bag"]}"#;
        std::fs::write(folder.path().join("pack.json"), names).unwrap();
        let mut page = Page::new("a & b", "x", folder.path());
        let mut tally = Tally::default();
        tally.add(0, &[1]);
        tally.add(2, &[2]);
        page.scores(&tally);
        page.confusion(&tally, 3);
        assert!(page.body.contains("&lt;b&gt;shoe&lt;/b&gt;") && !page.body.contains("<b>shoe"));
        assert!(page.body.contains("a &amp; b") && page.body.contains("<th>2</th>"));
        assert!(page.body.contains("50.00 %"));
        let mut many = Page::new("many", "x", folder.path());
        many.confusion(&tally, MATRIX_MAX as u32 + 1);
        assert!(many.body.contains("<th>bag</th><td>1</td>"), "{}", many.body);
        assert!(!many.body.contains("<th>2</th><th>2</th>"), "what is right is not a mistake");
    }
}
