//! The handshake: fixed newstyle negotiation as a machine of bytes in and bytes out. It touches no socket and no disk:
//! where it needs one it says so ([`Step`]) and is given the answer.

use crate::protocol::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, DIRTY_BITMAP, DIRTY_BITMAP_ID, FIXED_NEWSTYLE, Headers, MAGIC,
    MAX_PAYLOAD, MAX_STRING, NO_ZEROES, OPTION_MAGIC, OPTION_REPLY_MAGIC, Reader, export_flag, info, option,
    reply,
};

/// The longest data of an option that is looked at, in bytes; longer data is skipped and the option refused.
const MAX_OPTION: u32 = 64 << 10;
/// The most metadata queries in one option.
const MAX_QUERIES: u32 = 256;

/// What may be asked of the exports without opening one.
pub(crate) trait Catalogue {
    /// Names and descriptions.
    fn list(&self) -> Vec<(String, String)>;
    /// The proper name and the description of the export that a client means by `name`.
    fn find(&self, name: &str) -> Option<(String, String)>;
    /// The names of its dirty bitmaps.
    fn bitmaps(&self, _name: &str) -> Vec<String> {
        Vec::new()
    }
    /// Nobody new is let in any more.
    fn is_stopping(&self) -> bool;
}

/// Whether a connection may or must be encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TlsMode {
    Off,
    Offered,
    Required,
}

/// What the negotiation needs next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// More bytes.
    Input,
    /// To be called again when the output was sent.
    Again,
    /// Sizes and abilities of this export: [`Negotiation::answer`].
    Inspect(String),
    /// This export opened: [`Negotiation::answer`].
    Open(String),
    /// The output sent, then the TLS handshake, then [`Negotiation::secured`].
    StartTls,
    /// The output sent, then the end of the connection.
    Close,
    /// The output sent, then the transmission phase with [`Negotiation::finish`].
    Transmission,
}

/// What a client learns of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExportInfo {
    pub(crate) size: u64,
    /// Transmission flags without SEND_DF, which depends on what was negotiated.
    pub(crate) flags: u16,
    /// The preferred block size in bytes.
    pub(crate) preferred: u32,
}

/// What was agreed on.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Agreed {
    pub(crate) headers: Headers,
    /// base:allocation was selected for this export.
    pub(crate) allocation: bool,
    /// These dirty bitmaps were selected, in the order of their numbers.
    pub(crate) bitmaps: Vec<String>,
    /// What the client has already sent of the transmission phase.
    pub(crate) rest: Vec<u8>,
}

/// A question to the driver that is open: whose answer it will be.
#[derive(Debug)]
struct Pending {
    option: u32,
    name: String,
    description: String,
    wanted: Vec<u16>,
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Options,
    /// So many bytes of an option's data are dropped.
    Skip(u32),
    Asked(Pending),
    Securing,
    Ended,
}

/// Metadata contexts that a client has selected for an export.
#[derive(Debug)]
struct Selected {
    export: String,
    allocation: bool,
    bitmaps: Vec<String>,
}

/// One client's handshake.
#[derive(Debug)]
pub(crate) struct Negotiation {
    state: State,
    tls: TlsMode,
    secure: bool,
    fixed: bool,
    no_zeroes: bool,
    headers: Headers,
    selected: Option<Selected>,
    input: Vec<u8>,
}

impl Negotiation {
    /// Greets the client.
    pub(crate) fn new(tls: TlsMode, out: &mut Vec<u8>) -> Self {
        out.extend(MAGIC.to_be_bytes());
        out.extend(OPTION_MAGIC.to_be_bytes());
        out.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        Negotiation {
            state: State::ClientFlags,
            tls,
            secure: false,
            fixed: false,
            no_zeroes: false,
            headers: Headers::default(),
            selected: None,
            input: Vec::new(),
        }
    }

    /// Takes bytes from the client. To be called only when [`Step::Input`] was asked for.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// The connection is encrypted from now on; nothing agreed on before counts.
    pub(crate) fn secured(&mut self) {
        self.secure = true;
        self.state = State::Options;
    }

    /// Goes on by one message.
    pub(crate) fn advance(&mut self, catalogue: &dyn Catalogue, out: &mut Vec<u8>) -> Step {
        match &mut self.state {
            State::ClientFlags => self.client_flags(),
            State::Options => self.option(catalogue, out),
            State::Skip(left) => {
                let count = self.input.len().min(*left as usize);
                self.input.drain(..count);
                *left -= u32::try_from(count).unwrap_or(*left);
                if *left > 0 {
                    return Step::Input;
                }
                self.state = State::Options;
                Step::Again
            }
            State::Asked(_) | State::Securing | State::Ended => Step::Close,
        }
    }

