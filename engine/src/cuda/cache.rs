//! What was found out about a device, on disk for the next process: compiled kernels, and the fastest of
//! them.

use rapidhash::v3::rapidhash_v3;
use std::path::{Path, PathBuf};

/// The file for what follows from `text`; none where there is no cache.
pub fn file(text: &str, kind: &str) -> Option<PathBuf> {
    directory().map(|directory| file_of(&directory, text, kind))
}

/// `kernels` in `ONPOLICY_CACHE`, or in the user's cache.
fn directory() -> Option<PathBuf> {
    let own = std::env::var_os("ONPOLICY_CACHE").map(PathBuf::from);
    let users = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/onpolicy"));
    Some(own.or_else(users)?.join("kernels"))
}

fn file_of(directory: &Path, text: &str, kind: &str) -> PathBuf {
    directory.join(format!("{:016x}.{kind}", rapidhash_v3(text.as_bytes())))
}

/// Writes a file whole, or not at all. A cache that cannot be written is no error: things are found
/// out anew then.
pub fn keep(file: &Path, bytes: &[u8]) {
    let parts = file.with_extension(format!("{}", std::process::id()));
    let write = || {
        std::fs::create_dir_all(file.parent()?).ok()?;
        std::fs::write(&parts, bytes).ok()?;
        std::fs::rename(&parts, file).ok()
    };
    if write().is_none() {
        let _ = std::fs::remove_file(&parts);
        tracing::debug!("{} cannot be written", file.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_found_by_its_source_alone() {
        let directory = tempfile::tempdir().unwrap();
        let [one, other] =
            ["one", "other"].map(|text| file_of(&directory.path().join("k"), text, "cubin"));
        assert_ne!(one, other);
        keep(&one, b"code");
        keep(&one, b"codes");
        assert_eq!(std::fs::read(&one).unwrap(), b"codes");
        assert!(!other.exists());
        keep(&one.join("below a file"), b"code");
        assert_eq!(
            std::fs::read_dir(one.parent().unwrap()).unwrap().count(),
            1,
            "no parts are left"
        );
    }
}
