//! NVRTC, the compiler of CUDA as a library: needs neither a device nor a driver.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::Path;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// Names under which NVIDIA ships it, newest first.
const NAMES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];

/// `nvrtcProgram`.
type Program = *mut c_void;

macro_rules! functions {
    ($($field:ident: $symbol:literal ($($argument:ty),*) -> $output:ty;)*) => {
        /// NVRTC's functions, each with the signature of `nvrtc.h`.
        struct Api {
            $($field: unsafe extern "C" fn($($argument),*) -> $output,)*
        }

        impl Api {
            fn find(library: &Library) -> Result<Self, &'static str> {
                $(
                    // SAFETY: the type is the one that `nvrtc.h` declares for this symbol.
                    let $field = unsafe {
                        *library
                            .get::<unsafe extern "C" fn($($argument),*) -> $output>($symbol)
                            .map_err(|_| $symbol)?
                    };
                )*
                Ok(Self { $($field,)* })
            }
        }
    };
}

functions! {
    version: "nvrtcVersion" (*mut c_int, *mut c_int) -> c_int;
    create: "nvrtcCreateProgram" (
        *mut Program, *const c_char, *const c_char, c_int, *const *const c_char,
        *const *const c_char
    ) -> c_int;
    compile: "nvrtcCompileProgram" (Program, c_int, *const *const c_char) -> c_int;
    log_size: "nvrtcGetProgramLogSize" (Program, *mut usize) -> c_int;
    log: "nvrtcGetProgramLog" (Program, *mut c_char) -> c_int;
    cubin_size: "nvrtcGetCUBINSize" (Program, *mut usize) -> c_int;
    cubin: "nvrtcGetCUBIN" (Program, *mut c_char) -> c_int;
    destroy: "nvrtcDestroyProgram" (*mut Program) -> c_int;
    error_text: "nvrtcGetErrorString" (c_int) -> *const c_char;
}

/// A kind of device that cubins are compiled for, as `sm_90`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Architecture(String);

impl Architecture {
    /// Names an architecture as NVRTC does: `sm_80`, `sm_90a`.
    pub fn named(name: &str) -> Self {
        Self(name.to_string())
    }

