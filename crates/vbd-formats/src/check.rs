//! Whether everything in an image fits together, and mending it, whatever its format.

use std::os::fd::AsFd;

use serde::Serialize;
use vbd_core::{Error, ErrorKind, Result};
use vbd_image::lease::{self, Lease, Mode};
use vbd_qcow2::check::{self as qcow2, Options};

use crate::{Format, ImageSpec};

/// What is to be mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Room that nothing refers to is given back.
    Leaks,
    /// Everything that can be.
    All,
}

/// What was found in an image, after a repair where one was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// How many things are wrong.
    pub errors: u64,
    /// How many clusters or blocks are taken by nothing.
    pub leaks: u64,
    /// The first of these, for people.
    pub findings: Vec<String>,
    /// What is no error and worth to be known.
    pub notes: Vec<String>,
    /// What a repair has written.
    pub repaired: Vec<String>,
    /// Whether some of it could not be looked at.
    pub incomplete: bool,
}

impl Checked {
    /// Whether nothing is wrong and nothing is lost.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.leaks == 0 && !self.incomplete
    }
}

/// Whether images of a format have a structure that [`check`] looks at.
pub fn has_structure(format: Format) -> bool {
    matches!(format, Format::Qcow2 | Format::Vhd)
}

/// Checks the structure of one image, not those that it stands on, and mends it as `repair` says. What guests keep in it is
/// not looked at.
///
/// # Errors
/// The image is in use, cannot be read, is of another format or one that is not checked, or could not be mended.
pub fn check(spec: &ImageSpec, repair: Option<Repair>) -> Result<Checked> {
    let of = |error: Error| error.of(spec.path.display().to_string());
    let opened = match repair {
        Some(_) => vbd_image::open::open_to_write(&spec.path),
        None => vbd_image::open::open(&spec.path),
    };
    let image = opened.map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
    let mode = if repair.is_some() { Mode::Write } else { Mode::Read };
    let options = lease::Options { wait: spec.lease_wait, override_: spec.share && repair.is_none() };
    let _lease = Lease::acquire(image.file.as_fd(), &spec.path, mode, options)
        .map_err(|error| Error::new(ErrorKind::Busy, error.to_string()))?;
    match spec.format {
        Format::Qcow2 => {
            let options = Options::default();
            let failed = |error: qcow2::Error| of(Error::new(ErrorKind::Corrupt, error.to_string()));
            let (report, repaired) = match repair {
                None => (qcow2::check(&image.file, &options).map_err(failed)?, Vec::new()),
                Some(what) => {
                    refuse_beside_notes(spec, &image.file).map_err(of)?;
                    let what = match what {
                        Repair::Leaks => qcow2::Repair::Leaks,
                        Repair::All => qcow2::Repair::All,
                    };
                    let done = qcow2::repair(&image.file, what, &options).map_err(failed)?;
                    (done.after, done.actions)
                }
            };
            Ok(Checked {
                errors: report.errors,
                leaks: report.leaks,
                findings: report.findings.iter().map(ToString::to_string).collect(),
                notes: report.notes,
                repaired,
                incomplete: report.incomplete,
            })
        }
        Format::Vhd => {
            let failed =
                |error: vbd_vhd::format::FormatError| of(Error::new(ErrorKind::Corrupt, error.to_string()));
            // Its repair loses nothing, so there is one of it.
            let report = match repair {
                None => vbd_vhd::check(&image.file).map_err(failed)?,
                Some(_) => vbd_vhd::repair(&image.file).map_err(failed)?,
            };
            let wrong = report.problems.iter().filter(|problem| problem.is_error()).count() as u64;
            let others = report.problems.len() as u64 - wrong;
            Ok(Checked {
                // What is not named is taken for the worst.
                errors: report.count - others,
                leaks: others,
                findings: report.problems.iter().map(ToString::to_string).collect(),
                repaired: report.repaired,
                ..Checked::default()
            })
        }
        Format::Raw | Format::Luks | Format::Vmdk | Format::Vdi | Format::Vhdx => {
            let message = format!("{} images have no structure that is checked here", spec.format);
            Err(of(Error::new(ErrorKind::Unsupported, message)))
        }
    }
}

/// A killed process's notes lead to clusters that nothing in the image leads to yet: a repair would call them leaks, and
/// whoever opens the image next would bring them back over what came there since.
fn refuse_beside_notes(spec: &ImageSpec, file: &std::fs::File) -> Result<()> {
    let noted =
        |header: vbd_qcow2::format::Header| header.autoclear & vbd_qcow2::format::autoclear::NOTES != 0;
    match vbd_qcow2::left_beside(&spec.path) {
        Some(notes) if vbd_qcow2::format::Header::read(file).is_ok_and(noted) => {
            let message = format!(
                "a process that served it was killed; open it for writing once, so that its last changes are made, and then \
                 repair it; or remove {} to go on without them",
                notes.display()
            );
            Err(Error::new(ErrorKind::Unsupported, message))
        }
        _ => Ok(()),
    }
}
