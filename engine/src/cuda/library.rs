//! Shared objects that are opened while the program runs.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    ptr::NonNull,
};

// The C library's, which the standard library links anyway; values as on Linux.
const NOW: c_int = 2;
const GLOBAL: c_int = 0x100;

unsafe extern "C" {
    fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *mut c_char;
}

/// An open shared object; it is never closed.
#[derive(Debug, Clone, Copy)]
pub struct Library(NonNull<c_void>);

// SAFETY: a handle to what stays open; dlsym may be called from any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Opens the first of `names` that can be opened, its symbols for itself.
    ///
    /// # Errors
    /// What the system said of each.
    pub fn open(names: &[PathBuf]) -> Result<Self, String> {
        first(names, NOW)
    }

    /// As [`Library::open`]; its symbols are for all that is opened later.
    ///
    /// # Errors
    /// As [`Library::open`].
    pub fn open_global(names: &[PathBuf]) -> Result<Self, String> {
        first(names, NOW | GLOBAL)
    }

    /// A function of it.
    ///
    /// # Errors
    /// The name, if it has none such.
    ///
    /// # Safety
    /// `F` is the type of a function pointer with the signature of what has this name.
    pub unsafe fn function<F: Copy>(&self, name: &str) -> Result<F, String> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        let symbol = CString::new(name).map_err(|_| name.to_string())?;
        // SAFETY: an open library and a C string.
        let found = unsafe { dlsym(self.0.as_ptr(), symbol.as_ptr()) };
        if found.is_null() {
            return Err(format!("it has no '{name}'"));
        }
        // SAFETY: a pointer to the function; the caller vouches for its type.
        Ok(unsafe { std::mem::transmute_copy(&found) })
    }
}

fn first(names: &[PathBuf], flags: c_int) -> Result<Library, String> {
    let mut said = Vec::new();
    for name in names {
        match open(name, flags) {
            Ok(library) => return Ok(library),
            Err(error) => said.push(error),
        }
    }
    Err(said.join("; "))
}

fn open(name: &Path, flags: c_int) -> Result<Library, String> {
    let path = CString::new(name.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: a C string; what runs as the library opens is its own business.
    let handle = unsafe { dlopen(path.as_ptr(), flags) };
    NonNull::new(handle).map(Library).ok_or_else(|| {
        // SAFETY: a C string, or null, that lives until the thread's next call of these functions.
        let said = unsafe {
            let said = dlerror();
            (!said.is_null()).then(|| CStr::from_ptr(said).to_string_lossy().into_owned())
        };
        said.unwrap_or_else(|| format!("{} cannot be opened", name.display()))
    })
}

/// Where the running program's libtorch lies.
pub fn torch_directory() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps.lines().find_map(|line| {
        let path = &line[line.find('/')?..];
        path.ends_with("/libtorch_cpu.so").then(|| PathBuf::from(path))
    })?;
    path.parent().map(Path::to_path_buf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_what_is_there_and_says_what_is_not() {
        let here = Library::open(&["libnot_there.so.9".into(), "libm.so.6".into()]).unwrap();
        // SAFETY: the C library's.
        let fabs = unsafe { here.function::<unsafe extern "C" fn(f64) -> f64>("fabs") }.unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { fabs(-27.5) }, 27.5);
        // SAFETY: there is no such function.
        let missing = unsafe { here.function::<unsafe extern "C" fn()>("no_such_function") };
        assert_eq!(missing.unwrap_err(), "it has no 'no_such_function'");
        let error = Library::open(&["libnot_there.so.9".into()]).unwrap_err();
        assert!(error.contains("libnot_there.so.9"), "{error}");
    }

    #[test]
    fn finds_libtorch() {
        // Something of libtorch has to be in use.
        assert_eq!(tch::Tensor::from(1f32).numel(), 1);
        assert!(torch_directory().unwrap().join("libtorch_cpu.so").exists());
    }
}
