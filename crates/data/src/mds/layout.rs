//! Which of a sample's columns are its image and its label, and how a sample is laid out.

/// Names by which the image is told from other columns of encoded bytes, best first.
const IMAGE_NAMES: [&str; 6] = ["image", "jpg", "jpeg", "png", "webp", "img"];

/// Names of a column of integers that holds the class, best first.
const LABEL_NAMES: [&str; 5] = ["label", "cls", "class", "target", "y"];

/// Where image and label are among a sample's columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Bytes of each column; `None` where every sample says.
    pub(super) sizes: Vec<Option<u32>>,
    pub(super) image: usize,
    pub(super) label: Option<(usize, Int)>,
}

impl Layout {
    pub(super) fn of(
        names: &[String],
        encodings: &[String],
        sizes: &[Option<u32>],
    ) -> Result<Self, String> {
        if names.len() != encodings.len() || names.len() != sizes.len() {
            return Err(format!(
                "has {} column names, {} encodings and {} sizes",
                names.len(),
                encodings.len(),
                sizes.len()
            ));
        }
        // A writer leaves a size that is not fixed open, a reader takes 0 for that too.
        let sizes: Vec<Option<u32>> = sizes.iter().map(|size| size.filter(|&n| n > 0)).collect();
        let image = image_column(names, encodings)?;
        let label = label_column(names, encodings);
        if let Some((column, int)) = label
            && sizes[column] != Some(int.bytes as u32)
        {
            let name = names[column].escape_debug();
            let found = sizes[column].map_or("any".to_string(), |n| n.to_string());
            return Err(format!(
                "says that numbers in column `{name}` have {found} bytes, not {}",
                int.bytes
            ));
        }
        Ok(Layout { sizes, image, label })
    }
}

/// Returns what an encoding is, without its parameters.
fn kind(encoding: &str) -> &str {
    encoding.split(':').next().unwrap_or(encoding)
}

/// Tells whether a column's bytes can be those of an image file.
fn is_image(encoding: &str) -> bool {
    matches!(kind(encoding), "jpeg" | "png" | "bytes")
}

/// Tells whether a column may hold images in a form that is not read.
fn is_other_image(encoding: &str) -> bool {
    matches!(kind(encoding), "pkl" | "pil" | "ndarray" | "jpeg_array" | "jpegarray")
        || encoding.starts_with("list[")
}

fn image_column(names: &[String], encodings: &[String]) -> Result<usize, String> {
    let columns: Vec<usize> = (0..names.len()).filter(|&i| is_image(&encodings[i])).collect();
    let name_of = |i: usize| names[i].to_ascii_lowercase();
    let named = IMAGE_NAMES.iter().find_map(|name| columns.iter().find(|&&i| name_of(i) == *name));
    if let Some(&column) = named {
        return Ok(column);
    }
    let describe =
        |i: usize| format!("{}: {}", names[i].escape_debug(), encodings[i].escape_debug());
    let is_refused =
        |i: &usize| IMAGE_NAMES.contains(&name_of(*i).as_str()) && is_other_image(&encodings[*i]);
    if let Some(column) = (0..names.len()).find(is_refused) {
        return Err(format!(
            "has images in column `{}`; jpeg, png and bytes are read: write it again with one of \
             them",
            describe(column)
        ));
    }
    match columns.as_slice() {
        [column] => Ok(*column),
        [] => {
            let all: Vec<String> = (0..names.len()).map(describe).collect();
            Err(format!("has no column of encoding jpeg, png or bytes, only `{}`", all.join(", ")))
        }
        several => {
            let all: Vec<String> = several.iter().map(|&i| describe(i)).collect();
            Err(format!(
                "has several columns that may be the image, `{}`: call it `image`",
                all.join(", ")
            ))
        }
    }
}

/// How an integer is stored, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Int {
    pub(super) bytes: usize,
    is_signed: bool,
}

impl Int {
    pub(super) fn of(encoding: &str) -> Option<Self> {
        let (bytes, is_signed) = match encoding {
            "int" | "int64" => (8, true),
            "int32" => (4, true),
            "int16" => (2, true),
            "int8" => (1, true),
            "uint64" => (8, false),
            "uint32" => (4, false),
            "uint16" => (2, false),
            "uint8" => (1, false),
            _ => return None,
        };
        Some(Int { bytes, is_signed })
    }

    pub(super) fn value(self, raw: [u8; 8]) -> i128 {
        let raw = &raw[..self.bytes];
        let is_negative = self.is_signed && raw[self.bytes - 1] & 0x80 != 0;
        let mut wide: [u8; 16] = if is_negative { [0xFF; 16] } else { [0; 16] };
        wide[..self.bytes].copy_from_slice(raw);
        i128::from_le_bytes(wide)
    }
}

fn label_column(names: &[String], encodings: &[String]) -> Option<(usize, Int)> {
    LABEL_NAMES.iter().find_map(|label| {
        let is_label = |name: &String| name.eq_ignore_ascii_case(label);
        let column = names.iter().position(is_label)?;
        Some((column, Int::of(&encodings[column])?))
    })
}
