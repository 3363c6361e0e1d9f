//! How libtorch must be set up so that equal machines give equal bits.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::Once;

/// Environment of a CPU trainer process, to be set before the process starts.
///
/// libtorch, oneDNN, MKL and OpenMP read these once, when they load. One thread fixes the order of
/// every sum, and AVX2 is what all machines of a mixed CPU fleet have. The last two change no
/// bits: glibc then keeps the memory of activations from slot to slot instead of returning it to
/// the kernel and faulting it in again (3 to 5 % of the CPU time of a step of `tiny`).
pub const CPU_ENV: &[(&str, &str)] = &[
    ("ATEN_CPU_CAPABILITY", "avx2"),
    ("ONEDNN_MAX_CPU_ISA", "AVX2"),
    ("OMP_NUM_THREADS", "1"),
    ("MKL_NUM_THREADS", "1"),
    ("MKL_DYNAMIC", "FALSE"),
    ("MALLOC_MMAP_THRESHOLD_", "1073741824"),
    ("MALLOC_TRIM_THRESHOLD_", "4294967296"),
];

/// Environment of a CUDA trainer process, to be set before the process starts.
///
/// cuBLAS reads the first when it loads: its work space has a fixed size, so that it chooses the
/// same algorithms each time. The host's own threads only prepare work for the device.
pub const CUDA_ENV: &[(&str, &str)] =
    &[("CUBLAS_WORKSPACE_CONFIG", ":4096:8"), ("OMP_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1")];

/// Variables that trainers do not inherit. Those of libtorch and cuBLAS choose other kernels than
/// the run's; with NCCL's a communicator would wait for ever, whatever its configuration says, or
/// meet where nobody is.
pub const FOREIGN_ENV: &[&str] = &[
    "CUBLASLT_WORKSPACE_SIZE",
    "NCCL_COMM_BLOCKING",
    "NCCL_COMM_ID",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_CUBLASLT_UNIFIED_WORKSPACE",
];

/// Returns the entries of [`CPU_ENV`] that decide bits and that this process was started without.
pub fn missing_pins() -> Vec<(&'static str, &'static str)> {
    let decides_bits = |pin: &&(&str, &str)| !pin.0.starts_with("MALLOC_");
    let differs = |pin: &&(&str, &str)| {
        std::env::var(pin.0).map_or(true, |value| !value.eq_ignore_ascii_case(pin.1))
    };
    CPU_ENV.iter().filter(decides_bits).filter(differs).copied().collect()
}

/// Runs this program again with the environment of a CPU trainer, which libraries read as they
/// load; does nothing where it has that already.
///
/// # Errors
/// The program cannot be started again.
pub fn start_again_pinned() -> io::Result<()> {
    if missing_pins().is_empty() {
        return Ok(());
    }
    let mut command = Command::new(std::env::current_exe()?);
    Err(command.args(std::env::args_os().skip(1)).envs(CPU_ENV.iter().copied()).exec())
}

/// Makes the calling thread compute alone. Thread counts belong to threads in OpenMP, so every
/// thread that computes calls this; it costs less than a microsecond.
pub fn pin_threads() {
    static PROCESS: Once = Once::new();
    // libtorch accepts this one number only once in a process.
    PROCESS.call_once(|| tch::set_num_interop_threads(1));
    tch::set_num_threads(1);
}

/// Returns the version of libtorch that this crate was built for, `2.11.0`.
pub fn library_version() -> String {
    let full = env!("LACUNA_LIBTORCH_VERSION");
    full.split('+').next().unwrap_or(full).to_string()
}

/// Describes the CPU as an engine: `cpu (libtorch 2.11.0, avx2, 1 thread)`.
pub fn describe_cpu() -> String {
    let vectors = std::env::var("ATEN_CPU_CAPABILITY").unwrap_or_else(|_| "any vectors".into());
    format!("cpu (libtorch {}, {vectors}, 1 thread)", library_version())
}