    /// The answer to [`Step::Inspect`] or [`Step::Open`]: the export, or why not.
    pub(crate) fn answer(&mut self, answer: Result<ExportInfo, &str>, out: &mut Vec<u8>) -> Step {
        let State::Asked(pending) = std::mem::replace(&mut self.state, State::Options) else {
            return self.close();
        };
        let export = match answer {
            Ok(export) => export,
            Err(_) if pending.option == option::EXPORT_NAME => return self.close(),
            Err(why) => return refuse(out, pending.option, reply::ERR_UNKNOWN, why),
        };
        let mut flags = export.flags;
        if self.headers != Headers::Simple {
            flags |= export_flag::SEND_DF;
        }
        if pending.option == option::EXPORT_NAME {
            out.extend(export.size.to_be_bytes());
            out.extend(flags.to_be_bytes());
            if !self.no_zeroes {
                out.extend([0; 124]);
            }
        } else {
            describe(out, &pending, export, flags);
            respond(out, pending.option, reply::ACK, &[]);
        }
        if pending.option == option::INFO {
            return Step::Again;
        }
        // Selected for another export, contexts do not count.
        self.selected.take_if(|selected| selected.export != pending.name);
        self.state = State::Ended;
        Step::Transmission
    }

    /// What was agreed on, after [`Step::Transmission`].
    pub(crate) fn finish(self) -> Agreed {
        let (allocation, bitmaps) =
            self.selected.map_or((false, Vec::new()), |selected| (selected.allocation, selected.bitmaps));
        Agreed { headers: self.headers, allocation, bitmaps, rest: self.input }
    }

    fn close(&mut self) -> Step {
        self.state = State::Ended;
        Step::Close
    }

    fn client_flags(&mut self) -> Step {
        let Some(flags) = Reader(&self.input).u32() else { return Step::Input };
        self.input.drain(..4);
        self.fixed = flags & u32::from(FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return self.close();
        }
        self.state = State::Options;
        Step::Again
    }

    fn option(&mut self, catalogue: &dyn Catalogue, out: &mut Vec<u8>) -> Step {
        let mut reader = Reader(&self.input);
        let header = (|| Some((reader.u64()?, reader.u32()?, reader.u32()?)))();
        let Some((magic, option, len)) = header else { return Step::Input };
        if magic != OPTION_MAGIC {
            return self.close();
        }
        if len > MAX_OPTION {
            if option == option::EXPORT_NAME || !self.fixed {
                return self.close();
            }
            self.input.drain(..16);
            self.state = State::Skip(len);
            return refuse(out, option, reply::ERR_TOO_BIG, "the option's data is too long");
        }
        let total = 16 + len as usize;
        if self.input.len() < total {
            return Step::Input;
        }
        let data: Vec<u8> = self.input[16..total].to_vec();
        self.input.drain(..total);
        self.take_option(option, &data, catalogue, out)
    }