    /// The one of a device with this compute capability.
    pub fn of(capability: (u32, u32)) -> Self {
        Self(format!("sm_{}{}", capability.0, capability.1))
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Kernels that cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// NVRTC is not where the loader looks.
    #[error("no NVRTC: {tried}")]
    Missing {
        /// The loader's words, for each name.
        tried: String,
    },
    /// The library lacks a function.
    #[error("the NVRTC in `{library}` has no `{symbol}`")]
    SymbolMissing {
        /// File of the library.
        library: String,
        /// Name of the function.
        symbol: &'static str,
    },
    /// The source does not compile.
    #[error("`{name}` does not compile for {architecture}: {text}\n{log}")]
    Source {
        /// Name of the source.
        name: String,
        /// What it was compiled for.
        architecture: String,
        /// NVRTC's words.
        text: String,
        /// The compiler's log.
        log: String,
    },
}

/// NVRTC as this process has it. Stays loaded until the process ends.
pub struct Compiler {
    api: Api,
    version: (u32, u32),
    _handle: ManuallyDrop<Library>,
}

impl Compiler {
    /// Loads NVRTC, from `path` or from where the loader finds it.
    ///
    /// # Errors
    /// [`CompileError::Missing`] and [`CompileError::SymbolMissing`].
    pub fn load(path: Option<&Path>) -> Result<Self, CompileError> {
        let names: Vec<&Path> =
            path.map_or_else(|| NAMES.iter().map(Path::new).collect(), |path| vec![path]);
        let mut tried: Vec<String> = Vec::new();
        if let Some(path) = path {
            open_builtins(path);
        }
        for name in names {
            // SAFETY: the initialisers of NVRTC are made to run in a process at any time.
            match unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) } {
                Ok(library) => return Self::from_library(library, name),
                Err(err) => tried.push(
                    std::error::Error::source(&err)
                        .map_or_else(|| err.to_string(), ToString::to_string),
                ),
            }
        }
        Err(CompileError::Missing { tried: tried.join("; ") })
    }

    fn from_library(library: Library, name: &Path) -> Result<Self, CompileError> {
        let missing =
            |symbol| CompileError::SymbolMissing { library: name.display().to_string(), symbol };
        let api: Api = Api::find(&library).map_err(missing)?;
        let (mut major, mut minor): (c_int, c_int) = (0, 0);
        // SAFETY: both arguments point to live ints. Its only failure is a null argument.
        unsafe { (api.version)(&raw mut major, &raw mut minor) };
        let version = (major.unsigned_abs(), minor.unsigned_abs());
        Ok(Self { api, version, _handle: ManuallyDrop::new(library) })
    }

    /// Returns the version, (13, 0).
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Compiles to a cubin, without contraction of products and sums: each operation rounds once.
    ///
    /// # Errors
    /// [`CompileError::Source`] with the compiler's log.
    ///
    /// # Panics
    /// If name or source hold a zero byte.
    pub fn compile(
        &self,
        name: &str,
        source: &str,
        architecture: &Architecture,
    ) -> Result<Vec<u8>, CompileError> {
        let text = |s: &str| CString::new(s).expect("sources and names hold no zero byte");
        let mut program: Program = std::ptr::null_mut();
        let (file, code) = (text(name), text(source));
        // SAFETY: the first argument points to a live handle, both texts are C strings, and there
        // are no headers.
        let created = unsafe {
            let none: *const *const c_char = std::ptr::null();
            (self.api.create)(&raw mut program, code.as_ptr(), file.as_ptr(), 0, none, none)
        };
        let options: Vec<CString> =
            [format!("--gpu-architecture={architecture}"), "--fmad=false".to_string()]
                .iter()
                .map(|option| text(option))
                .collect();
        let places: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let compiled = if created == 0 {
            // SAFETY: the program is live, and the options are C strings.
            unsafe { (self.api.compile)(program, places.len() as c_int, places.as_ptr()) }
        } else {
            created
        };
        let result = if compiled == 0 {
            self.read(program, self.api.cubin_size, self.api.cubin).map_err(|code| (code, vec![]))
        } else {
            let log = self.read(program, self.api.log_size, self.api.log);
            Err((compiled, log.unwrap_or_default()))
        };
        if !program.is_null() {
            // SAFETY: the program is live, and nobody uses it afterwards.
            unsafe { (self.api.destroy)(&raw mut program) };
        }
        result.map_err(|(code, log)| CompileError::Source {
            name: name.to_string(),
            architecture: architecture.to_string(),
            text: self.text(code),
            log: String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_string(),
        })
    }

    /// Reads what NVRTC hands out by size and content.
    fn read(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        content: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, c_int> {
        if program.is_null() {
            return Ok(Vec::new());
        }
        let mut n_bytes: usize = 0;
        // SAFETY: the program is live, and the second argument points to a live size.
        let code = unsafe { size(program, &raw mut n_bytes) };
        if code != 0 {
            return Err(code);
        }
        let mut bytes: Vec<u8> = vec![0; n_bytes];
        // SAFETY: the program is live, and there is room for as many bytes as it said.
        let code = unsafe { content(program, bytes.as_mut_ptr().cast::<c_char>()) };
        if code == 0 { Ok(bytes) } else { Err(code) }
    }

    fn text(&self, code: c_int) -> String {
        // SAFETY: any number is allowed; the answer is a constant C string.
        unsafe { CStr::from_ptr((self.api.error_text)(code)) }.to_string_lossy().into_owned()
    }
}

/// Opens what NVRTC will open by its plain name, from the folder where NVRTC lies: where the loader
/// does not look by itself it then finds it loaded.
fn open_builtins(nvrtc: &Path) {
    let folder = nvrtc.parent().and_then(|folder| folder.read_dir().ok());
    for entry in folder.into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so") {
            continue;
        }
        // SAFETY: as for NVRTC itself.
        if let Ok(library) = unsafe { Library::open(Some(entry.path()), RTLD_NOW | RTLD_LOCAL) } {
            // Not closed, like NVRTC. What does not open, NVRTC will name.
            std::mem::forget(library);
        }
    }
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiler").field("version", &self.version).finish_non_exhaustive()
    }
}
