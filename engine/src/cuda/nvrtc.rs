//! The compiler for CUDA C++ that comes with libtorch's CUDA half.

use super::{
    CudaError,
    library::{Library, torch_directory},
    source::Program,
};
use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::PathBuf,
    ptr::{null, null_mut},
    sync::OnceLock,
};

type Code = c_int;
type Handle = *mut c_void;
type Size = unsafe extern "C" fn(Handle, *mut usize) -> Code;
type Text = unsafe extern "C" fn(Handle, *mut c_char) -> Code;

/// What is called in libnvrtc.
pub struct Compiler {
    error_string: unsafe extern "C" fn(Code) -> *const c_char,
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Code,
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Code,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> Code,
    destroy: unsafe extern "C" fn(*mut Handle) -> Code,
    log: (Size, Text),
    cubin: (Size, Text),
}

/// Where the library may lie: `ONPOLICY_NVRTC`, beside libtorch's Python packages, and where the
/// system looks.
fn places() -> Vec<PathBuf> {
    let named = std::env::var_os("ONPOLICY_NVRTC").map(PathBuf::from);
    let packages = torch_directory().and_then(|lib| Some(lib.parent()?.parent()?.join("nvidia")));
    let beside = packages.into_iter().flat_map(|packages| {
        ["cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12"].map(|file| packages.join(file))
    });
    let system = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(PathBuf::from);
    named.into_iter().chain(beside).chain(system).collect()
}

/// What the compiler opens itself, by name alone: it has to be open before where the system would
/// not find it.
fn open_builtins() {
    for place in places() {
        let files = place.parent().into_iter().filter_map(|directory| directory.read_dir().ok());
        let builtins = files.flatten().flatten().map(|file| file.path()).find(|path| {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            name.is_some_and(|name| name.starts_with("libnvrtc-builtins.so."))
        });
        if builtins.is_some_and(|path| Library::open_global(&[path]).is_ok()) {
            return;
        }
    }
}

impl Compiler {
    /// The compiler, opened once.
    ///
    /// # Errors
    /// If there is none.
    pub fn get() -> Result<&'static Self, CudaError> {
        static COMPILER: OnceLock<Result<Compiler, CudaError>> = OnceLock::new();
        let open = || {
            open_builtins();
            let library = Library::open(&places());
            library.and_then(|library| Self::functions(&library)).map_err(|why| {
                CudaError::Missing {
                    what: "the compiler for kernels (libnvrtc.so)",
                    why,
                    advice: "it comes with torch for CUDA (package nvidia-cuda-nvrtc); put its \
                             directory in LD_LIBRARY_PATH, or its path in ONPOLICY_NVRTC",
                }
            })
        };
        COMPILER.get_or_init(open).as_ref().map_err(Clone::clone)
    }

    fn functions(library: &Library) -> Result<Self, String> {
        // SAFETY: the signatures are those of nvrtc.h, CUDA 13.0.
        unsafe {
            Ok(Self {
                error_string: library.function("nvrtcGetErrorString")?,
                version: library.function("nvrtcVersion")?,
                create: library.function("nvrtcCreateProgram")?,
                compile: library.function("nvrtcCompileProgram")?,
                destroy: library.function("nvrtcDestroyProgram")?,
                log: (
                    library.function("nvrtcGetProgramLogSize")?,
                    library.function("nvrtcGetProgramLog")?,
                ),
                cubin: (library.function("nvrtcGetCUBINSize")?, library.function("nvrtcGetCUBIN")?),
            })
        }
    }

    /// The compiler's version.
    pub fn version(&self) -> (i32, i32) {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two places for the answer.
        unsafe { (self.version)(&raw mut major, &raw mut minor) };
        (major, minor)
    }

    /// Compiles a program for devices of a compute capability, `(8, 0)` and the like; gives the
    /// device's code, and what the compiler said besides.
    ///
    /// # Errors
    /// In the compiler's words.
    pub fn compile(
        &self,
        program: Program,
        capability: (i32, i32),
    ) -> Result<(Vec<u8>, String), CudaError> {
        let text = |text: &str| CString::new(text).expect("sources hold no NUL");
        let (name, source) = (text(&program.to_string()), text(&program.device_source()));
        let failed = |log: String| CudaError::Compile { program: program.to_string(), log };
        // 177: functions that no kernel of the program calls.
        let options = [
            &format!("--gpu-architecture={}", program.architecture(capability)),
            "--std=c++17",
            "--diag-suppress=177",
        ];
        let options = options.map(text);
        let raw = options.each_ref().map(|option| option.as_ptr());
        let mut handle = null_mut();
        // SAFETY: C strings that live until the end of the function, and a place for the handle,
        // which is destroyed at the end.
        unsafe {
            let place = &raw mut handle;
            let created = (self.create)(place, source.as_ptr(), name.as_ptr(), 0, null(), null());
            if created != 0 {
                return Err(failed(self.text(created)));
            }
            let code = (self.compile)(handle, raw.len() as c_int, raw.as_ptr());
            let log = String::from_utf8_lossy(&fetch(self.log, handle))
                .trim_end_matches('\0')
                .trim()
                .to_string();
            let cubin = fetch(self.cubin, handle);
            (self.destroy)(place);
            if code == 0 {
                Ok((cubin, log))
            } else if log.is_empty() {
                Err(failed(self.text(code)))
            } else {
                Err(failed(log))
            }
        }
    }

    fn text(&self, code: Code) -> String {
        // SAFETY: a C string that lives for ever.
        unsafe { CStr::from_ptr((self.error_string)(code)) }.to_string_lossy().into_owned()
    }
}

/// Something that a program holds; empty if it holds none.
///
/// # Safety
/// Two functions of one thing, and a program's handle.
unsafe fn fetch((size, get): (Size, Text), handle: Handle) -> Vec<u8> {
    let mut len = 0;
    // SAFETY: as the caller says; the second function fills as many bytes as the first one says.
    unsafe {
        if size(handle, &raw mut len) != 0 {
            return Vec::new();
        }
        let mut bytes = vec![0; len];
        if get(handle, bytes.as_mut_ptr().cast()) != 0 {
            return Vec::new();
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without a compiler this says so and tests nothing.
    fn every_program_compiles_for(capability: (i32, i32)) {
        let compiler = match Compiler::get() {
            Ok(compiler) => compiler,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        for program in Program::all().into_iter().filter(|program| program.is_for(capability)) {
            let (cubin, log) = compiler.compile(program, capability).unwrap();
            assert_eq!(&cubin[..4], b"\x7fELF", "{program}");
            assert_eq!(log, "", "{program}");
        }
    }

    #[test]
    fn every_program_compiles_for_ampere() {
        every_program_compiles_for((8, 0));
    }

    #[test]
    fn every_program_compiles_for_hopper() {
        every_program_compiles_for((9, 0));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let Ok(compiler) = Compiler::get() else { return eprintln!("skipped: no compiler") };
        let program = Program::Pages(super::super::Element::F32);
        let error = compiler.compile(program, (1, 0)).unwrap_err();
        assert!(matches!(&error, CudaError::Compile { log, .. } if log.contains("architecture")));
    }
}
