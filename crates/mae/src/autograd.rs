//! Backward passes in pieces: gradients come as the pass finishes them, not all at its end.
//!
//! A forward pass that was [recorded](record) is cut at every [`border`] it crossed. The pass back
//! goes from border to border, last one first; each piece gives the gradients of the parameters in
//! it, frees what it needed, and may be summed over a group while the next one computes. The same
//! operations run in the same order as in one pass, so the bits are the same.
//!
//! tch's backward pass starts with ones only; `shim/autograd.cpp` gives it a start of our own.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_void};

use tch::Tensor;

/// libtorch could not differentiate.
#[derive(Debug, thiserror::Error)]
#[error("libtorch cannot differentiate: {0}")]
pub struct AutogradError(String);

const KEEP_GRAPH: c_int = 1;
const ALLOW_UNUSED: c_int = 2;
/// Room for the text of an exception; longer ones are cut.
const ERROR_BYTES: usize = 2048;

unsafe extern "C" {
    fn lacuna_torch_grad(
        output: *const c_void,
        weight: *const c_void,
        inputs: *const *const c_void,
        n: usize,
        flags: c_int,
        grads: *mut *mut c_void,
        error: *mut c_char,
        error_bytes: usize,
    ) -> c_int;
}

/// Computes the derivatives of `output`, weighted with `weight`, with respect to `inputs`; `None`
/// where an input has no part in it.
fn grad(
    output: &Tensor,
    weight: Option<&Tensor>,
    inputs: &[&Tensor],
    flags: c_int,
) -> Result<Vec<Option<Tensor>>, AutogradError> {
    let pointers: Vec<*const c_void> = inputs.iter().map(|input| input.as_ptr().cast()).collect();
    let mut grads: Vec<*mut c_void> = vec![std::ptr::null_mut(); inputs.len()];
    let mut error: Vec<c_char> = vec![0; ERROR_BYTES];
    // SAFETY: all tensors live until the call returns; `grads` has room for one pointer an input,
    // and `error` is as long as it says.
    let code = unsafe {
        lacuna_torch_grad(
            output.as_ptr().cast(),
            weight.map_or(std::ptr::null(), |weight| weight.as_ptr().cast()),
            pointers.as_ptr(),
            pointers.len(),
            flags,
            grads.as_mut_ptr(),
            error.as_mut_ptr(),
            error.len(),
        )
    };
    if code != 0 {
        // SAFETY: the function ends the text with a zero.
        let text = unsafe { CStr::from_ptr(error.as_ptr()) };
        return Err(AutogradError(text.to_string_lossy().into_owned()));
    }
    // SAFETY: each is null or a new tensor that belongs to whoever takes it.
    let own = |at: *mut c_void| (!at.is_null()).then(|| unsafe { Tensor::from_ptr(at.cast()) });
    Ok(grads.into_iter().map(own).collect())
}

/// A place where a backward pass may be cut.
#[derive(Debug)]
struct Border {
    /// The value as the pass before computed it.
    before: Tensor,
    /// The same value as the pass after sees it: a leaf.
    after: Tensor,
}

thread_local! {
    /// Borders of the pass that this thread records, if it does.
    static RECORD: RefCell<Option<Vec<Border>>> = const { RefCell::new(None) };
}

/// Marks a value from which everything later follows, such as what goes from one block to the next:
/// a backward pass may be cut there. Use what it returns instead of `x`, and no part of `x` itself
/// later on. It changes no bit, and nothing at all outside of a recorded pass.
pub fn border(x: Tensor) -> Tensor {
    RECORD.with_borrow_mut(|record| match record {
        Some(borders) if x.requires_grad() => {
            let after = x.detach().set_requires_grad(true);
            borders.push(Border { before: x, after: after.shallow_clone() });
            after
        }
        _ => x,
    })
}

/// A loss with the borders on the way to it.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub loss: Tensor,
    borders: Vec<Border>,
}

