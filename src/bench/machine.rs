//! What a figure was measured on: the machine and the versions.

use serde::{Deserialize, Serialize};
use std::{fs, path::Path};

/// The machine.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Machine {
    /// Model name of the processor.
    pub cpu: String,
    /// Cores that the process may use.
    pub cores: usize,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// The first GPU that the driver tells of.
    #[serde(default)]
    pub gpu: Option<String>,
    /// Kernel of the operating system.
    pub kernel: String,
    /// Mean number of runnable processes over the last minute, when the benchmark began.
    pub load: f64,
}

/// Where NVIDIA's driver tells of its devices.
const GPUS: &str = "/proc/driver/nvidia/gpus";

/// Versions of what ran.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Versions {
    /// This command.
    pub onpolicy: String,
    /// libtorch; none where its headers are not beside it.
    pub torch: Option<String>,
    /// The compiler that built this command.
    pub rustc: String,
}

impl Machine {
    /// This machine. What the system does not say is empty or 0.
    pub fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let load = read("/proc/loadavg");
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name").unwrap_or_default().to_string(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: kib(&read("/proc/meminfo"), "MemTotal").unwrap_or(0) >> 10,
            gpu: gpu(Path::new(GPUS)),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_string(),
            load: load.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0.0),
        }
    }
}

impl Versions {
    /// Of this process.
    pub fn here() -> Self {
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        Self {
            onpolicy: env!("CARGO_PKG_VERSION").to_string(),
            torch: torch(&maps),
            rustc: env!("ONPOLICY_RUSTC").to_string(),
        }
    }
}

/// Forgets how much memory the process, and tensors on a device, have held, so that the next [`peak_mib`] is about what
/// comes. False where the system cannot.
pub fn reset_peak() -> bool {
    // Where there is no device, there is no peak of it.
    let _ = onpolicy_engine::torch::device_memory::reset_peak(0);
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Most memory that the process has held since the last [`reset_peak`], in MiB.
pub fn peak_mib() -> Option<f64> {
    onpolicy_trainer::metrics::memory::peak_mb()
}

/// The value of the first line `name : value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim())
}

/// Model of the first device in the driver's folder.
fn gpu(folder: &Path) -> Option<String> {
    let first = fs::read_dir(folder).ok()?.flatten().next()?;
    let text = fs::read_to_string(first.path().join("information")).ok()?;
    field(&text, "Model").map(str::to_string)
}

fn kib(text: &str, name: &str) -> Option<u64> {
    field(text, name)?.strip_suffix("kB")?.trim().parse().ok()
}

/// libtorch's version, from the headers beside the library that this process has loaded.
fn torch(maps: &str) -> Option<String> {
    let library = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    let library = &library[library.find('/')?..];
    let root = Path::new(library).parent()?.parent()?;
    version(&fs::read_to_string(root.join("include/torch/headeronly/version.h")).ok()?)
}

fn version(header: &str) -> Option<String> {
    let part = |name: &str| {
        let define = format!("#define TORCH_VERSION_{name} ");
        header.lines().find_map(|line| line.strip_prefix(&define)).map(str::trim)
    };
    Some(format!("{}.{}.{}", part("MAJOR")?, part("MINOR")?, part("PATCH")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_system_writes() {
        let cpu = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: other\n";
        assert_eq!(field(cpu, "model name"), Some("Some CPU @ 2 GHz"));
        assert_eq!(kib("MemTotal:       24672264 kB\nMemFree: 1 kB\n", "MemTotal"), Some(24672264));
        assert_eq!(kib("MemFree: 1 kB\n", "MemTotal"), None);
        let header = "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 11\n\
                      #define TORCH_VERSION_PATCH 0\n";
        assert_eq!(version(header).as_deref(), Some("2.11.0"));
        assert_eq!(version("nothing"), None);
    }

    #[test]
    fn reads_what_the_driver_writes() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(gpu(folder.path()), None);
        let device = folder.path().join("0000:01:00.0");
        fs::create_dir(&device).expect("a folder");
        let text = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 255\n";
        fs::write(device.join("information"), text).expect("written");
        assert_eq!(gpu(folder.path()).as_deref(), Some("NVIDIA H100 80GB HBM3"));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_and_these_versions_are_known() {
        let machine = Machine::here();
        assert!(machine.cores >= 1 && machine.memory_mib > 100 && !machine.kernel.is_empty());
        let versions = Versions::here();
        assert!(versions.rustc.starts_with("1."), "{versions:?}");
    }
}
