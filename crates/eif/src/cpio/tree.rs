//! [`Tree`]: a file tree described in memory and on disk, written as one archive.
//!
//! Names are sorted as byte strings, so a directory comes before what is in it. File content stays where it is until the archive is written.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::writer::invalid;
use super::{CpioError, DEFAULT_MTIME, MAX_NAME_BYTES, TYPE_BLOCK, TYPE_CHARACTER, TYPE_FIFO, Writer};

/// Where a file's content comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Bytes in memory.
    Bytes(Vec<u8>),
    /// A file of this machine, read when the archive is written.
    File {
        /// Where it is.
        path: PathBuf,
        /// How many bytes it had when it was added, and must have when it is written.
        size: u64,
    },
}

/// Kinds of special files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// A character device.
    Character,
    /// A block device.
    Block,
    /// A named pipe; its numbers are 0, 0.
    Fifo,
}

/// What stands at a name of a [`Tree`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory {
        /// Permission bits.
        permissions: u32,
    },
    /// A regular file.
    File {
        /// Permission bits.
        permissions: u32,
        /// Its content.
        content: Content,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points.
        target: Vec<u8>,
    },
    /// A device or pipe.
    Special {
        /// Permission bits.
        permissions: u32,
        /// Which kind.
        device: Device,
        /// Major and minor number.
        number: (u32, u32),
    },
}

/// A file tree that becomes a ramdisk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    nodes: BTreeMap<Vec<u8>, Node>,
    mtime: Option<u32>,
}

impl Tree {
    /// An empty tree.
    pub fn new() -> Tree {
        Tree::default()
    }

    /// Sets the modification time of all entries in seconds since 1970; [`DEFAULT_MTIME`] otherwise.
    pub fn set_mtime(&mut self, mtime: u32) {
        self.mtime = Some(mtime);
    }

    /// What the tree holds, sorted by name.
    pub fn nodes(&self) -> impl Iterator<Item = (&[u8], &Node)> {
        self.nodes.iter().map(|(name, node)| (name.as_slice(), node))
    }

    /// Adds a directory, or changes the permissions of one that is there.
    ///
    /// Names of all methods are relative to the root of the tree (`/etc`, `./etc` and `etc` are the same); missing parents are made with mode 0755.
    ///
    /// # Errors
    ///
    /// `InvalidName`, `Obstacle`.
    pub fn directory(&mut self, name: impl AsRef<[u8]>, permissions: u32) -> Result<(), CpioError> {
        self.insert(name.as_ref(), Node::Directory { permissions })
    }

    /// Adds a file with the given content; replaces one that is there.
    ///
    /// # Errors
    ///
    /// `InvalidName`, `Obstacle`.
    pub fn file(&mut self, name: impl AsRef<[u8]>, permissions: u32, content: impl Into<Vec<u8>>) -> Result<(), CpioError> {
        self.insert(name.as_ref(), Node::File { permissions, content: Content::Bytes(content.into()) })
    }

