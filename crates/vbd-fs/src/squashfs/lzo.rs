//! LZO1X, unpacked: "LZO stream format as understood by Linux' LZO decompressor" (Documentation/staging/lzo.rst in the
//! kernel's sources).

const CUT: &str = "it is cut off";
const LARGE: &str = "it is larger than it may be";
const WRONG: &str = "it copies from before its start";

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Result<usize, &'static str> {
        Ok(self.bytes(1)?[0].into())
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8], &'static str> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(CUT)?;
        self.0 = rest;
        Ok(bytes)
    }

    /// A length in the bits of an instruction; where those are 0 it is `base`, 255 for each byte of 0, and the byte after.
    fn length(&mut self, bits: usize, base: usize) -> Result<usize, &'static str> {
        if bits != 0 {
            return Ok(bits);
        }
        let mut length = base;
        loop {
            match self.byte()? {
                // There are no more of them than bytes in the block.
                0 => length += 255,
                last => return Ok(length + last),
            }
        }
    }
}

struct Output<'a> {
    bytes: &'a mut [u8],
    length: usize,
}

impl Output<'_> {
    fn literals(&mut self, literals: &[u8]) -> Result<(), &'static str> {
        let to = self.bytes[self.length..].get_mut(..literals.len()).ok_or(LARGE)?;
        to.copy_from_slice(literals);
        self.length += literals.len();
        Ok(())
    }

    fn copy(&mut self, distance: usize, count: usize) -> Result<(), &'static str> {
        let from = self.length.checked_sub(distance).ok_or(WRONG)?;
        if count > self.bytes.len() - self.length {
            return Err(LARGE);
        }
        // What is copied may be what was just copied.
        for at in 0..count {
            self.bytes[self.length + at] = self.bytes[from + at];
        }
        self.length += count;
        Ok(())
    }
}

/// Unpacks a block; returns how many bytes of `to` it filled.
pub(super) fn unpack(packed: &[u8], to: &mut [u8]) -> Result<usize, &'static str> {
    let (mut input, mut output) = (Input(packed), Output { bytes: to, length: 0 });
    // How many literals the last instruction had: 0 to 3, and 4 for more.
    let mut state = 0;
    if let Some(&first @ 18..) = packed.first() {
        let count = usize::from(first) - 17;
        input.byte()?;
        output.literals(input.bytes(count)?)?;
        state = count.min(4);
    }
    loop {
        let code = input.byte()?;
        let (distance, count, literals) = match code {
            0..16 if state == 0 => {
                let count = input.length(code, 15)? + 3;
                output.literals(input.bytes(count)?)?;
                state = 4;
                continue;
            }
            0..16 => {
                let distance = (input.byte()? << 2) + (code >> 2);
                let (least, count) = if state == 4 { (2049, 3) } else { (1, 2) };
                (distance + least, count, code & 3)
            }
            16..32 => {
                let count = input.length(code & 7, 7)? + 2;
                let rest = input.byte()? | input.byte()? << 8;
                let distance = (code & 8) << 11 | rest >> 2;
                if distance == 0 {
                    // The end, which is written with this length.
                    let whole = count == 3 && input.0.is_empty();
                    return if whole { Ok(output.length) } else { Err("it does not end where it must") };
                }
                (distance + 16384, count, rest & 3)
            }
            32..64 => {
                let count = input.length(code & 31, 31)? + 2;
                let rest = input.byte()? | input.byte()? << 8;
                ((rest >> 2) + 1, count, rest & 3)
            }
            _ => {
                let distance = (input.byte()? << 3) + (code >> 2 & 7) + 1;
                (distance, (code >> 5) + 1, code & 3)
            }
        };
        output.copy(distance, count)?;
        output.literals(input.bytes(literals)?)?;
        state = literals;
    }
}
