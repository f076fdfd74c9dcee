//! Takes out what must not leave the node. Parts are chosen so that they have no secrets; this is for those that
//! somebody has put where they do not belong, such as a password in a URL.

/// Stands in a secret's place.
const REMOVED: &str = "[removed]";

/// Whole names of fields, flags and variables, in lower case and with `-`; or what they end with behind a `-`.
const KEYS: [&str; 16] = [
    "api-key",
    "apikey",
    "authorization",
    "client-certificate-data",
    "client-key-data",
    "cookie",
    "credential",
    "credentials",
    "passwd",
    "password",
    "private-key",
    "pwd",
    "secret",
    "secret-key",
    "token",
    "token-data",
];

/// The text without secrets.
pub fn redact(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_pem = false;
    for line in text.split_inclusive('\n') {
        if line.contains("-----BEGIN ") {
            in_pem = true;
            out.push_str(REMOVED);
        }
        if !in_pem {
            out.push_str(&in_line(line));
        }
        if in_pem && line.contains("-----END ") {
            in_pem = false;
            out.push('\n');
        }
    }
    out
}

fn in_line(line: &str) -> String {
    let line = without_user_info(line);
    let (text, end) = line.split_at(line.trim_end_matches('\n').len());
    let mut out = String::with_capacity(line.len());
    let mut rest = text;
    while let Some(start) = rest.find(|c: char| !is_separator(c)) {
        let (before, word) = rest.split_at(start);
        out.push_str(before);
        let (word, behind) = word.split_at(word.find(is_separator).unwrap_or(word.len()));
        if is_key(word) && gives_a_value(word, behind) {
            // The value may hold anything: what follows in this line is gone with it.
            return out + word + " " + REMOVED + end;
        }
        out.push_str(if is_token(word) { REMOVED } else { word });
        rest = behind;
    }
    out + rest + end
}

fn is_separator(c: char) -> bool {
    c.is_whitespace() || "\"'`=:,;&?{}[]()<>|".contains(c)
}

fn is_key(word: &str) -> bool {
    let word = word.trim_start_matches('-').to_lowercase().replace('_', "-");
    let ends =
        |key: &&str| word.strip_suffix(*key).is_some_and(|start| start.is_empty() || start.ends_with('-'));
    word == "bearer" || KEYS.iter().any(ends) || is_camel_case_key(&word)
}

/// `accessToken`, `clientSecret`.
fn is_camel_case_key(word: &str) -> bool {
    ["accesstoken", "refreshtoken", "idtoken", "bearertoken", "clientsecret"].contains(&word)
}

/// Whether something follows that this name is for: `name=…`, `name: …`, `"name":…`, `--name …`, `Bearer …`. A Service
/// may be called `token`, and have a port: `token:80`.
fn gives_a_value(word: &str, behind: &str) -> bool {
    if word.starts_with("--") || word.eq_ignore_ascii_case("bearer") {
        return !behind.trim().is_empty();
    }
    let quoted = behind.starts_with(['"', '\'']);
    let behind = behind.trim_start_matches(['"', '\'']).trim_start();
    match behind.strip_prefix(':') {
        Some(value) => quoted || value.is_empty() || value.starts_with(char::is_whitespace),
        None => behind.starts_with('='),
    }
}

/// A JSON Web Token: what service accounts have.
fn is_token(word: &str) -> bool {
    word.starts_with("eyJ") && word.matches('.').count() >= 2
}

/// `scheme://user:password@host` without what is before the host.
fn without_user_info(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find("://") {
        let (scheme, behind) = rest.split_at(at + 3);
        out.push_str(scheme);
        let end = behind.find(|c: char| c.is_whitespace() || "/?#\"'`<>".contains(c)).unwrap_or(behind.len());
        let (authority, behind) = behind.split_at(end);
        match authority.rsplit_once('@') {
            Some((_, host)) => out = out + REMOVED + "@" + host,
            None => out.push_str(authority),
        }
        rest = behind;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "hunter2.s3cr3t";

    #[test]
    fn a_secret_is_found_wherever_it_may_stand() {
        let jwt = "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJrOHMifQ.c2lnbmF0dXJl";
        for text in [
            format!("--master=https://admin:{SECRET}@192.0.2.1:6443/path"),
            format!("https://{SECRET}@host, and https://a:{SECRET}@[::1]:6443"),
            format!("--master=https://host/?token={SECRET}&x=1"),
            format!("--token {SECRET}"),
            format!("--token={SECRET}"),
            format!("    token: {SECRET}\n"),
            format!("    token: \"a {SECRET}\""),
            format!("{{\"accessToken\":\"{SECRET}\",\"a\":1}}"),
            format!("{{ \"client_secret\" : \"{SECRET}\" }}"),
            format!("client-key-data: {SECRET}"),
            format!("password = {SECRET}"),
            format!("AWS_SECRET_KEY={SECRET}"),
            format!("authorization: Basic {SECRET}"),
            format!("curl -H 'Authorization: Bearer {SECRET}'"),
            format!("sent bearer {SECRET} to it"),
            format!("-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----"),
            format!("a -----BEGIN PRIVATE KEY----- {SECRET}\n{SECRET}"),
        ] {
            let clean = redact(&text);
            assert!(!clean.contains(SECRET) && clean.contains(REMOVED), "{text}\nbecame\n{clean}");
        }
        assert_eq!(
            redact(&format!("it said {jwt}, twice: {jwt}\n")),
            "it said [removed], twice: [removed]\n"
        );
    }

    #[test]
    fn what_is_no_secret_stays_as_it_is() {
        for text in [
            "",
            "\n",
            "pins   /sys/fs/bpf/fairlead (layout 1)\nagent  running, process 12\n",
            "--kubeconfig=/etc/kubernetes/admin.conf --master=https://192.0.2.1:6443/a?b=c\n",
            "ClusterIP  10.96.0.1:443  TCP  shop/token:80  maglev\n",
            "    \"name\": \"token\",\n    \"namespace\": \"secret-store\",\n",
            "fairlead_packets_total{hook=\"nic_in\",reason=\"ok\"} 12\n",
            "fairlead_service_bytes{namespace=\"shop\",name=\"password\"} 12",
            "mail@example.org and a://b",
            "a key behind: b, tokens: 3\n",
        ] {
            assert_eq!(redact(text), text);
        }
        let text = "before\n-----BEGIN CERTIFICATE-----\nMII\n-----END CERTIFICATE-----\nbehind\n";
        assert_eq!(redact(text), "before\n[removed]\nbehind\n");
    }
}
