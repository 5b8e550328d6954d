//! Bytes that a process wrote, cut into lines.

/// Longest line that is delivered whole. A program that writes without line ends must not fill the launcher's memory.
pub(crate) const MAX_LINE_BYTES: usize = 64 << 10;

/// Cuts a stream of bytes into lines of at most [`MAX_LINE_BYTES`].
///
/// `\n` and `\r\n` end a line. After a lone `\r` the line starts anew, as on a terminal, so that of a progress bar only
/// its last state remains.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    line: Vec<u8>,
    returned: bool,
}

impl Lines {
    /// Takes what was read and gives every line that it completes.
    pub(crate) fn push(&mut self, mut bytes: &[u8], mut emit: impl FnMut(String)) {
        while let Some(first) = bytes.first() {
            match first {
                b'\n' => {
                    emit(self.take());
                    bytes = &bytes[1..];
                }
                b'\r' => {
                    self.returned = true;
                    bytes = &bytes[1..];
                }
                _ => {
                    if std::mem::take(&mut self.returned) {
                        self.line.clear();
                    }
                    let run = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')).unwrap_or(bytes.len());
                    let (text, rest) = bytes.split_at(run.min(MAX_LINE_BYTES - self.line.len()));
                    self.line.extend_from_slice(text);
                    bytes = rest;
                    if self.line.len() == MAX_LINE_BYTES {
                        let rest = self.line.split_off(whole_characters(&self.line));
                        emit(self.take());
                        self.line = rest;
                    }
                }
            }
        }
    }

    /// The last line, if it has no end.
    pub(crate) fn finish(&mut self) -> Option<String> {
        (!self.line.is_empty()).then(|| self.take())
    }

    fn take(&mut self) -> String {
        self.returned = false;
        let line = std::mem::take(&mut self.line);
        String::from_utf8(line).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
    }
}

/// Length of `bytes` without a UTF-8 character that is cut off at the end.
fn whole_characters(bytes: &[u8]) -> usize {
    let is_continuation = |byte: u8| byte & 0b1100_0000 == 0b1000_0000;
    let tail = bytes.iter().rev().take(3).take_while(|&&byte| is_continuation(byte)).count();
    let Some(lead) = bytes.len().checked_sub(tail + 1) else { return bytes.len() };
    let needed = bytes[lead].leading_ones() as usize;
    if (2..=4).contains(&needed) && needed > tail + 1 { lead } else { bytes.len() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(chunks: &[&[u8]]) -> Vec<String> {
        let mut lines = Lines::default();
        let mut found = Vec::new();
        for chunk in chunks {
            lines.push(chunk, |line| found.push(line));
        }
        found.extend(lines.finish());
        found
    }

    #[test]
    fn lines_end_as_on_a_terminal() {
        let cases: [(&[&[u8]], &[&str]); 9] = [
            (&[b"one\ntwo\n"], &["one", "two"]),
            (&[b"o", b"ne\nlast"], &["one", "last"]),
            (&[b"\n\n"], &["", ""]),
            (&[b"dos\r\n", b"dos\r", b"\n"], &["dos", "dos"]),
            (&[b"10 %\r", b"20 %\r30 %\n"], &["30 %"]),
            (&[b"10 %\r20 %\r"], &["20 %"]),
            (&[b"bad \xff byte\n"], &["bad \u{fffd} byte"]),
            (&[b"\xc3", b"\xa9\n"], &["é"]),
            (&[], &[]),
        ];
        for (chunks, expected) in cases {
            assert_eq!(cut(chunks), expected, "{chunks:?}");
        }
    }

    #[test]
    fn long_line_is_split_between_characters() {
        let long = format!("x{}", "é".repeat(MAX_LINE_BYTES));
        let found = cut(&[long.as_bytes()]);
        assert_eq!(found.len(), 3);
        assert!(found.iter().all(|line| line.len() <= MAX_LINE_BYTES));
        assert_eq!(found.concat(), long);
    }

    proptest! {
        #[test]
        fn where_reads_end_does_not_matter(bytes: Vec<u8>, at: prop::sample::Index) {
            let at = at.index(bytes.len() + 1);
            prop_assert_eq!(cut(&[&bytes[..at], &bytes[at..]]), cut(&[&bytes]));
        }
    }
}
