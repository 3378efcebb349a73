//! How much memory the process has used, and how much there is.

use onpolicy_engine::torch::device_memory::DeviceMemory;
use tch::{Device, Kind, Tensor};

/// Most memory that the process has held so far (`VmHWM` of `/proc/self/status`), in MiB; `None`
/// where the system does not say.
pub fn peak_mb() -> Option<f64> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Memory that the process holds now (`VmRSS`), in MiB; `None` where the system does not say.
pub fn resident_mb() -> Option<f64> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// The memory of a CUDA device; `None` where there is none.
pub fn on_device(device: Device) -> Option<DeviceMemory> {
    let Device::Cuda(index) = device else { return None };
    // The allocator knows a device once it was asked for something there.
    let _ = Tensor::f_zeros([1], (Kind::Float, device)).ok()?;
    DeviceMemory::of(index).ok()
}

/// Most memory that tensors on a device have held so far, in MiB; `None` in main memory.
pub fn device_peak_mb(device: Device) -> Option<f64> {
    Some(on_device(device)?.peak_allocated as f64 / (1u64 << 20) as f64)
}

/// Bytes of all main memory, or of a device's; `None` where the system does not say.
pub fn total(device: Device) -> Option<usize> {
    if device != Device::Cpu {
        return on_device(device).map(|memory| memory.total);
    }
    let mib = parse(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")?;
    Some((mib * 1024.0 * 1024.0) as usize)
}

fn parse(status: &str, name: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_high_water_mark() {
        let status = "Name:\tx\nVmPeak:\t  9999 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\n";
        assert_eq!(parse(status, "VmHWM:"), Some(2.0));
        assert_eq!(parse(status, "VmRSS:"), Some(1.0));
        assert_eq!(parse("Name:\tx\n", "VmHWM:"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_has_memory() {
        assert!(total(Device::Cpu).is_some_and(|bytes| bytes > 100 << 20));
        assert_eq!((on_device(Device::Cpu), device_peak_mb(Device::Cpu)), (None, None));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_uses_memory() {
        assert!(peak_mb().is_some_and(|mb| mb > 1.0));
    }
}
