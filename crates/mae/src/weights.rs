//! A flat buffer of parameters, seen as named tensors.

use std::sync::Arc;

use lacuna_recipe::model::ParamSpec;
use lacuna_recipe::state::Layout;
use tch::kind::Element;
use tch::{Device, Kind, Tensor};

/// The parameters of a model as tensors, in the canonical order of a [`Layout`].
#[derive(Debug)]
pub struct Weights {
    layout: Arc<Layout>,
    tensors: Vec<Tensor>,
}

impl Weights {
    /// Copies a flat buffer.
    pub fn copy_of<T: Element>(layout: &Arc<Layout>, flat: &[T]) -> Self {
        assert_eq!(flat.len(), layout.numel(), "one value per element of the layout");
        let tensor = |block: usize| {
            let shape = shape_of(layout, block);
            Tensor::from_slice(&flat[layout.range(block)]).view(shape.as_slice())
        };
        let tensors = (0..layout.n_blocks()).map(tensor).collect();
        Weights { layout: layout.clone(), tensors }
    }

    /// Views a flat buffer without copying it.
    ///
    /// # Safety
    /// Until the weights and every tensor computed from them are dropped, `flat` must
    /// stay alive and nobody may write to it.
    pub unsafe fn view_of<T: Element>(layout: &Arc<Layout>, flat: &[T]) -> Self {
        assert_eq!(flat.len(), layout.numel(), "one value per element of the layout");
        let tensor = |block: usize| {
            // SAFETY: the caller keeps `flat` alive and unchanged; the slice has the shape's
            // elements.
            unsafe { view(&flat[layout.range(block)], &shape_of(layout, block)) }
        };
        let tensors = (0..layout.n_blocks()).map(tensor).collect();
        Weights { layout: layout.clone(), tensors }
    }

    /// Views a flat f32 buffer at an address of `device` without copying it.
    ///
    /// # Safety
    /// As for [`view_of`](Self::view_of), and the buffer has the layout's elements.
    pub unsafe fn view_at(layout: &Arc<Layout>, address: u64, device: Device) -> Self {
        let tensor = |block: usize| {
            let at = address + (layout.range(block).start * size_of::<f32>()) as u64;
            // SAFETY: by the caller; the tensor lies inside the buffer.
            unsafe { view_at(at, &shape_of(layout, block), device) }
        };
        let tensors = (0..layout.n_blocks()).map(tensor).collect();
        Weights { layout: layout.clone(), tensors }
    }

    /// Copies the tensors to `device`, or leaves them where they are already there.
    pub fn to_device(self, device: Device) -> Self {
        let tensors = self.tensors.iter().map(|tensor| tensor.to_device(device)).collect();
        Weights { tensors, ..self }
    }

    /// Copies what matrix products use to bfloat16, and shares the rest: norms and tokens work on
    /// the residual stream, which stays f32.
    ///
    /// Half the memory is moved by products, and parameters stay exact where they are updated.
    pub fn half_products(&self) -> Self {
        let convert = |(tensor, spec): (&Tensor, &ParamSpec)| {
            let is_table = spec.name.ends_with("_token") || spec.name == "pos_embed";
            let is_product = !spec.name.contains("norm") && !is_table;
            if is_product { tensor.to_kind(Kind::BFloat16) } else { tensor.shallow_clone() }
        };
        let tensors = self.tensors.iter().zip(self.layout.params()).map(convert).collect();
        Weights { layout: self.layout.clone(), tensors }
    }

    /// Makes every tensor a leaf that gradients are taken with respect to.
    pub fn trainable(self) -> Self {
        let tensors = self.tensors.iter().map(|tensor| tensor.set_requires_grad(true)).collect();
        Weights { tensors, ..self }
    }

    /// Returns the same tensors again, without copying them.
    pub fn share(&self) -> Self {
        let tensors = self.tensors.iter().map(Tensor::shallow_clone).collect();
        Weights { layout: self.layout.clone(), tensors }
    }

    /// Returns the layout of the buffer.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Returns the tensors in canonical order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Returns the tensor `name`, which the layout must have.
    pub fn get(&self, name: &str) -> Tensor {
        let Some(block) = self.layout.find(name) else {
            panic!("the layout has no tensor `{name}`");
        };
        self.tensors[block].shallow_clone()
    }
}

/// Views values as a row-major tensor on the CPU without copying them.
///
/// # Safety
/// Until the tensor and every tensor that shares its storage or whose gradient needs it is dropped,
/// `values` must stay alive and nobody may write to it.
pub(crate) unsafe fn view<T: Element>(values: &[T], shape: &[i64]) -> Tensor {
    assert_eq!(shape.iter().product::<i64>(), values.len() as i64, "one value per element");
    let data = values.as_ptr().cast::<u8>();
    // SAFETY: `data` points to as many elements of this kind as the shape has, row-major; the
    // caller keeps them alive. No strides means contiguous.
    unsafe { Tensor::from_blob(data, shape, &[], T::KIND, Device::Cpu) }
}

/// Views f32 at an address of `device` as a row-major tensor without copying them.
///
/// # Safety
/// As for [`view`], and as many values as the shape has lie there.
pub(crate) unsafe fn view_at(address: u64, shape: &[i64], device: Device) -> Tensor {
    // SAFETY: by the caller. No strides means contiguous.
    unsafe { Tensor::from_blob(address as *const u8, shape, &[], Kind::Float, device) }
}

/// Borrows the values of a contiguous tensor on the CPU.
pub(crate) fn values<T: Element>(tensor: &Tensor) -> &[T] {
    assert!(
        tensor.is_contiguous() && tensor.kind() == T::KIND && tensor.device() == Device::Cpu,
        "values are borrowed from contiguous tensors of their kind on the CPU"
    );
    let (data, n) = (tensor.data_ptr().cast::<T>().cast_const(), tensor.numel());
    if n == 0 {
        return &[];
    }
    // SAFETY: the storage of a contiguous tensor holds `n` elements of its kind from `data_ptr` on
    // and lives at least as long as the borrow; in-place operations need the tensor itself.
    unsafe { std::slice::from_raw_parts(data, n) }
}

fn shape_of(layout: &Layout, block: usize) -> Vec<i64> {
    layout.params()[block].shape.iter().map(|&n| n as i64).collect()
}