/// Computes a loss and notes the borders that it crosses.
pub(crate) fn record(loss: impl FnOnce() -> Tensor) -> Recorded {
    struct Stop;
    impl Drop for Stop {
        fn drop(&mut self) {
            RECORD.set(None);
        }
    }
    let _stop = Stop;
    RECORD.set(Some(Vec::new()));
    let loss = loss();
    Recorded { loss, borders: RECORD.take().unwrap_or_default() }
}

/// What one piece of a pass reaches, by index: leaves, and borders before it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Piece {
    leaves: Vec<usize>,
    borders: Vec<usize>,
}

/// How the backward passes of one computation are cut: one piece a border and one for the loss.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pieces(Vec<Piece>);

impl Pieces {
    /// Finds out what each piece of a pass reaches; the graph is kept.
    ///
    /// Returns nothing where the pass cannot be cut: a leaf takes part in several pieces, or in
    /// none.
    pub fn find(recorded: &Recorded, leaves: &[&Tensor]) -> Result<Option<Self>, AutogradError> {
        let mut seen = vec![false; leaves.len()];
        let mut pieces: Vec<Piece> = Vec::new();
        for end in 0..=recorded.borders.len() {
            let before = &recorded.borders[..end];
            let output = recorded.borders.get(end).map_or(&recorded.loss, |border| &border.before);
            let weight = output.ones_like();
            let inputs: Vec<&Tensor> =
                leaves.iter().copied().chain(before.iter().map(|border| &border.after)).collect();
            let found = grad(output, Some(&weight), &inputs, KEEP_GRAPH | ALLOW_UNUSED)?;
            let (of_leaves, of_borders) = found.split_at(leaves.len());
            let reached = |found: &[Option<Tensor>]| -> Vec<usize> {
                (0..found.len()).filter(|&idx| found[idx].is_some()).collect()
            };
            let piece = Piece { leaves: reached(of_leaves), borders: reached(of_borders) };
            for &leaf in &piece.leaves {
                if std::mem::replace(&mut seen[leaf], true) {
                    return Ok(None);
                }
            }
            pieces.push(piece);
        }
        // Where a leaf has no part, the whole pass says so.
        Ok(seen.iter().all(|seen| *seen).then_some(Pieces(pieces)))
    }

    /// Lists the leaves in the order in which [`backward`](Self::backward) comes to them.
    pub fn order(&self) -> Vec<usize> {
        self.0.iter().rev().flat_map(|piece| piece.leaves.iter().copied()).collect()
    }

    /// Tells whether a pass crossed as many borders as the one that was looked at.
    pub fn fit(&self, recorded: &Recorded) -> bool {
        recorded.borders.len() + 1 == self.0.len()
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Goes back from the loss and frees the graph; calls `sink` with the index of each leaf and
    /// its gradient, piece by piece, in the order of the leaves within one.
    pub fn backward(
        &self,
        mut recorded: Recorded,
        leaves: &[&Tensor],
        sink: &mut dyn FnMut(usize, Tensor),
    ) -> Result<(), AutogradError> {
        let n = recorded.borders.len();
        assert!(self.fit(&recorded), "pieces of another pass");
        let mut weights: Vec<Option<Tensor>> = (0..n).map(|_| None).collect();
        let mut output = Some(recorded.loss);
        for (end, piece) in self.0.iter().enumerate().rev() {
            let (output, weight) = match output.take() {
                Some(loss) => (loss, None),
                None => {
                    let border = recorded.borders.pop().expect("one a piece");
                    let Some(weight) = weights[end].take() else { continue };
                    (border.before, Some(weight))
                }
            };
            let of_leaves = piece.leaves.iter().map(|&leaf| leaves[leaf]);
            let of_borders = piece.borders.iter().map(|&border| &recorded.borders[border].after);
            let inputs: Vec<&Tensor> = of_leaves.chain(of_borders).collect();
            let mut found = grad(&output, weight.as_ref(), &inputs, 0)?.into_iter().flatten();
            for &leaf in &piece.leaves {
                sink(leaf, found.next().expect("unused inputs are errors"));
            }
            for (&border, more) in piece.borders.iter().zip(found) {
                weights[border] = Some(match weights[border].take() {
                    Some(sum) => sum + more,
                    None => more,
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
