//! Memory that starts at a page, which reads and writes past the page cache need.

/// Alignment of memory, places and sizes that direct reads and writes need on common devices.
pub(crate) const ALIGN: usize = 4096;

/// Bytes whose first one starts a page; grown and shrunk without copying.
#[derive(Default)]
pub(crate) struct Pages {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Pages {
    /// Makes `len` bytes, all 0.
    pub fn new(len: usize) -> Self {
        let mut pages = Pages::default();
        pages.resize(len);
        pages
    }

    /// Changes the number of bytes; what they are afterwards is not defined.
    pub fn resize(&mut self, len: usize) {
        if self.start + len > self.memory.len() {
            self.memory = vec![0; len + ALIGN];
            let start = self.memory.as_ptr().align_offset(ALIGN);
            // Where it cannot be told, the memory does not start a page and the cache is used.
            self.start = if start <= ALIGN { start } else { 0 };
        }
        self.len = len;
    }

    /// Returns the bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    /// Returns the bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// Tells whether `bytes` starts a page, and so does `offset` in its file.
pub(crate) fn is_aligned(bytes: &[u8], offset: u64) -> bool {
    bytes.as_ptr().align_offset(ALIGN) == 0 && offset.is_multiple_of(ALIGN as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_a_page_at_every_size() {
        let mut pages = Pages::default();
        for len in [0, 1, ALIGN, 3 * ALIGN + 5, 7] {
            pages.resize(len);
            assert_eq!(pages.bytes_mut().len(), len);
            assert!(len == 0 || is_aligned(pages.bytes(), 0), "{len} bytes");
        }
        assert!(!is_aligned(&Pages::new(2 * ALIGN).bytes()[1..], 0));
        assert!(!is_aligned(Pages::new(ALIGN).bytes(), 512));
    }
}
