//! Memory that is short: how much this machine has, and what a user can do about it.

use crate::error::Error;

/// The settings that make a plan smaller, in words.
pub(super) const REMEDY: &str = "--batch, --branches, --widths or --blocks lower the need, and mlnt plan shows it";

/// The error of a device without `bytes` of memory.
pub(super) fn shortage(device: &str, bytes: usize, why: impl std::fmt::Display) -> Error {
    Error::usage(format_args!("device {device}: {:.3} GB of memory: {why}; {REMEDY}", bytes as f64 / 1e9))
}

/// Memory of the host that can be had without swapping and within the limits of a container, bytes; `None` where the
/// system does not tell.
pub(super) fn host_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let machine = line.split_whitespace().nth(1)?.parse::<usize>().ok()?.checked_mul(1024)?;
    let number = |file: &str| std::fs::read_to_string(file).ok()?.trim().parse::<usize>().ok();
    let container = number("/sys/fs/cgroup/memory.max")
        .map(|max| max.saturating_sub(number("/sys/fs/cgroup/memory.current").unwrap_or(0)));
    Some(container.map_or(machine, |c| c.min(machine)))
}