    /// Adds a file whose content is that of a file of this machine (symbolic links are followed).
    ///
    /// # Errors
    ///
    /// `InvalidName`, `Obstacle`, `Source`.
    pub fn file_from(&mut self, name: impl AsRef<[u8]>, permissions: u32, path: impl Into<PathBuf>) -> Result<(), CpioError> {
        let path = path.into();
        let size = fs::metadata(&path).map_err(source_error(&path))?.len();
        self.insert(name.as_ref(), Node::File { permissions, content: Content::File { path, size } })
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    ///
    /// `InvalidName`, `Obstacle`.
    pub fn symlink(&mut self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Result<(), CpioError> {
        self.insert(name.as_ref(), Node::Symlink { target: target.as_ref().into() })
    }

    /// Adds a device node or a pipe; needs no privilege, since none is made on this machine.
    ///
    /// # Errors
    ///
    /// `InvalidName`, `Obstacle`.
    pub fn device(&mut self, name: impl AsRef<[u8]>, permissions: u32, device: Device, number: (u32, u32)) -> Result<(), CpioError> {
        self.insert(name.as_ref(), Node::Special { permissions, device, number })
    }

    /// Adds all that is below a directory of this machine at `prefix` (empty: at the root of the tree), permissions kept, owners and times not.
    ///
    /// Symbolic links are copied as such. The directory's own permissions become those of `prefix`.
    ///
    /// # Errors
    ///
    /// `Source`, `UnsupportedFile` (sockets), `InvalidName`, `Obstacle`.
    pub fn add_directory(&mut self, prefix: impl AsRef<[u8]>, path: impl Into<PathBuf>) -> Result<(), CpioError> {
        let path = path.into();
        let mut pending = vec![(prefix.as_ref().to_vec(), path)];
        while let Some((name, path)) = pending.pop() {
            if !normalise(&name)?.is_empty() {
                let permissions = fs::metadata(&path).map_err(source_error(&path))?.mode() & 0o7777;
                self.directory(&name, permissions)?;
            }
            for entry in fs::read_dir(&path).map_err(source_error(&path))? {
                let entry = entry.map_err(source_error(&path))?;
                let child = [name.as_slice(), b"/", entry.file_name().as_bytes()].concat();
                if entry.file_type().map_err(source_error(&path))?.is_dir() {
                    pending.push((child, entry.path()));
                } else {
                    let node = node_of(&entry.path())?;
                    self.insert(&child, node)?;
                }
            }
        }
        Ok(())
    }

    /// Writes the tree as one archive and returns the stream and the archive's size in bytes. Memory does not grow with the files.
    ///
    /// # Errors
    ///
    /// `Write`, `Source`, `SourceChanged`, `FileTooBig`.
    pub fn write_to<W: Write>(&self, out: W) -> Result<(W, u64), CpioError> {
        let mut writer = Writer::new(out).mtime(self.mtime.unwrap_or(DEFAULT_MTIME));
        for (name, node) in &self.nodes {
            match node {
                Node::Directory { permissions } => writer.directory(name, *permissions)?,
                Node::File { permissions, content: Content::Bytes(bytes) } => writer.file(name, *permissions, bytes)?,
                Node::File { permissions, content: Content::File { path, size } } => {
                    let mut file = File::open(path).map_err(source_error(path))?;
                    writer.file_from(name, *permissions, *size, &mut file, path)?;
                }
                Node::Symlink { target } => writer.symlink(name, target)?,
                Node::Special { permissions, device, number } => {
                    let kind = match device {
                        Device::Character => TYPE_CHARACTER,
                        Device::Block => TYPE_BLOCK,
                        Device::Fifo => TYPE_FIFO,
                    };
                    writer.special(name, kind | permissions & 0o7777, *number)?;
                }
            }
        }
        writer.finish()
    }

    /// The archive in memory.
    ///
    /// # Errors
    ///
    /// As [`write_to`](Tree::write_to).
    pub fn to_bytes(&self) -> Result<Vec<u8>, CpioError> {
        Ok(self.write_to(Vec::new())?.0)
    }

    fn insert(&mut self, name: &[u8], node: Node) -> Result<(), CpioError> {
        let name = normalise(name)?;
        if name.is_empty() {
            return Err(invalid(&name));
        }
        let parents = name.iter().enumerate().filter(|&(_, &byte)| byte == b'/').map(|(end, _)| name.get(..end).unwrap_or_default());
        for parent in parents {
            match self.nodes.get(parent) {
                Some(Node::Directory { .. }) => {}
                Some(_) => return Err(obstacle(&name, parent)),
                None => {
                    self.nodes.insert(parent.to_vec(), Node::Directory { permissions: 0o755 });
                }
            }
        }
        let stays_directory = matches!(node, Node::Directory { .. });
        let conflict = match self.nodes.get(&name) {
            Some(Node::Directory { .. }) if !stays_directory => {
                let below = [name.as_slice(), b"/"].concat();
                self.nodes.range(below.clone()..).next().is_some_and(|(next, _)| next.starts_with(&below))
            }
            Some(other) => stays_directory && !matches!(other, Node::Directory { .. }),
            None => false,
        };
        if conflict {
            return Err(obstacle(&name, &name));
        }
        self.nodes.insert(name, node);
        Ok(())
    }
}

/// What a file of this machine that is not a directory becomes.
fn node_of(path: &Path) -> Result<Node, CpioError> {
    let metadata = fs::symlink_metadata(path).map_err(source_error(path))?;
    let (kind, permissions) = (metadata.file_type(), metadata.mode() & 0o7777);
    let special = |device, number| Node::Special { permissions, device, number };
    let number = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    if kind.is_file() {
        Ok(Node::File { permissions, content: Content::File { path: path.into(), size: metadata.len() } })
    } else if kind.is_symlink() {
        let target = fs::read_link(path).map_err(source_error(path))?;
        Ok(Node::Symlink { target: target.as_os_str().as_bytes().into() })
    } else if kind.is_char_device() {
        Ok(special(Device::Character, number))
    } else if kind.is_block_device() {
        Ok(special(Device::Block, number))
    } else if kind.is_fifo() {
        Ok(special(Device::Fifo, (0, 0)))
    } else {
        Err(CpioError::UnsupportedFile { path: path.into() })
    }
}

/// Components joined by single slashes; empty for the root.
fn normalise(name: &[u8]) -> Result<Vec<u8>, CpioError> {
    let components: Vec<&[u8]> = name.split(|&byte| byte == b'/').filter(|component| !matches!(*component, b"" | b".")).collect();
    let joined = components.join(&b'/');
    if components.contains(&&b".."[..]) || joined.contains(&0) || joined.len() > MAX_NAME_BYTES {
        return Err(invalid(name));
    }
    Ok(joined)
}

fn source_error(path: &Path) -> impl Fn(std::io::Error) -> CpioError {
    move |source| CpioError::Source { path: path.into(), source }
}

fn obstacle(name: &[u8], obstacle: &[u8]) -> CpioError {
    CpioError::Obstacle { name: String::from_utf8_lossy(name).into_owned(), obstacle: String::from_utf8_lossy(obstacle).into_owned() }
}
