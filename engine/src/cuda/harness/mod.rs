//! Kernels on the CPU: their sources, compiled by the C++ compiler against `machine.h`.

use super::{
    launch::{Argument, Launch},
    library::Library,
    source::Program,
};
use rapidhash::v3::rapidhash_v3;
use std::{
    collections::HashMap,
    ffi::c_void,
    path::PathBuf,
    process::Command,
    sync::{LazyLock, Mutex, PoisonError},
};

static LIBRARIES: LazyLock<Mutex<HashMap<Program, Library>>> = LazyLock::new(Mutex::default);

/// Runs a kernel to its end. One at a time: the harness has one machine.
///
/// # Safety
/// As `Launch::run`, with addresses of the CPU.
pub(super) unsafe fn run<A: Argument>(launch: &Launch, argument: &A) {
    let mut libraries = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    let library = *libraries.entry(launch.program).or_insert_with(|| build(launch.program));
    let [x, y] = launch.grid.map(|blocks| blocks as u32);
    type Kernel = unsafe extern "C" fn(*const c_void, u32, u32, u32);
    // SAFETY: the sources give every kernel this signature.
    let kernel = unsafe { library.function::<Kernel>(&format!("kernel_{}", launch.name)) };
    // SAFETY: as the caller says.
    unsafe { kernel.unwrap()(std::ptr::from_ref(argument).cast(), x, y, launch.cluster) };
}

fn build(program: Program) -> Library {
    Library::open(&[compiled(&program.harness_source())]).unwrap()
}

/// A shared object of C++, compiled unless it lies beside the tests already.
pub(crate) fn compiled(source: &str) -> PathBuf {
    let beside = std::env::current_exe().unwrap().with_file_name("kernel-harness");
    std::fs::create_dir_all(&beside).unwrap();
    let name = format!("{:016x}", rapidhash_v3(source.as_bytes()));
    let object = beside.join(format!("{name}.so"));
    if !object.exists() {
        let file = |kind: &str| beside.join(format!("{name}.{}.{kind}", std::process::id()));
        let (from, to) = (file("cpp"), file("so"));
        std::fs::write(&from, source).unwrap();
        compile(&from, &to);
        std::fs::rename(&to, &object).unwrap();
        std::fs::remove_file(&from).unwrap();
    }
    object
}

fn compile(from: &PathBuf, to: &PathBuf) {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let said = Command::new(compiler)
        .args(["-std=c++17", "-O2", "-shared", "-fPIC", "-U_FORTIFY_SOURCE"])
        .args(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"])
        .args(["-Wno-unused-function", "-o"])
        .args([to, from])
        .output()
        .unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
}
