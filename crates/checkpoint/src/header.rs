//! The header of a safetensors file, written so that equal content gives equal bytes.

use crate::json::quoted;

/// Multiple at which the tensor bytes of a file start: a page, so that direct I/O can read them.
const DATA_ALIGN: usize = 4096;

/// One tensor of a file, in the order of its bytes.
pub(crate) struct HeaderTensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<u64>,
    pub bytes: u64,
}

/// Renders length, JSON and padding.
pub(crate) fn render(metadata: &[(&str, &str)], tensors: &[HeaderTensor]) -> Vec<u8> {
    let mut json = String::from("{\"__metadata__\":{");
    for (i, (key, value)) in metadata.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        json.push_str(&format!("{comma}{}:{}", quoted(key), quoted(value)));
    }
    json.push('}');
    let mut at: u64 = 0;
    for tensor in tensors {
        let HeaderTensor { name, dtype, shape, bytes } = tensor;
        let shape: Vec<String> = shape.iter().map(u64::to_string).collect();
        json.push_str(&format!(
            ",{}:{{\"dtype\":\"{dtype}\",\"shape\":[{}],\"data_offsets\":[{at},{}]}}",
            quoted(name),
            shape.join(","),
            at + bytes,
        ));
        at += bytes;
    }
    json.push('}');
    let total = (8 + json.len()).next_multiple_of(DATA_ALIGN);
    let mut out: Vec<u8> = ((total - 8) as u64).to_le_bytes().to_vec();
    out.extend(json.as_bytes());
    out.resize(total, b' ');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_reader_understands_it() {
        let tensor = |name: &str, shape: &[u64], bytes: u64| HeaderTensor {
            name: name.to_string(),
            dtype: "F32",
            shape: shape.to_vec(),
            bytes,
        };
        let tensors = [tensor("b \"quoted\"", &[2, 3], 24), tensor("a", &[0], 0)];
        let mut file = render(&[("k", "{\"x\":1}")], &tensors);
        assert_eq!(file.len(), 4096);
        file.extend([0; 24]);
        let read = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(read.tensor("b \"quoted\"").unwrap().shape(), [2, 3]);
        assert_eq!(read.tensor("a").unwrap().data().len(), 0);
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["k"], "{\"x\":1}");
    }
}
