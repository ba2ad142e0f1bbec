//! The driver's interface in numbers and layouts (`linux/ublk_cmd.h`). All of it is in the machine's byte order.

/// A control command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    GetDeviceInfo = 0x02,
    Add = 0x04,
    Delete = 0x05,
    Start = 0x06,
    Stop = 0x07,
    SetParameters = 0x08,
    GetParameters = 0x09,
    StartRecovery = 0x10,
    EndRecovery = 0x11,
    GetDeviceInfo2 = 0x12,
    GetFeatures = 0x13,
    DeleteAsync = 0x14,
    UpdateSize = 0x15,
}

impl Command {
    /// The driver's own name, for messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Command::GetDeviceInfo => "GET_DEV_INFO",
            Command::Add => "ADD_DEV",
            Command::Delete => "DEL_DEV",
            Command::Start => "START_DEV",
            Command::Stop => "STOP_DEV",
            Command::SetParameters => "SET_PARAMS",
            Command::GetParameters => "GET_PARAMS",
            Command::StartRecovery => "START_USER_RECOVERY",
            Command::EndRecovery => "END_USER_RECOVERY",
            Command::GetDeviceInfo2 => "GET_DEV_INFO2",
            Command::GetFeatures => "GET_FEATURES",
            Command::DeleteAsync => "DEL_DEV_ASYNC",
            Command::UpdateSize => "UPDATE_SIZE",
        }
    }

    /// The number that is sent: plain before Linux 6.4, encoded as an ioctl's since.
    pub(crate) fn number(self, encoded: bool) -> u32 {
        let reads = matches!(
            self,
            Command::GetDeviceInfo
                | Command::GetParameters
                | Command::GetDeviceInfo2
                | Command::GetFeatures
                | Command::DeleteAsync
        );
        let direction = if reads { READ } else { READ | WRITE };
        if encoded { ioctl(direction, self as u32, CONTROL_LEN) } else { self as u32 }
    }
}

/// A command of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QueueCommand {
    Fetch = 0x20,
    CommitAndFetch = 0x21,
}

impl QueueCommand {
    pub(crate) fn number(self, encoded: bool) -> u32 {
        if encoded { ioctl(READ | WRITE, self as u32, 16) } else { self as u32 }
    }

    /// `struct ublksrv_io_cmd`: queue, tag, result, and the buffer for the next request.
    pub(crate) fn data(queue: u16, tag: u16, result: i32, buffer: u64) -> [u8; 16] {
        let mut data = [0; 16];
        put(&mut data, 0, queue.to_ne_bytes());
        put(&mut data, 2, tag.to_ne_bytes());
        put(&mut data, 4, result.to_ne_bytes());
        put(&mut data, 8, buffer.to_ne_bytes());
        data
    }
}

const READ: u32 = 2;
const WRITE: u32 = 1;

/// `_IOC` of asm-generic/ioctl.h with the type 'u'.
fn ioctl(direction: u32, number: u32, len: u32) -> u32 {
    direction << 30 | len << 16 | u32::from(b'u') << 8 | number
}

/// Length of `struct ublksrv_ctrl_cmd`.
const CONTROL_LEN: u32 = 32;

/// What a control command carries: `struct ublksrv_ctrl_cmd`, in the 80 bytes that the ring has for it.
pub(crate) struct ControlData {
    pub(crate) device: u32,
    /// Bytes at `address`.
    pub(crate) len: u16,
    pub(crate) address: u64,
    pub(crate) data: u64,
    /// How many of the bytes are the path of the device's node, for an unprivileged device.
    pub(crate) path_len: u16,
}

impl ControlData {
    pub(crate) fn bytes(&self) -> [u8; 80] {
        let mut bytes = [0; 80];
        put(&mut bytes, 0, self.device.to_ne_bytes());
        // For no queue.
        put(&mut bytes, 4, u16::MAX.to_ne_bytes());
        put(&mut bytes, 6, self.len.to_ne_bytes());
        put(&mut bytes, 8, self.address.to_ne_bytes());
        put(&mut bytes, 16, self.data.to_ne_bytes());
        put(&mut bytes, 24, self.path_len.to_ne_bytes());
        bytes
    }
}

/// Features and flags of a device.
pub(crate) mod feature {
    pub(crate) const USER_RECOVERY: u64 = 1 << 3;
    pub(crate) const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    pub(crate) const UNPRIVILEGED: u64 = 1 << 5;
    pub(crate) const UPDATE_SIZE: u64 = 1 << 10;
}

