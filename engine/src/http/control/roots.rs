//! Directories that weights may be loaded from, and no others.

use crate::http::error::ApiError;
use axum::http::StatusCode;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Configured directories, in canonical form. Weights may lie in them or below.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Roots(Vec<PathBuf>);

impl Roots {
    /// Roots out of existing directories.
    ///
    /// # Errors
    /// Names the first that is none.
    pub fn new(dirs: impl IntoIterator<Item = PathBuf>) -> io::Result<Self> {
        let canonical = |dir: PathBuf| {
            let wrong = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", dir.display()));
            let path = dir.canonicalize().map_err(wrong)?;
            let no_dir = || wrong(io::Error::other("is not a directory"));
            if path.is_dir() { Ok(path) } else { Err(no_dir()) }
        };
        dirs.into_iter().map(canonical).collect::<io::Result<_>>().map(Self)
    }

    /// The canonical path of a weight directory that argument `name` asks for.
    ///
    /// # Errors
    /// 403 if it lies elsewhere, or a file of it does; 400 if there is no such directory. Which of
    /// the two says nothing about what exists outside of the roots.
    pub fn admit(&self, name: &'static str, asked: &str) -> Result<PathBuf, ApiError> {
        if self.0.is_empty() {
            let message = "weights are not loaded from disk: no directory is allowed; name one \
                           in server.weight_roots (--weight-root DIR)";
            return Err(forbidden(name, message));
        }
        let path = Path::new(asked);
        let path = std::path::absolute(path)
            .ok()
            .filter(|_| path.components().all(|part| part != Component::ParentDir));
        let path = path.ok_or_else(|| ApiError::invalid(name, "must be a path without '..'"))?;
        let outside = || forbidden(name, "is not in one of server.weight_roots");
        let Ok(found) = path.canonicalize() else {
            // Only below a root is anybody told what exists.
            let missing = self.0.iter().any(|root| path.starts_with(root));
            let missing = missing.then(|| ApiError::invalid(name, "there is no such directory"));
            return Err(missing.unwrap_or_else(outside));
        };
        if !self.hold(&found) {
            return Err(outside());
        }
        if !found.is_dir() {
            return Err(ApiError::invalid(name, "is not a directory"));
        }
        self.check_files(name, &found)?;
        Ok(found)
    }

    fn hold(&self, path: &Path) -> bool {
        self.0.iter().any(|root| path.starts_with(root))
    }

    /// What is read of a weight directory are plain files within the roots.
    fn check_files(&self, name: &'static str, dir: &Path) -> Result<(), ApiError> {
        let unread = |e: io::Error| ApiError::invalid(name, format!("cannot be read: {e}"));
        for entry in fs::read_dir(dir).map_err(unread)? {
            let path = entry.map_err(unread)?.path();
            let is_read = path.extension().is_some_and(|e| e == "safetensors" || e == "json");
            if !is_read {
                continue;
            }
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let found = path.canonicalize().ok().filter(|found| self.hold(found));
            let Some(found) = found else {
                let rule = format!("{file} is a link that leads out of server.weight_roots");
                return Err(forbidden(name, &rule));
            };
            if !found.is_file() {
                return Err(ApiError::invalid(name, format!("{file} is not a plain file")));
            }
        }
        Ok(())
    }
}

fn forbidden(name: &str, message: &str) -> ApiError {
    let error = ApiError::new(StatusCode::FORBIDDEN, format!("{name}: {message}"));
    ApiError { param: Some(name.into()), ..error.with_code("forbidden_path") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn status(roots: &Roots, path: &Path) -> u16 {
        match roots.admit("weight_dir", path.to_str().unwrap()) {
            Ok(_) => 200,
            Err(error) => {
                assert_eq!(error.param.as_deref(), Some("weight_dir"), "{error:?}");
                error.status.as_u16()
            }
        }
    }

    #[test]
    fn only_what_lies_below_a_root_is_admitted() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (root, other) = (inside.path().join("weights"), outside.path());
        let step = root.join("step_1");
        fs::create_dir_all(&step).unwrap();
        fs::write(step.join("model.safetensors"), "").unwrap();
        fs::write(other.join("secret.json"), "").unwrap();
        let roots = Roots::new([root.clone()]).unwrap();
        assert_eq!(roots.admit("weight_dir", step.to_str().unwrap()).unwrap(), {
            step.canonicalize().unwrap()
        });
        assert_eq!(status(&roots, &root), 200);
        assert_eq!(status(&Roots::default(), &step), 403);
        assert_eq!(status(&roots, other), 403);
        assert_eq!(status(&roots, &other.join("nothing")), 403);
        assert_eq!(status(&roots, &root.join("nothing")), 400);
        assert_eq!(status(&roots, &step.join("model.safetensors")), 400);
        assert_eq!(status(&roots, &root.join("../weights/step_1")), 400);
        assert_eq!(status(&roots, Path::new("")), 400);
        assert_eq!(status(&roots, Path::new("src")), 403, "below the working directory");
        // A name that begins like the root's is another directory.
        let twin = inside.path().join("weights-2");
        fs::create_dir(&twin).unwrap();
        assert_eq!(status(&roots, &twin), 403);
        assert!(Roots::new([root.join("nothing")]).is_err());
        assert!(Roots::new([step.join("model.safetensors")]).is_err());
    }

    #[test]
    fn links_may_not_lead_out() {
        let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let roots = Roots::new([root.path().to_path_buf()]).unwrap();
        fs::write(outside.path().join("model.safetensors"), "").unwrap();
        symlink(outside.path(), root.path().join("away")).unwrap();
        assert_eq!(status(&roots, &root.path().join("away")), 403);
        let step = root.path().join("step");
        fs::create_dir(&step).unwrap();
        symlink(outside.path().join("model.safetensors"), step.join("model.safetensors")).unwrap();
        assert_eq!(status(&roots, &step), 403);
        // Within the roots links are fine: the hub's cache is made of them.
        fs::remove_file(step.join("model.safetensors")).unwrap();
        fs::write(root.path().join("blob"), "").unwrap();
        symlink("../blob", step.join("model.safetensors")).unwrap();
        assert_eq!(status(&roots, &step), 200);
        symlink(root.path(), step.join("config.json")).unwrap();
        assert_eq!(status(&roots, &step), 400, "no plain file");
    }
}
