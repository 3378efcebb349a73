//! Compiled programs: in memory for each device, and on disk for the next process.

use super::{
    CudaError,
    driver::{Attribute, Driver, Function, Module},
    launch::Launch,
    nvrtc::Compiler,
    source::Program,
};
use rapidhash::v3::rapidhash_v3;
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{LazyLock, Mutex, PoisonError},
};

#[derive(Default)]
struct Loaded {
    modules: HashMap<(usize, Program), Module>,
    functions: HashMap<(usize, Program, &'static str), Function>,
}

static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);

/// The kernel of a launch on device `index`, compiled if that has not been done yet.
pub(super) fn function(index: usize, launch: &Launch) -> Result<Function, CudaError> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(&function) = loaded.functions.get(&(index, launch.program, launch.name)) {
        return Ok(function);
    }
    let driver = Driver::get()?;
    let module = match loaded.modules.get(&(index, launch.program)) {
        Some(&module) => module,
        None => {
            let module = driver.load(&cubin(launch.program, capability(index)?)?)?;
            loaded.modules.insert((index, launch.program), module);
            module
        }
    };
    let function = driver.function(module, &format!("kernel_{}", launch.name), launch.shared)?;
    loaded.functions.insert((index, launch.program, launch.name), function);
    Ok(function)
}

/// Compute capability of device `index`.
pub(super) fn capability(index: usize) -> Result<(i32, i32), CudaError> {
    let driver = Driver::get()?;
    let major = driver.attribute(index, Attribute::Major)?;
    let minor = driver.attribute(index, Attribute::Minor)?;
    if major < 8 {
        let reason = format!("a device of compute capability {major}.{minor}; 8.0 is the least");
        return Err(CudaError::Unsupported(reason));
    }
    Ok((major, minor))
}

fn cubin(program: Program, capability: (i32, i32)) -> Result<Vec<u8>, CudaError> {
    let compiler = Compiler::get()?;
    let text = format!("{:?} {capability:?} {}", compiler.version(), program.device_source());
    let file = directory().map(|directory| file_of(&directory, &text));
    if let Some(kept) = file.as_deref().and_then(kept) {
        return Ok(kept);
    }
    let (cubin, _) = compiler.compile(program, capability)?;
    if let Some(file) = file {
        keep(&file, &cubin);
    }
    Ok(cubin)
}

/// `kernels` in `ONPOLICY_CACHE`, or in the user's cache.
fn directory() -> Option<PathBuf> {
    let own = std::env::var_os("ONPOLICY_CACHE").map(PathBuf::from);
    let users = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/onpolicy"));
    Some(own.or_else(users)?.join("kernels"))
}

fn file_of(directory: &Path, text: &str) -> PathBuf {
    directory.join(format!("{:016x}.cubin", rapidhash_v3(text.as_bytes())))
}

fn kept(file: &Path) -> Option<Vec<u8>> {
    std::fs::read(file).ok().filter(|cubin| cubin.starts_with(b"\x7fELF"))
}

/// A cache that cannot be written is no error: kernels are compiled anew then.
fn keep(file: &Path, cubin: &[u8]) {
    let parts = file.with_extension(format!("{}", std::process::id()));
    let write = || {
        std::fs::create_dir_all(file.parent()?).ok()?;
        std::fs::write(&parts, cubin).ok()?;
        std::fs::rename(&parts, file).ok()
    };
    if write().is_none() {
        let _ = std::fs::remove_file(&parts);
        tracing::debug!("compiled kernels cannot be kept in {}", file.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_found_by_its_source_alone() {
        let directory = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|text| file_of(&directory.path().join("k"), text));
        assert_ne!(one, other);
        assert_eq!(kept(&one), None);
        keep(&one, b"\x7fELF code");
        keep(&other, b"cut off");
        assert_eq!(kept(&one).unwrap(), b"\x7fELF code");
        assert_eq!(kept(&other), None);
    }
}