/// States of a device.
pub(crate) mod state {
    pub(crate) const DEAD: u16 = 0;
    pub(crate) const LIVE: u16 = 1;
}

/// Asks the driver for a free number.
pub(crate) const ANY: u32 = u32::MAX;

/// `struct ublksrv_ctrl_dev_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DeviceInfo {
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) state: u16,
    /// Longest read or write, in bytes.
    pub(crate) max_io: u32,
    pub(crate) id: u32,
    pub(crate) pid: i32,
    pub(crate) flags: u64,
    /// Kept for the server by the driver: which file it serves.
    pub(crate) identity: u64,
}

impl DeviceInfo {
    pub(crate) const LEN: usize = 64;

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; Self::LEN];
        put(&mut bytes, 0, self.queues.to_ne_bytes());
        put(&mut bytes, 2, self.depth.to_ne_bytes());
        put(&mut bytes, 4, self.state.to_ne_bytes());
        put(&mut bytes, 8, self.max_io.to_ne_bytes());
        put(&mut bytes, 12, self.id.to_ne_bytes());
        put(&mut bytes, 16, self.pid.to_ne_bytes());
        put(&mut bytes, 24, self.flags.to_ne_bytes());
        put(&mut bytes, 32, self.identity.to_ne_bytes());
        bytes
    }

    /// None where there are too few bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(DeviceInfo {
            queues: u16::from_ne_bytes(get(bytes, 0)?),
            depth: u16::from_ne_bytes(get(bytes, 2)?),
            state: u16::from_ne_bytes(get(bytes, 4)?),
            max_io: u32::from_ne_bytes(get(bytes, 8)?),
            id: u32::from_ne_bytes(get(bytes, 12)?),
            pid: i32::from_ne_bytes(get(bytes, 16)?),
            flags: u64::from_ne_bytes(get(bytes, 24)?),
            identity: u64::from_ne_bytes(get(bytes, 32)?),
        })
    }

    pub(crate) fn has(&self, feature: u64) -> bool {
        self.flags & feature == feature
    }
}

/// Most requests of a queue; also what the mapped descriptors of the queues lie apart for.
pub(crate) const MAX_DEPTH: usize = 4096;

/// Length of `struct ublksrv_io_desc`.
pub(crate) const DESCRIPTOR_LEN: usize = 24;

/// A request as the driver describes it: `struct ublksrv_io_desc`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// Operation in the lowest 8 bits, flags above.
    pub(crate) op_flags: u32,
    pub(crate) sectors: u32,
    pub(crate) start: u64,
}

pub(crate) mod op {
    pub(crate) const READ: u8 = 0;
    pub(crate) const WRITE: u8 = 1;
    pub(crate) const FLUSH: u8 = 2;
    pub(crate) const DISCARD: u8 = 3;
    pub(crate) const WRITE_ZEROES: u8 = 5;
    pub(crate) const FUA: u32 = 1 << 13;
    pub(crate) const NO_UNMAP: u32 = 1 << 15;
}

/// Writes `value` at `at`.
pub(crate) fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}

/// The `N` bytes at `at`, if they are there.
pub(crate) fn get<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_drivers() {
        // As the macros of linux/ublk_cmd.h give them on x86-64 and arm64.
        assert_eq!(Command::Add.number(true), 0xc020_7504);
        assert_eq!(Command::GetFeatures.number(true), 0x8020_7513);
        assert_eq!(Command::GetDeviceInfo2.number(true), 0x8020_7512);
        assert_eq!(Command::UpdateSize.number(true), 0xc020_7515);
        assert_eq!(Command::Add.number(false), 4);
        assert_eq!(QueueCommand::CommitAndFetch.number(true), 0xc010_7521);
        assert_eq!(QueueCommand::Fetch.number(false), 0x20);
    }

    #[test]
    fn what_a_device_says_is_read_as_it_was_written() {
        let info = DeviceInfo {
            queues: 4,
            depth: 128,
            state: 2,
            max_io: 1 << 19,
            id: 7,
            pid: -1,
            flags: feature::USER_RECOVERY | feature::UPDATE_SIZE,
            identity: 0x0123_4567_89ab_cdef,
        };
        assert_eq!(DeviceInfo::from_bytes(&info.bytes()), Some(info));
        assert_eq!(DeviceInfo::from_bytes(&info.bytes()[..39]), None);
    }
}