    fn take_option(
        &mut self,
        option: u32,
        data: &[u8],
        catalogue: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Step {
        if option == option::ABORT {
            respond(out, option, reply::ACK, &[]);
            return self.close();
        }
        let insecure = self.tls == TlsMode::Required && !self.secure;
        if option == option::EXPORT_NAME {
            if insecure || self.headers == Headers::Extended {
                return self.close();
            }
            return match std::str::from_utf8(data) {
                Ok(name) => self.choose(option, name, Vec::new(), catalogue, out),
                Err(_) => self.close(),
            };
        }
        if !self.fixed {
            return self.close();
        }
        if option == option::STARTTLS {
            return self.start_tls(data, out);
        }
        if insecure {
            return refuse(out, option, reply::ERR_TLS_REQD, "this server wants TLS first");
        }
        if catalogue.is_stopping() {
            return refuse(out, option, reply::ERR_SHUTDOWN, "the server is stopping");
        }
        match option {
            option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if !data.is_empty() => {
                refuse(out, option, reply::ERR_INVALID, "this option has no data")
            }
            option::LIST => {
                for (name, description) in catalogue.list() {
                    let name = name.as_bytes();
                    respond(out, option, reply::SERVER, &[&length(name), name, description.as_bytes()]);
                }
                respond(out, option, reply::ACK, &[])
            }
            option::INFO | option::GO => match parse_info(data) {
                Some((name, wanted)) => self.choose(option, name, wanted, catalogue, out),
                None => refuse(out, option, reply::ERR_INVALID, "the option is malformed"),
            },
            option::STRUCTURED_REPLY if self.headers == Headers::Extended => {
                refuse(out, option, reply::ERR_EXT_HEADER_REQD, "extended headers were agreed on")
            }
            option::STRUCTURED_REPLY => {
                self.headers = Headers::Structured;
                respond(out, option, reply::ACK, &[])
            }
            option::EXTENDED_HEADERS => {
                self.headers = Headers::Extended;
                respond(out, option, reply::ACK, &[])
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.contexts(option, data, catalogue, out)
            }
            _ => refuse(out, option, reply::ERR_UNSUP, "unknown option"),
        }
    }

    fn start_tls(&mut self, data: &[u8], out: &mut Vec<u8>) -> Step {
        if self.secure || !data.is_empty() {
            return refuse(out, option::STARTTLS, reply::ERR_INVALID, "TLS is on, or the option had data");
        }
        if self.tls == TlsMode::Off {
            return refuse(out, option::STARTTLS, reply::ERR_POLICY, "this server has no certificate");
        }
        if !self.input.is_empty() {
            // Plain text that would pass for encrypted: somebody in the middle, or a client that cannot wait.
            return self.close();
        }
        self.headers = Headers::default();
        self.selected = None;
        self.state = State::Securing;
        respond(out, option::STARTTLS, reply::ACK, &[]);
        Step::StartTls
    }

    /// INFO, GO and EXPORT_NAME.
    fn choose(
        &mut self,
        option: u32,
        name: &str,
        wanted: Vec<u16>,
        catalogue: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Step {
        let found = catalogue.find(name).filter(|_| !catalogue.is_stopping());
        let Some((name, description)) = found else {
            if option == option::EXPORT_NAME {
                return self.close();
            }
            return refuse(out, option, reply::ERR_UNKNOWN, "there is no such export");
        };
        self.state = State::Asked(Pending { option, name: name.clone(), description, wanted });
        if option == option::INFO { Step::Inspect(name) } else { Step::Open(name) }
    }

    fn contexts(&mut self, option: u32, data: &[u8], catalogue: &dyn Catalogue, out: &mut Vec<u8>) -> Step {
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.selected = None;
        }
        if self.headers == Headers::Simple {
            return refuse(out, option, reply::ERR_INVALID, "structured replies come first");
        }
        let Some((name, queries)) = parse_contexts(data) else {
            return refuse(out, option, reply::ERR_INVALID, "the option is malformed");
        };
        let Some((name, _)) = catalogue.find(name) else {
            return refuse(out, option, reply::ERR_UNKNOWN, "there is no such export");
        };
        // A list is of all that a prefix fits, or of all there are; selected is what is named.
        let matches = |context: &str| {
            let is_meant = |query: &&str| {
                *query == context || (!set && query.ends_with(':') && context.starts_with(query))
            };
            queries.iter().any(is_meant) || (!set && queries.is_empty())
        };
        let mut tell = |id: u32, context: &str| {
            let id = if set { id } else { 0 };
            respond(out, option, reply::META_CONTEXT, &[&id.to_be_bytes(), context.as_bytes()]);
        };
        let allocation = matches(BASE_ALLOCATION);
        if allocation {
            tell(BASE_ALLOCATION_ID, BASE_ALLOCATION);
        }
        let bitmaps = catalogue.bitmaps(&name).into_iter().map(|bitmap| format!("{DIRTY_BITMAP}{bitmap}"));
        let bitmaps: Vec<String> = bitmaps.filter(|context| matches(context)).collect();
        for (id, context) in (DIRTY_BITMAP_ID..).zip(&bitmaps) {
            tell(id, context);
        }
        if set {
            let bitmaps = bitmaps.iter().filter_map(|context| context.strip_prefix(DIRTY_BITMAP));
            let bitmaps = bitmaps.map(str::to_owned).collect();
            self.selected = Some(Selected { export: name, allocation, bitmaps });
        }
        respond(out, option, reply::ACK, &[])
    }
}

/// The export's name and the kinds of information asked for.
fn parse_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut reader = Reader(data);
    let name = reader.string().filter(|name| name.len() <= MAX_STRING)?;
    let count = reader.u16()?;
    let wanted = (0..count).map(|_| reader.u16()).collect::<Option<_>>()?;
    reader.0.is_empty().then_some((name, wanted))
}

/// The export's name, and the contexts asked for.
fn parse_contexts(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut reader = Reader(data);
    let name = reader.string().filter(|name| name.len() <= MAX_STRING)?;
    let count = reader.u32().filter(|count| *count <= MAX_QUERIES)?;
    let queries = (0..count).map(|_| reader.string()).collect::<Option<_>>()?;
    reader.0.is_empty().then_some((name, queries))
}

fn describe(out: &mut Vec<u8>, pending: &Pending, export: ExportInfo, flags: u16) {
    let option = pending.option;
    let mut tell = |kind: u16, data: &[u8]| respond(out, option, reply::INFO, &[&kind.to_be_bytes(), data]);
    let mut sizes = export.size.to_be_bytes().to_vec();
    sizes.extend(flags.to_be_bytes());
    tell(info::EXPORT, &sizes);
    if pending.wanted.contains(&info::NAME) {
        tell(info::NAME, pending.name.as_bytes());
    }
    if pending.wanted.contains(&info::DESCRIPTION) && !pending.description.is_empty() {
        tell(info::DESCRIPTION, pending.description.as_bytes());
    }
    if pending.wanted.contains(&info::BLOCK_SIZE) {
        let sizes = [1, export.preferred, MAX_PAYLOAD].map(u32::to_be_bytes);
        tell(info::BLOCK_SIZE, &sizes.concat());
    }
}

fn refuse(out: &mut Vec<u8>, option: u32, code: u32, why: &str) -> Step {
    respond(out, option, code, &[why.as_bytes()])
}

fn respond(out: &mut Vec<u8>, option: u32, code: u32, parts: &[&[u8]]) -> Step {
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(code.to_be_bytes());
    out.extend(length(&parts.concat()));
    parts.iter().for_each(|part| out.extend_from_slice(part));
    Step::Again
}

/// The length of what the server itself has made, which is short.
fn length(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes()
}
