//! Types of partitions that are known by name: those of the discoverable partitions specification, and common others.

use super::Guid;

/// What a partition is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The type in a GPT.
    Gpt(Guid),
    /// The type in an MBR, which is not 0.
    Mbr(u8),
}

/// The EFI system partition.
pub const ESP: Guid = Guid(0xc12a_7328_f81f_11d2_ba4b_00a0_c93e_c93b);
/// A filesystem of Linux, with no purpose named.
pub const LINUX: Guid = Guid(0x0fc6_3daf_8483_4772_8e79_3d69_d847_7de4);
/// Swap space of Linux.
pub const SWAP: Guid = Guid(0x0657_fd6d_a4ab_43c4_84e5_0933_c84b_4f4f);
/// The root of an x86-64 system.
pub const ROOT_X86_64: Guid = Guid(0x4f68_bce3_e8cd_4db1_96e7_fbca_f984_b709);
/// The root of an ARM-64 system.
pub const ROOT_ARM64: Guid = Guid(0xb921_b045_1df0_41c3_af44_4c6f_280d_3fae);
/// `/home`.
pub const HOME: Guid = Guid(0x933a_c7e1_2eb4_4f13_b844_0e14_e2ae_f915);
/// `/srv`.
pub const SRV: Guid = Guid(0x3b8f_8425_20e0_4f3b_907f_1a25_a76f_98e8);
/// `/var`.
pub const VAR: Guid = Guid(0x4d21_b016_b534_45c2_a9fb_5c16_e091_fd2d);
/// `/var/tmp`.
pub const VAR_TMP: Guid = Guid(0x7ec6_f557_3bc5_4aca_b293_16ef_5df6_39d1);
/// The extended boot loader partition, `/boot`.
pub const XBOOTLDR: Guid = Guid(0xbc13_c2ff_59e6_4262_a352_b275_fd6f_7172);
/// What Microsoft's systems take for a volume: FAT, NTFS, exFAT.
pub const BASIC_DATA: Guid = Guid(0xebd0_a0a2_b9e5_4433_87c0_68b6_b726_99c7);

/// Types of a GPT by their name.
const GPT_NAMES: [(Guid, &str); 13] = [
    (ESP, "EFI system"),
    (Guid(0x2168_6148_6449_6e6f_744e_6565_6445_4649), "BIOS boot"),
    (LINUX, "Linux filesystem"),
    (SWAP, "Linux swap"),
    (Guid(0xe6d6_d379_f507_44c2_a23c_238f_2a3d_f928), "Linux LVM"),
    (ROOT_X86_64, "Linux root (x86-64)"),
    (ROOT_ARM64, "Linux root (ARM-64)"),
    (XBOOTLDR, "Linux extended boot"),
    (HOME, "Linux home"),
    (SRV, "Linux server data"),
    (VAR, "Linux variable data"),
    (VAR_TMP, "Linux temporary data"),
    (BASIC_DATA, "Microsoft basic data"),
];

impl Kind {
    /// Its name, if it is a common one.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Kind::Gpt(guid) => GPT_NAMES.iter().find(|(known, _)| *known == guid).map(|(_, name)| *name),
            Kind::Mbr(byte) => Some(match byte {
                0x05 | 0x0F | 0x85 => "extended",
                0x07 => "NTFS or exFAT",
                0x0B | 0x0C => "FAT32",
                0x0E => "FAT16",
                0x82 => "Linux swap",
                0x83 => "Linux",
                0x8E => "Linux LVM",
                0xEE => "GPT protective",
                0xEF => "EFI system",
                0xFD => "Linux RAID",
                _ => return None,
            }),
        }
    }

    /// Whether it is the frame around the logical partitions of an MBR, which holds no filesystem.
    pub fn is_extended(self) -> bool {
        matches!(self, Kind::Mbr(0x05 | 0x0F | 0x85))
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.name(), self) {
            (Some(name), _) => f.write_str(name),
            (None, Kind::Gpt(guid)) => write!(f, "{guid}"),
            (None, Kind::Mbr(byte)) => write!(f, "0x{byte:02x}"),
        }
    }
}
