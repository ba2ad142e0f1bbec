//! A Xen domain file, as xm and xl read it, turned into a configuration.
//!
//! Of the file only `name`, `uuid` and `disk` matter; the rest is read, so that mistakes are found, and left.

use std::path::Path;

use super::error::{ConfigError, Source};
use super::model::{Access, Config, DiskConfig, Domain, Format, NbdAddress, NbdConfig};
use super::xl_disk::{self, DiskFormat, DiskSpec};
use super::xl_grammar::{self, Setting, Text, Value};
use super::{check, vhost_user_socket};

/// Reads a domain file. Every disk gets a vhost-user socket and an NBD export, both in the runtime directory,
/// and is called by the domain's name and its device: `vm1-xvda`.
///
/// # Errors
/// What is wrong, with its place: Python that would have to be run, a disk that cannot be understood or is
/// not supported, two disks that are one.
pub fn parse(text: &str, file: &Path) -> Result<Config, ConfigError> {
    let source = Source::new(file, text);
    let settings = xl_grammar::settings(text).map_err(|e| source.error(e.offset, e.message))?;
    let mut config = Config::default();
    let (name, name_at) = domain_name(&settings, &source)?;
    let specs = disk_texts(&settings, &source, &mut config)?;
    for spec in specs {
        if let Some(disk) = disk(&spec, &name, &source, &mut config)? {
            config.disks.push(disk);
        }
    }
    if !settings.iter().any(|setting| setting.name == "disk") {
        config.warnings.push(source.warning(0, "no `disk = [...]` in this file: nothing is served"));
    }
    if !config.disks.is_empty() {
        let socket = config.runtime_dir.join(format!("{name}-nbd.sock"));
        config.nbd = Some(NbdConfig::new(vec![NbdAddress::Unix(socket)]));
    }
    let uuid = last(&settings, "uuid").and_then(|setting| match &setting.value {
        Value::Text(text) => Some(text.value.clone()),
        _ => None,
    });
    DiskConfig::check_name(&name).map_err(|message| source.error(name_at, message))?;
    config.domain = Some(Domain { name, uuid });
    check::all(&config, &source)?;
    Ok(config)
}

/// The setting that counts: the last one of that name, as in xl and in Python.
fn last<'a>(settings: &'a [Setting], name: &str) -> Option<&'a Setting> {
    settings.iter().rev().find(|setting| setting.name == name)
}

/// The domain's name and its place; without one, the file's name without its extension.
fn domain_name(settings: &[Setting], source: &Source<'_>) -> Result<(String, usize), ConfigError> {
    match last(settings, "name").map(|setting| (&setting.value, setting.append)) {
        Some((Value::Text(text), false)) => Ok((text.value.clone(), text.inside.start)),
        Some((Value::Word(word, at), false)) => Ok((word.clone(), *at)),
        Some((value, _)) => Err(source.error(value.offset(), "`name` is one text: write `name = \"vm1\"`")),
        None => {
            let stem = source.file.file_stem().unwrap_or_default().to_string_lossy();
            Ok((if stem.is_empty() { "domain".to_owned() } else { stem.into_owned() }, 0))
        }
    }
}

/// The texts in `disk = [...]` with what `disk += [...]` adds.
fn disk_texts(
    settings: &[Setting],
    source: &Source<'_>,
    config: &mut Config,
) -> Result<Vec<Text>, ConfigError> {
    let mut texts = Vec::new();
    for setting in settings.iter().filter(|setting| setting.name == "disk") {
        let Value::List(values, _) = &setting.value else {
            let message = "`disk` is a list: write `disk = [ 'TARGET,raw,xvda,w' ]`, also for one disk";
            return Err(source.error(setting.value.offset(), message));
        };
        if !setting.append && !texts.is_empty() {
            texts.clear();
            let message =
                "`disk` is set again: the disks above are not used (`disk += [...]` would add to them)";
            config.warnings.push(source.warning(setting.offset, message));
        }
        for value in values {
            match value {
                Value::Text(text) => texts.push(text.clone()),
                other => return Err(source.error(other.offset(), "a disk is a text in quotes")),
            }
        }
    }
    Ok(texts)
}

/// The disk of one specification; none for an empty drive.
fn disk(
    text: &Text,
    domain: &str,
    source: &Source<'_>,
    config: &mut Config,
) -> Result<Option<DiskConfig>, ConfigError> {
    let place = |offset| text.source_offset(source.text, offset);
    let spec = xl_disk::parse(&text.value).map_err(|e| source.error(place(e.offset), e.message))?;
    // Its own script makes no sense of a target but the one that a device's has.
    let own = match &spec.script {
        Some(script) if script.rsplit('/').next() == Some(crate::xen::SCRIPT) => {
            let read = crate::xen::target::parse(&spec.target);
            Some(read.map_err(|message| source.error(place(spec.places.target), message))?)
        }
        Some(script) => {
            let message = format!(
                "script `{script}` would make sense of the target, and vbd runs no scripts: name a file or a device"
            );
            return Err(source.error(place(spec.places.script), message));
        }
        None => None,
    };
    if spec.is_empty() {
        let message = format!("{} is an empty drive: nothing is served for it", spec.vdev);
        config.warnings.push(source.warning(place(0), message));
        return Ok(None);
    }
    let format = match spec.format() {
        DiskFormat::Raw => Format::Raw,
        other => {
            let unsupported = other.to_string().parse::<Format>();
            unsupported.map_err(|error| source.error(place(spec.places.format), error.to_string()))?
        }
    };
    warn(&spec, source, config, place);
    let (path, forced, format) = match own {
        // xl is told `raw` where its script makes the device; the target says what the file is.
        Some(target) if format == Format::Raw => (target.path, target.forced, target.format),
        Some(target) => (target.path, target.forced, format),
        None => (spec.path(), false, format),
    };
    let access = match spec.access() {
        Access::ReadWrite if forced => Access::ReadWriteForce,
        access => access,
    };
    let name = format!("{domain}-{}", spec.vdev);
    Ok(Some(DiskConfig {
        format,
        access,
        vdev: Some(spec.vdev),
        cdrom: spec.cdrom,
        vhost_user: Some(vhost_user_socket(&config.runtime_dir, &name)),
        nbd: Some(name.clone()),
        discard: spec.discard.unwrap_or(true),
        direct_io_safe: spec.direct_io_safe,
        position: Some(source.position(place(0))),
        ..DiskConfig::new(name, path)
    }))
}

fn warn(spec: &DiskSpec, source: &Source<'_>, config: &mut Config, place: impl Fn(usize) -> usize) {
    let mut warn = |offset, message| config.warnings.push(source.warning(place(offset), message));
    if !spec.target.starts_with('/') && spec.script.is_none() {
        let message = format!(
            "a relative target is below /dev, as for xl: `{}` is {}",
            spec.target.escape_debug(),
            spec.path().display()
        );
        warn(spec.places.target, message);
    }
    if spec.cdrom && spec.access.is_some_and(Access::is_writable) {
        warn(spec.places.access, "a CD drive is read-only, whatever is asked for".to_owned());
    }
    if let Some(backend) = spec.backend.as_ref().filter(|b| !matches!(b.as_str(), "0" | "Domain-0")) {
        warn(spec.places.backend, format!("backend `{backend}` is passed over: vbd serves this disk here"));
    }
    for other in &spec.other {
        warn(0, format!("`{other}` has no effect here"));
    }
}
