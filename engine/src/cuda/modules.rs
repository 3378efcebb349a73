//! Compiled programs: in memory for each device, and on disk for the next process.

use super::{
    CudaError, cache,
    driver::{Attribute, Driver, Function, Module},
    launch::Launch,
    nvrtc::Compiler,
    source::Program,
};
use std::{
    collections::HashMap,
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
    let file = cache::file(&text, "cubin");
    let kept = file.as_deref().and_then(|file| std::fs::read(file).ok());
    if let Some(kept) = kept.filter(|kept| kept.starts_with(b"\x7fELF")) {
        return Ok(kept);
    }
    let (cubin, _) = compiler.compile(program, capability)?;
    if let Some(file) = file {
        cache::keep(&file, &cubin);
    }
    Ok(cubin)
}
