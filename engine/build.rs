//! Compiles the C++ shims against the libtorch that torch-sys found.

use std::{env, path::PathBuf};

fn main() {
    let sources = ["src/torch/shim.cpp", "src/torch/cuda_shim.cpp"];
    for source in sources.into_iter().chain(["src/torch/guarded.h"]) {
        println!("cargo:rerun-if-changed={source}");
    }
    let lib = env::var("DEP_TCH_LIBTORCH_LIB")
        .expect("torch-sys did not say where libtorch is: run scripts/setup, or set LIBTORCH");
    let include = PathBuf::from(lib).parent().expect("libtorch's lib has a parent").join("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .flag("-fopenmp")
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .files(sources)
        .compile("onpolicy_shim");
    println!("cargo:rustc-link-lib=gomp");
}
