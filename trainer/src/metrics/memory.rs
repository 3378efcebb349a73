//! How much memory the process has used.

/// Most memory that the process has held so far (`VmHWM` of `/proc/self/status`), in MiB; `None`
/// where the system does not say.
pub fn peak_mb() -> Option<f64> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Memory that the process holds now (`VmRSS`), in MiB; `None` where the system does not say.
pub fn resident_mb() -> Option<f64> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// Bytes of all main memory; `None` where the system does not say.
pub fn total() -> Option<usize> {
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
    fn this_process_uses_memory() {
        assert!(peak_mb().is_some_and(|mb| mb > 1.0));
        assert!(total().is_some_and(|bytes| bytes > 100 << 20));
    }
}
