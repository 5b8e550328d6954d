//! Makes a line harmless: whatever a program wrote, showing it neither moves the cursor nor changes the terminal.

/// The text without any escape sequence or control character except tabs.
pub(super) fn plain(text: &str) -> String {
    clean(text, false)
}

/// As [`plain`], but colours and the like (SGR sequences) stay, and end with the line.
pub(super) fn coloured(text: &str) -> String {
    let mut line = clean(text, true);
    if line.contains(ESCAPE) {
        line.push_str("\x1b[0m");
    }
    line
}

const ESCAPE: char = '\u{1b}';
const BELL: char = '\u{7}';
/// The one-character forms of `ESC [` and `ESC \`.
const CSI: char = '\u{9b}';
const ST: char = '\u{9c}';

fn clean(text: &str, keep_colours: bool) -> String {
    // A progress bar redraws its line after a carriage return; what it shows in the end is what counts.
    let text = text.trim_end_matches('\r');
    let text = text.rsplit('\r').next().unwrap_or(text);
    let mut line = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match c {
            ESCAPE => escape(&mut rest, keep_colours, &mut line),
            CSI => control_sequence(&mut rest, keep_colours, &mut line),
            '\u{90}' | '\u{98}' | '\u{9d}'..='\u{9f}' => skip_string(&mut rest),
            '\t' => line.push('\t'),
            c if c.is_control() => {}
            c => line.push(c),
        }
    }
    line
}

/// What follows an escape character, after ECMA-48.
fn escape(rest: &mut std::str::Chars<'_>, keep_colours: bool, line: &mut String) {
    match rest.next() {
        Some('[') => control_sequence(rest, keep_colours, line),
        Some(']' | 'P' | 'X' | '^' | '_') => skip_string(rest),
        // Intermediate characters go on until a final one.
        Some(' '..='/') => {
            rest.find(|c| !(' '..='/').contains(c));
        }
        _ => {}
    }
}

/// Parameters, intermediates and a final character; of these sequences only SGR may stay.
fn control_sequence(rest: &mut std::str::Chars<'_>, keep_colours: bool, line: &mut String) {
    let begin = rest.as_str();
    let Some(end) = begin.find(|c: char| !(' '..='?').contains(&c)) else {
        *rest = "".chars();
        return;
    };
    let parameters = &begin[..end];
    let last = begin[end..].chars().next().expect("a character was found there");
    if last == ESCAPE {
        // An unfinished sequence: the next one begins here.
        *rest = begin[end..].chars();
        return;
    }
    *rest = begin[end + last.len_utf8()..].chars();
    if keep_colours && last == 'm' && parameters.chars().all(|c| c.is_ascii_digit() || c == ';' || c == ':') {
        line.push_str("\x1b[");
        line.push_str(parameters);
        line.push('m');
    }
}

/// A title, a link or other data for the terminal, up to its terminator.
fn skip_string(rest: &mut std::str::Chars<'_>) {
    while let Some(c) = rest.next() {
        match c {
            BELL | ST => return,
            ESCAPE => {
                if rest.as_str().starts_with('\\') {
                    rest.next();
                }
                return;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_text_and_colours_stay() {
        let cases = [
            ("plain größe\tx", "plain größe\tx", "plain größe\tx"),
            ("\x1b[1;31mred\x1b[0m end", "red end", "\x1b[1;31mred\x1b[0m end\x1b[0m"),
            ("\x1b[38:2::1:2:3mx", "x", "\x1b[38:2::1:2:3mx\x1b[0m"),
            ("up\x1b[2A\x1b[2K\x1b[?25l\x1b[>4;2mdown", "updown", "updown"),
            ("10 %\r20 %\r30 %\r", "30 %", "30 %"),
            ("\x1b]0;title\x07a\x1b]8;;http://x\x1b\\b\x1bPdata\x1b\\c", "abc", "abc"),
            ("a\x07b\x08c\x00d\u{7f}e\u{85}f", "abcdef", "abcdef"),
            ("\u{9b}31mc1\u{9d}title\u{9c}x", "c1x", "\x1b[31mc1x\x1b[0m"),
            ("\x1b(Bx\x1bcy\x1b7z", "xyz", "xyz"),
            ("cut\x1b[31", "cut", "cut"),
            ("cut\x1b", "cut", "cut"),
            ("cut\x1b[3\x1b[2Jx", "cutx", "cutx"),
        ];
        for (text, without, with) in cases {
            assert_eq!(plain(text), without, "{text:?}");
            assert_eq!(coloured(text), with, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_gets_through(text in "(\\PC|[\u{1b}\u{9b}\r\n\u{7}\u{9c}\\[\\]0-9;?mAJHP\\\\]){0,30}") {
            let line = plain(&text);
            prop_assert!(!line.chars().any(|c| c.is_control() && c != '\t'), "{:?}", line);
            // What is left of the escape characters are whole SGR sequences.
            let line = coloured(&text);
            for part in line.split(ESCAPE).skip(1) {
                let (parameters, _) = part.strip_prefix('[').and_then(|part| part.split_once('m')).unwrap();
                prop_assert!(parameters.chars().all(|c| c.is_ascii_digit() || c == ';' || c == ':'), "{:?}", line);
            }
        }
    }
}
