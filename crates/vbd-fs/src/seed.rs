//! Seed disks of cloud-init's data source NoCloud: a FAT labelled CIDATA with what a distribution's image is to become.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Serialize;
use vbd_image::create::Draft;

use crate::digest::{Origin, hex};
use crate::error::Context;
use crate::tailor::check_hostname;
use crate::vfat::{Name, SMALLEST, Volume};
use crate::{Error, Result, Time};

/// What a seed disk says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Seed {
    /// The machine's name.
    pub hostname: Option<String>,
    /// A user to make, instead of the image's own default user.
    pub user: Option<String>,
    /// Public keys, as lines of `authorized_keys`, for that user or the default one.
    pub ssh_keys: Vec<String>,
    /// The user's password as crypt(5) has it. None: no password logs in.
    pub password_hash: Option<String>,
    /// The name of the instance: cloud-init does its work once for each. Made from the rest where not given.
    pub instance_id: Option<String>,
    /// The whole of `user-data`, in place of what the other fields would make.
    pub user_data: Option<Vec<u8>>,
    /// The whole of `meta-data`, in place of instance and name.
    pub meta_data: Option<Vec<u8>>,
    /// The whole of `network-config`; there is none where not given, and the image sets up DHCP.
    pub network_config: Option<Vec<u8>>,
}

/// A seed disk that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SeedReport {
    /// The file.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// The instance, where this made its name.
    pub instance_id: Option<String>,
}

/// The largest file that is put on a seed disk: they are texts.
pub const LARGEST_SEED_FILE: u64 = 16 << 20;

impl Seed {
    /// Makes the disk. It is a raw file of 4 MiB, or larger if the texts are; the same content gives the same bytes.
    /// `time` is what its files carry.
    ///
    /// # Errors
    ///
    /// Values that do not go together or that no text can hold; a file that exists, without `force`; those of writing.
    pub fn write(&self, path: &Path, force: bool, time: Time) -> Result<SeedReport> {
        self.check()?;
        let instance = self.instance();
        let user_data = self.user_data.clone().unwrap_or_else(|| self.cloud_config().into_bytes());
        let meta_data = self.meta_data.clone().unwrap_or_else(|| self.meta(&instance).into_bytes());
        let mut files = vec![("meta-data", meta_data), ("user-data", user_data)];
        files.extend(self.network_config.clone().map(|network| ("network-config", network)));
        let bytes: u64 = files.iter().map(|(_, text)| text.len() as u64).sum();
        // As much again for what a FAT needs of its own.
        let size = (2 * bytes).next_multiple_of(1 << 20).max(SMALLEST);

        let image = Draft::new(path, force)?;
        image.file().set_len(size).at("make", path)?;
        let request: Vec<u8> =
            files.iter().flat_map(|(name, text)| [name.as_bytes(), text].concat()).collect();
        let name = Name::new("CIDATA", Origin::new(&request).number("volume")).map_err(Error::Invalid)?;
        let mut volume =
            Volume::format(image.file(), 0, size, 512, &name, time).at("make a filesystem in", path)?;
        for (name, text) in &files {
            volume.add(name, &mut &text[..]).at(&format!("write {name} to"), path)?;
        }
        volume.finish().at("write to", path)?;
        image.file().sync_all().at("make durable", path)?;
        image.publish()?;
        let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|d| d.sync_all()).at("make durable the directory of", path)?;
        let instance_id = self.meta_data.is_none().then_some(instance);
        Ok(SeedReport { path: path.to_owned(), size, instance_id })
    }

    fn check(&self) -> Result<()> {
        let invalid = |text: String| Err(Error::Invalid(text));
        if let Some(name) = &self.hostname {
            check_hostname(name)?;
        }
        let of_user = self.user.is_some() || !self.ssh_keys.is_empty() || self.password_hash.is_some();
        if self.user_data.is_some() && of_user {
            return invalid("user-data is given whole: put users, keys and passwords into it".to_owned());
        }
        if self.meta_data.is_some() && (self.hostname.is_some() || self.instance_id.is_some()) {
            return invalid(
                "meta-data is given whole: put the instance and the host's name into it".to_owned(),
            );
        }
        if let Some(user) = &self.user {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-');
            if !user.starts_with(|c: char| c.is_ascii_lowercase() || c == '_') || !user.chars().all(plain) {
                return invalid(format!("user {user:?}: small letters, digits, _ and -"));
            }
        }
        if self.password_hash.is_some() && self.user.is_none() {
            return invalid("a password hash is for a user: name one".to_owned());
        }
        let texts = self.ssh_keys.iter().chain(&self.password_hash).chain(&self.instance_id);
        if let Some(bad) = texts.into_iter().find(|text| text.contains(char::is_control) || text.is_empty()) {
            return invalid(format!("{bad:?} is empty or has control characters"));
        }
        Ok(())
    }

    /// The name of the instance: another one for another content, so that a changed seed is applied.
    fn instance(&self) -> String {
        self.instance_id.clone().unwrap_or_else(|| {
            let request = serde_json::to_vec(self).unwrap_or_default();
            format!("iid-{}", hex(&Origin::new(&request).uuid("instance").0.to_be_bytes()[..8]))
        })
    }

    fn meta(&self, instance: &str) -> String {
        let mut text = format!("instance-id: {}\n", quoted(instance));
        if let Some(name) = &self.hostname {
            text += &format!("local-hostname: {}\n", quoted(name));
        }
        text
    }

    /// The user-data, as cloud-config. Strings are JSON's, which YAML's double quotes take as they are.
    fn cloud_config(&self) -> String {
        let mut text = String::from("#cloud-config\n");
        let keys = |indent: &str| -> String {
            self.ssh_keys.iter().map(|key| format!("{indent}- {}\n", quoted(key.trim()))).collect()
        };
        match &self.user {
            Some(user) => {
                text += &format!("users:\n  - name: {}\n", quoted(user));
                text += "    shell: /bin/bash\n    groups: [sudo]\n    sudo: \"ALL=(ALL) NOPASSWD:ALL\"\n";
                match &self.password_hash {
                    Some(hash) => text += &format!("    lock_passwd: false\n    passwd: {}\n", quoted(hash)),
                    None => text += "    lock_passwd: true\n",
                }
                if !self.ssh_keys.is_empty() {
                    text += "    ssh_authorized_keys:\n";
                    text += &keys("      ");
                }
            }
            None if !self.ssh_keys.is_empty() => {
                text += "ssh_authorized_keys:\n";
                text += &keys("  ");
            }
            None => {}
        }
        text
    }
}

