//! Which files of a folder are sent to the engine for a build: what `.dockerignore` says. Performs no IO.

/// Never sent unless `.dockerignore` says otherwise (`!target`): large, and of no use in an image.
const DEFAULTS: [&str; 2] = [".git", "target"];

/// The patterns of a `.dockerignore`; of those that match a path, the last one counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Patterns(Vec<Pattern>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    parts: Vec<String>,
    /// Written with `!` in front: what matches is sent after all.
    includes: bool,
}

impl Patterns {
    /// Reads the text of a `.dockerignore`; the error is a line that cannot be understood.
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let mut patterns = Vec::new();
        for line in DEFAULTS.into_iter().chain(text.trim_start_matches('\u{feff}').lines()) {
            if line.starts_with('#') || line.trim().is_empty() {
                continue;
            }
            let (includes, written) = match line.trim().strip_prefix('!') {
                Some(written) => (true, written.trim()),
                None => (false, line.trim()),
            };
            // Classes of characters and escapes would silently mean something else.
            if written.is_empty() || written.contains(['[', ']', '\\']) {
                return Err(line.trim().to_owned());
            }
            let mut parts: Vec<String> = Vec::new();
            for part in written.split('/') {
                match part {
                    "" | "." => {}
                    ".." => _ = parts.pop(),
                    part => parts.push(part.to_owned()),
                }
            }
            if !parts.is_empty() {
                patterns.push(Pattern { parts, includes });
            }
        }
        Ok(Self(patterns))
    }

    /// Whether the file or folder at `path`, relative and with `/` between its parts, is left out.
    pub(super) fn excludes(&self, path: &str) -> bool {
        let path: Vec<&str> = path.split('/').collect();
        // What matches a folder matches everything in it.
        let matches = |pattern: &&Pattern| (1..=path.len()).any(|end| pattern.matches(&path[..end]));
        self.0.iter().rev().find(matches).is_some_and(|pattern| !pattern.includes)
    }

    /// Whether something in a folder that is left out may be sent after all.
    pub(super) fn may_include(&self) -> bool {
        self.0.iter().any(|pattern| pattern.includes)
    }
}

impl Pattern {
    fn matches(&self, path: &[&str]) -> bool {
        matches_parts(&self.parts, path)
    }
}

fn matches_parts(pattern: &[String], path: &[&str]) -> bool {
    match pattern.split_first() {
        None => path.is_empty(),
        // At the end it stands for what is in the folder, not for the folder.
        Some((first, [])) if first == "**" => !path.is_empty(),
        Some((first, rest)) if first == "**" => (0..=path.len()).any(|skipped| matches_parts(rest, &path[skipped..])),
        Some((first, rest)) => match path.split_first() {
            Some((name, path)) => matches_name(first, name) && matches_parts(rest, path),
            None => false,
        },
    }
}

/// `*` stands for any characters, `?` for one.
fn matches_name(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // Where to go on if the characters after the last `*` do not match.
    let (mut at, mut named, mut star) = (0, 0, None);
    while named < name.len() {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at, named));
                at += 1;
            }
            Some(wanted) if *wanted == '?' || *wanted == name[named] => {
                at += 1;
                named += 1;
            }
            _ => {
                let Some((last, tried)) = star else { return false };
                star = Some((last, tried + 1));
                (at, named) = (last + 1, tried + 1);
            }
        }
    }
    pattern[at..].iter().all(|left| *left == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(patterns: &str, excluded: &[&str], sent: &[&str]) {
        let patterns = Patterns::read(patterns).unwrap();
        for path in excluded {
            assert!(patterns.excludes(path), "{path} is to be left out by {patterns:?}");
        }
        for path in sent {
            assert!(!patterns.excludes(path), "{path} is to be sent by {patterns:?}");
        }
    }

    #[test]
    fn patterns_mean_what_they_mean_to_docker() {
        check("", &[".git", ".git/HEAD", "target/debug/a"], &["src", "sub/target", "targets", ".gitignore"]);
        check("# no pattern\n\n  data  \n", &["data", "data/a/b"], &["data.txt", "sub/data", "# no pattern"]);
        check("/data/", &["data", "data/a"], &["sub/data"]);
        check("*.md", &["README.md"], &["docs/README.md", "README.mdx"]);
        check("*/*.md", &["docs/README.md"], &["README.md", "docs/more/README.md"]);
        check("**/*.md", &["README.md", "docs/more/README.md"], &["README"]);
        check("docs/**", &["docs/a", "docs/a/b"], &["docs"]);
        check("a/**/b", &["a/b", "a/x/b", "a/x/y/b", "a/x/b/in"], &["a", "a/x", "b"]);
        check("?at", &["cat", "hat/in"], &["at", "chat"]);
        check("a*b*c", &["abc", "axbxc", "abbcc"], &["ab", "axc"]);
        check("*\n!src\nsrc/secret", &["README.md", "src/secret"], &["src", "src/main.rs"]);
        check("!target/release/app", &["target", "target/release/other"], &["target/release/app"]);
        check("./a/../b", &["b"], &["a"]);
    }

    #[test]
    fn a_line_that_is_not_understood_is_named() {
        for line in ["src/[ab]", "a\\ b", "!"] {
            assert_eq!(Patterns::read(&format!("data\n{line}\n")), Err(line.to_owned()));
        }
    }
}
