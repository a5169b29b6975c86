//! Reads a working directory as a [`Source`], for `skerry render` and `skerry diff`.

use crate::qualification::Profiles;
use skerry_reconciler_core::{FILE_MAX, Rendered, Source, SourceError, render};
use std::fs;
use std::path::{Path, PathBuf};

/// Why a folder could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The folder itself or something in it.
    #[error("could not read `{path}`")]
    Io {
        /// What could not be read.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Too much in it.
    #[error("the folder cannot be used")]
    Source {
        /// Which bound.
        source: SourceError,
    },
}

impl ReadError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Io { .. } => Some("name the folder that holds `fleet.yaml`".to_owned()),
            Self::Source { .. } => Some("keep large files out of the fleet's folders".to_owned()),
        }
    }
}

/// Renders a working directory, committed or not.
///
/// # Errors
///
/// [`ReadError`] if the folder cannot be read; what is wrong inside its files is in [`Rendered::all_problems`].
pub fn render_dir(path: &Path) -> Result<Rendered, ReadError> {
    let mut source = Source::default();
    let entries = list(path)?;
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == "fleet.yaml" || Source::wants_folder(&name) {
            add(&mut source, &entry.path(), &name)?;
        }
    }
    let mut rendered = render(&source);
    // For what it finds wrong.
    Profiles::new(&mut rendered);
    Ok(rendered)
}

fn add(source: &mut Source, path: &Path, name: &str) -> Result<(), ReadError> {
    let metadata = fs::symlink_metadata(path)
        .map_err(|source| ReadError::Io { path: path.to_owned(), source })?;
    if metadata.is_symlink() {
        let name = if Source::wants(name) { name.to_owned() } else { format!("{name}/") };
        source.insert_unread(name, "symbolic links are not followed; put the file itself here");
    } else if metadata.is_dir() {
        for entry in list(path)? {
            let file_name = entry.file_name();
            add(source, &entry.path(), &format!("{name}/{}", file_name.to_string_lossy()))?;
        }
    } else if Source::wants(name) {
        if metadata.len() > FILE_MAX as u64 {
            source.insert_too_large(name, metadata.len());
        } else {
            let content =
                fs::read(path).map_err(|source| ReadError::Io { path: path.to_owned(), source })?;
            source.insert(name, content.into()).map_err(|source| ReadError::Source { source })?;
        }
    }
    Ok(())
}

fn list(path: &Path) -> Result<Vec<fs::DirEntry>, ReadError> {
    let error = |source| ReadError::Io { path: path.to_owned(), source };
    fs::read_dir(path).map_err(error)?.collect::<Result<_, _>>().map_err(error)
}