/// A string in double quotes, as JSON and YAML have it.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_seed_says() {
        let seed = Seed {
            hostname: Some("vm1".into()),
            user: Some("ada".into()),
            ssh_keys: vec!["ssh-ed25519 AAAA \"ada\"".into()],
            ..Seed::default()
        };
        let text = seed.cloud_config();
        assert!(text.starts_with("#cloud-config\nusers:\n  - name: \"ada\"\n"), "{text}");
        assert!(text.contains("lock_passwd: true\n"), "{text}");
        assert!(text.ends_with("ssh_authorized_keys:\n      - \"ssh-ed25519 AAAA \\\"ada\\\"\"\n"), "{text}");
        assert_eq!(seed.meta("i1"), "instance-id: \"i1\"\nlocal-hostname: \"vm1\"\n");
        let other = Seed { hostname: Some("vm2".into()), ..seed.clone() };
        assert_ne!(seed.instance(), other.instance());
        assert_eq!(seed.instance(), seed.clone().instance());
    }

    #[test]
    fn what_no_seed_takes() {
        let seed = Seed::default;
        for bad in [
            Seed { hostname: Some("a b".into()), ..seed() },
            Seed { user: Some("Ada: x".into()), ..seed() },
            Seed { ssh_keys: vec!["a\nb".into()], ..seed() },
            Seed { password_hash: Some("$6$x".into()), ..seed() },
            Seed { user_data: Some(vec![]), user: Some("ada".into()), ..seed() },
            Seed { meta_data: Some(vec![]), hostname: Some("a".into()), ..seed() },
        ] {
            assert!(matches!(bad.check(), Err(Error::Invalid(_) | Error::Tailor { .. })), "{bad:?}");
        }
    }
}
