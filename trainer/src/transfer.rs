//! Weights on their way to an engine that has its own: a Hugging Face directory for each version,
//! in memory where there is a file system for that. The last two stay, for a server that comes
//! back late; all go at the end.

use crate::{
    checkpoint::{save_source, save_weights},
    config::{Config, EngineKind},
    error::TrainError,
    served::Served,
};
use onpolicy_engine::{model::loading::Source, remote::is_local, weights::Weights};
use onpolicy_plugin_api::{Engine, EngineError, WeightUpdate};
use std::{
    collections::VecDeque,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};
use tempfile::TempDir;

/// A file system in memory.
const MEMORY: &str = "/dev/shm";
const PREFIX: &str = "onpolicy-";
/// Held by the process that a folder belongs to.
const LOCK: &str = "lock";
/// Versions that are kept.
const KEPT: usize = 2;

/// Writes versions of the weights and gives them to the engine.
pub struct Transfer {
    engine: Arc<dyn Engine>,
    weights: Weights,
    source: Source,
    written: VecDeque<PathBuf>,
    folder: TempDir,
    _lock: File,
}

impl Transfer {
    /// Where `config` says, for the engine and the weights of `served`.
    ///
    /// # Errors
    /// A folder that cannot be made, or one that servers on other machines would not see.
    pub fn new(config: &Config, served: &Served) -> Result<Self, TrainError> {
        let parent = parent(config)?;
        sweep(&parent);
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(&parent);
        let folder = folder.map_err(|e| TrainError::file(&parent, e))?;
        let path = folder.path().join(LOCK);
        let lock = File::create(&path).and_then(|file| file.lock().map(|()| file));
        Ok(Self {
            engine: served.engine.clone(),
            weights: served.weights.share(),
            source: served.source.clone(),
            written: VecDeque::new(),
            _lock: lock.map_err(|e| TrainError::file(&path, e))?,
            folder,
        })
    }

    /// Writes the weights as they are now and blocks until the engine serves them as `version`.
    ///
    /// # Errors
    /// What the file system or the engine refuses, or an engine that then serves another version.
    pub fn deliver(&mut self, version: u64) -> Result<(), TrainError> {
        let dir = self.folder.path().join(format!("version-{version:06}"));
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(|e| TrainError::file(&dir, e))?;
        }
        fs::create_dir(&dir).map_err(|e| TrainError::file(&dir, e))?;
        self.written.retain(|known| *known != dir);
        self.written.push_back(dir.clone());
        save_weights(&self.weights, &dir.join("model.safetensors"))?;
        save_source(&self.source, &self.weights, &dir)?;
        self.engine.update_weights(WeightUpdate::Directory(dir), Some(version))?;
        let served = self.engine.weight_version();
        if served != version {
            let reason = format!("it serves weights {served} after the update to {version}");
            return Err(EngineError::Internal(reason).into());
        }
        while self.written.len() > KEPT {
            let old = self.written.pop_front().expect("more than are kept");
            fs::remove_dir_all(&old).map_err(|e| TrainError::file(&old, e))?;
        }
        Ok(())
    }
}

/// The folder that the run's own lies in.
fn parent(config: &Config) -> Result<PathBuf, TrainError> {
    if let Some(dir) = &config.engine.transfer_dir {
        let dir = PathBuf::from(dir);
        fs::create_dir_all(&dir).map_err(|e| TrainError::file(&dir, e))?;
        return Ok(dir);
    }
    if let EngineKind::Remote(urls) = config.engine.kind()
        && let Some(url) = urls.iter().find(|url| !is_local(url))
    {
        return Err(TrainError::Refused(format!(
            "{url} is another machine: set engine.transfer_dir to a folder that it and this \
             machine share"
        )));
    }
    let memory = Path::new(MEMORY);
    let folder = if memory.is_dir() { memory.into() } else { PathBuf::from(&config.output.dir) };
    fs::create_dir_all(&folder).map_err(|e| TrainError::file(&folder, e))?;
    Ok(folder)
}

/// Removes the folders of runs that were killed: nobody holds their locks any more.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let named = entry.file_name().to_string_lossy().starts_with(PREFIX);
        let Some(lock) = named.then(|| File::open(entry.path().join(LOCK)).ok()).flatten() else {
            continue;
        };
        if lock.try_lock().is_ok() {
            // What cannot be removed is in nobody's way.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_dead_runs_are_removed_and_no_others() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = |name: &str| {
            let path = parent.path().join(name);
            fs::create_dir(&path).expect("a folder");
            path
        };
        let (dead, live, other) = (folder("onpolicy-a"), folder("onpolicy-b"), folder("c"));
        let lock = |path: &Path| File::create(path.join(LOCK)).expect("a file");
        drop(lock(&dead));
        drop(lock(&other));
        let held = lock(&live);
        held.lock().expect("a lock");
        sweep(parent.path());
        assert!(!dead.exists() && live.exists() && other.exists());
    }
}
