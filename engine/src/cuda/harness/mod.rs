//! Kernels on the CPU: their sources, compiled by the C++ compiler against `machine.h`.

use super::{
    launch::{Argument, Launch},
    library::Library,
    scoped,
};
use rapidhash::v3::rapidhash_v3;
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    ffi::{CStr, c_char, c_void},
    path::{Path, PathBuf},
    process::Command,
    sync::{LazyLock, Mutex, PoisonError},
};
use tch::Tensor;

/// By a hash of their sources.
static LIBRARIES: LazyLock<Mutex<HashMap<u64, Library>>> = LazyLock::new(Mutex::default);

/// What becomes of the sources.
pub(crate) type Change = fn(String) -> String;

/// What sources that look for races begin with.
pub(super) const WATCHED: &str = "#define WATCHED\n";

thread_local! {
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
    static CHANGE: Cell<Change> = const { Cell::new(unchanged) };
    static STANDS_IN: Cell<bool> = const { Cell::new(false) };
    static LAUNCHES: RefCell<BTreeMap<&'static str, usize>> = const { RefCell::new(BTreeMap::new()) };
}

/// Whether the CPU is taken for a CUDA device as far as kernels of our own go, on this thread.
pub(crate) fn stands_in() -> bool {
    STANDS_IN.get()
}

/// Takes it for one from now on, or no longer.
pub(crate) fn stand_in(so: bool) {
    STANDS_IN.set(so);
}

/// How often this thread has launched which kernel.
pub(crate) fn launches() -> BTreeMap<&'static str, usize> {
    LAUNCHES.with_borrow(Clone::clone)
}

/// What is looked for races, and what was found.
struct Watch {
    /// Addresses and bytes of what kernels before make.
    made: Vec<(usize, usize)>,
    found: Option<String>,
}

/// The first race of the kernels that `body` launches on this thread, if there is one, with their sources
/// changed. Each may begin before those before it have ended: what these have written, and some tensors that
/// are made before all of them, it may read only after it has waited.
pub(crate) fn race<R>(
    made: &[&Tensor],
    change: Change,
    body: impl FnOnce() -> R,
) -> Option<String> {
    let place = |tensor: &&Tensor| {
        let axes = tensor.size().into_iter().zip(tensor.stride());
        let numbers = 1 + axes.map(|(size, stride)| (size - 1) * stride).sum::<i64>() as usize;
        (tensor.data_ptr() as usize, numbers * tensor.kind().elt_size_in_bytes())
    };
    let made = made.iter().map(place).collect();
    WATCH.set(Some(Watch { made, found: None }));
    drop(changed(change, body));
    WATCH.take().and_then(|watch| watch.found)
}

/// Runs `body`, whose kernels on this thread have changed sources.
pub(crate) fn changed<R>(change: Change, body: impl FnOnce() -> R) -> R {
    scoped::with(&CHANGE, change, body)
}

/// Sources as they are.
pub(crate) fn unchanged(source: String) -> String {
    source
}

/// Runs a kernel to its end. One at a time: the harness has one machine.
///
/// # Safety
/// As `Launch::run`, with addresses of the CPU.
pub(super) unsafe fn run<A: Argument>(launch: &Launch, argument: &A) {
    LAUNCHES.with_borrow_mut(|launches| *launches.entry(launch.name).or_default() += 1);
    let mut libraries = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    WATCH.with_borrow_mut(|watch| match watch {
        None => {
            let source = CHANGE.get()(launch.program.harness_source(false));
            let library = libraries.entry(rapidhash_v3(source.as_bytes()));
            let open = || Library::open(&[compiled(&source)]).unwrap();
            let library = *library.or_insert_with(open);
            // SAFETY: as the caller says.
            unsafe { call(library, launch, argument) };
        }
        Some(watch) => {
            let source = CHANGE.get()(launch.program.harness_source(true));
            let library = Library::open(&[compiled(&source)]).unwrap();
            // SAFETY: as the caller says.
            let found =
                unsafe { watched(library, &watch.made, || call(library, launch, argument)) };
            watch.found = watch.found.take().or(found);
            // SAFETY: the library has races.h.
            unsafe { add_written(library, &mut watch.made) };
        }
    });
}

/// # Safety
/// As [`run`].
unsafe fn call<A: Argument>(library: Library, launch: &Launch, argument: &A) {
    let [x, y] = launch.grid.map(|blocks| blocks as u32);
    type Kernel = unsafe extern "C" fn(*const c_void, u32, u32, u32);
    // SAFETY: the sources give every kernel this signature.
    let kernel = unsafe { library.function::<Kernel>(&format!("kernel_{}", launch.name)) };
    // SAFETY: as the caller says.
    unsafe { kernel.unwrap()(std::ptr::from_ref(argument).cast(), x, y, launch.cluster) };
}

/// # Safety
/// `body` is safe to call, and `library` has races.h.
unsafe fn watched(
    library: Library,
    made: &[(usize, usize)],
    body: impl FnOnce(),
) -> Option<String> {
    type Made = unsafe extern "C" fn(usize, usize);
    type Race = unsafe extern "C" fn() -> *const c_char;
    // SAFETY: races.h gives them these signatures.
    let (before, race) =
        unsafe { (library.function::<Made>("made_before"), library.function::<Race>("race")) };
    let (before, race) = (before.unwrap(), race.unwrap());
    for &(from, bytes) in made {
        // SAFETY: addresses are only remembered.
        unsafe { before(from, bytes) };
    }
    body();
    // SAFETY: a string that stays until the next launch, or null.
    let found = unsafe { race().as_ref().map(|text| CStr::from_ptr(text)) };
    found.map(|text| text.to_string_lossy().into_owned())
}

/// Adds what the last launch has written, address and bytes each.
///
/// # Safety
/// `library` has races.h.
unsafe fn add_written(library: Library, made: &mut Vec<(usize, usize)>) {
    type Made = Vec<(usize, usize)>;
    unsafe extern "C" fn take(made: &mut Made, from: usize, bytes: usize) {
        made.push((from, bytes));
    }
    type Each = unsafe extern "C" fn(unsafe extern "C" fn(&mut Made, usize, usize), &mut Made);
    // SAFETY: races.h gives it this signature, but for what pointers point to.
    unsafe { library.function::<Each>("each_written").unwrap()(take, made) };
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
        compile(&from, &to, source.starts_with(WATCHED));
        std::fs::rename(&to, &object).unwrap();
        std::fs::remove_file(&from).unwrap();
    }
    object
}

/// The compiler makes sources that look for races call their own functions for what they read and write.
fn compile(from: &Path, to: &Path, watched: bool) {
    let object = to.with_extension("o");
    let how: &[&str] = if watched { &["-O1", "-g", "-fsanitize=thread"] } else { &["-O2"] };
    let compiler = || Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()));
    let mut compile = compiler();
    compile.args(["-std=c++17", "-c", "-fPIC", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"]).args(how);
    compile.args(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"]);
    let mut link = compiler();
    link.args(["-shared", "-Wl,-Bsymbolic"]);
    for (command, to, from) in [(&mut compile, &*object, from), (&mut link, to, &object)] {
        let said = command.arg("-o").args([to, from]).output().unwrap();
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    }
    std::fs::remove_file(object).unwrap();
}
