//! What a registry asks for when it refuses a request: the header `WWW-Authenticate`.

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// A way to log in that a registry offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// Name and password with every request.
    Basic,
    /// A token from a token server.
    Bearer(Bearer),
    /// Something else, by its name.
    Other(String),
}

/// Where a token is to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bearer {
    /// Address of the token server.
    pub(super) realm: String,
    /// What the token server calls the registry.
    pub(super) service: Option<String>,
    /// The rights that the request lacked.
    pub(super) scope: Option<String>,
}

impl Challenge {
    /// The best one that the headers offer: a token, else a password, else whatever stands there.
    pub(super) fn read(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let mut challenges: Vec<Self> = values.flat_map(parse).collect();
        let rank = |challenge: &Self| match challenge {
            Challenge::Bearer(_) => 0,
            Challenge::Basic => 1,
            Challenge::Other(_) => 2,
        };
        challenges.sort_by_key(rank);
        challenges.into_iter().next()
    }
}

/// Reads `Scheme name="value", name=value, Scheme ...`.
fn parse(value: &str) -> Vec<Challenge> {
    let mut found: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = value.trim_start_matches([' ', ',']);
    while !rest.is_empty() {
        let end = rest.find([' ', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let after = after.trim_start();
        rest = match after.strip_prefix('=') {
            Some(text) => {
                let (value, after) = parameter(text.trim_start());
                if let Some((_, parameters)) = found.last_mut() {
                    parameters.push((word.to_ascii_lowercase(), value));
                }
                after
            }
            None => {
                if !word.is_empty() {
                    found.push((word.to_owned(), Vec::new()));
                }
                after
            }
        };
        rest = rest.trim_start_matches([' ', ',', '\t']);
    }
    found.into_iter().map(|(scheme, parameters)| challenge(scheme, &parameters)).collect()
}

/// A quoted string or a bare word, and what comes after it.
fn parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ']).unwrap_or(text.len());
        // A lone `=` would not move on.
        let end = end.max(usize::from(text.starts_with('=')));
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            c => value.push(c),
        }
    }
    (value, "")
}

fn challenge(scheme: String, parameters: &[(String, String)]) -> Challenge {
    let get = |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    if scheme.eq_ignore_ascii_case("basic") {
        return Challenge::Basic;
    }
    match get("realm") {
        Some(realm) if scheme.eq_ignore_ascii_case("bearer") => {
            Challenge::Bearer(Bearer { realm, service: get("service"), scope: get("scope") })
        }
        _ => Challenge::Other(scheme),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(values: &[&'static str], expected: Option<Challenge>) {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, value.parse().unwrap());
        }
        assert_eq!(Challenge::read(&headers), expected);
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Some(Challenge::Bearer(Bearer { realm: realm.to_owned(), service: owned(service), scope: owned(scope) }))
    }

    #[test]
    fn a_registry_is_understood() {
        check(&[], None);
        check(&["Basic realm=\"Registry Realm\""], Some(Challenge::Basic));
        check(&["basic"], Some(Challenge::Basic));
        check(
            &[
                "Bearer realm=\"https://auth.docker.io/token\",service=\"registry.docker.io\",scope=\"repository:a/b:pull,push\"",
            ],
            bearer("https://auth.docker.io/token", Some("registry.docker.io"), Some("repository:a/b:pull,push")),
        );
        check(&["BEARER service=x , realm = \"a\\\"b\""], bearer("a\"b", Some("x"), None));
    }

    #[test]
    fn a_token_is_preferred_to_a_password() {
        check(&["Basic realm=\"a, b\", Bearer realm=\"c\""], bearer("c", None, None));
        check(&["Basic realm=a", "Bearer realm=\"c\""], bearer("c", None, None));
        check(&["Negotiate", "Basic realm=\"x\""], Some(Challenge::Basic));
        check(&["Negotiate"], Some(Challenge::Other("Negotiate".into())));
        check(&["Bearer service=\"without realm\""], Some(Challenge::Other("Bearer".into())));
    }

    #[test]
    fn nonsense_is_read_to_its_end() {
        for nonsense in ["=", "==", "a==b", ",,,", "\"", "a=\"", "a=\"\\", "a =,= b", "Bearer realm", " = = "] {
            _ = parse(nonsense);
        }
    }
}
