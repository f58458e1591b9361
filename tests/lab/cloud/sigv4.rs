//! Signature Version 4, checked as AWS documents it ("Signature calculations for the Authorization header"): the canonical request, its hash, the
//! derived key. Also the presigned form, whose seconds are counted.

use super::http::Request;
use anyhow::{Context as _, Result, ensure};
use hmac::{Hmac, KeyInit as _, Mac as _};
use jiff::{Timestamp, civil::DateTime, tz::TimeZone};
use sha2::{Digest as _, Sha256};

/// The longest that a signature's time may be off.
const SKEW: i64 = 15 * 60;

/// What a signature says of itself.
#[derive(Debug)]
pub struct Claim {
    /// Whose key.
    pub access_key: String,
    /// `s3`, `ssm`, `sts`.
    pub service: String,
    scope: String,
    signed: Vec<String>,
    signature: String,
    at: String,
    /// Seconds that a presigned URL is good for.
    expires: Option<i64>,
}

/// Why a signature does not hold.
#[derive(Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Not what the key's owner would have signed.
    Signature,
    /// Signed at another time than now.
    Skewed,
    /// A presigned URL whose time is over.
    Expired,
    /// The body is not what was signed.
    Body,
}

/// The signature of a request; nothing where it has none.
pub fn claim(request: &Request) -> Result<Option<Claim>> {
    if let Some(rest) = request.header("authorization").strip_prefix("AWS4-HMAC-SHA256 ") {
        let field = |name: &str| {
            let found = rest.split(',').find_map(|part| part.trim().strip_prefix(name));
            found.with_context(|| format!("no {name} in the signature"))
        };
        let (access_key, scope) = field("Credential=")?.split_once('/').context("no scope")?;
        return Ok(Some(Claim {
            access_key: access_key.to_owned(),
            service: service(scope)?,
            scope: scope.to_owned(),
            signed: field("SignedHeaders=")?.split(';').map(str::to_owned).collect(),
            signature: field("Signature=")?.to_owned(),
            at: request.header("x-amz-date").to_owned(),
            expires: None,
        }));
    }
    let query = |name: &str| parameter(&request.query, name);
    let Some(signature) = query("X-Amz-Signature") else {
        return Ok(None);
    };
    let credential = query("X-Amz-Credential").context("no credential")?;
    let (access_key, scope) = credential.split_once('/').context("no scope")?;
    Ok(Some(Claim {
        access_key: access_key.to_owned(),
        service: service(scope)?,
        scope: scope.to_owned(),
        signed: query("X-Amz-SignedHeaders")
            .context("no signed headers")?
            .split(';')
            .map(str::to_owned)
            .collect(),
        signature,
        at: query("X-Amz-Date").context("no date")?,
        expires: Some(query("X-Amz-Expires").context("no expiry")?.parse()?),
    }))
}

fn service(scope: &str) -> Result<String> {
    let parts: Vec<&str> = scope.split('/').collect();
    ensure!(
        parts.len() == 4 && parts[3] == "aws4_request",
        "a scope of another form: {scope}"
    );
    Ok(parts[2].to_owned())
}

/// A parameter of a query, decoded.
pub fn parameter(query: &str, name: &str) -> Option<String> {
    let pair = query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })?;
    Some(decode(pair))
}

/// Takes `%41` for `A`.
pub fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        let code = (*first == b'%')
            .then(|| u8::from_str_radix(std::str::from_utf8(behind.get(..2)?).ok()?, 16).ok())
            .flatten();
        match code {
            Some(code) => (bytes.push(code), rest = &behind[2..]).1,
            None => (bytes.push(*first), rest = behind).1,
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hmac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac =
        Hmac::<Sha256>::new_from_slice(key).unwrap_or_else(|_| unreachable!("a key of any length serves"));
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

/// Checks a claim with the secret of its key.
pub fn check(request: &Request, claim: &Claim, secret: &str, now: Timestamp) -> Result<(), Wrong> {
    let at = DateTime::strptime("%Y%m%dT%H%M%SZ", &claim.at)
        .ok()
        .and_then(|at| at.to_zoned(TimeZone::UTC).ok())
        .ok_or(Wrong::Signature)?
        .timestamp();
    // S3: HeadersNotSigned.
    let unsigned = |name: &&String| name.starts_with("x-amz-") && !claim.signed.contains(*name);
    if claim.expires.is_some() && request.headers.keys().any(|name| unsigned(&name)) {
        return Err(Wrong::Signature);
    }
    let age = now.as_second() - at.as_second();
    match claim.expires {
        Some(seconds) if age > seconds => return Err(Wrong::Expired),
        None if age.abs() > SKEW => return Err(Wrong::Skewed),
        _ => (),
    }
    let mut pairs: Vec<&str> = request
        .query
        .split('&')
        .filter(|pair| !pair.is_empty() && !pair.starts_with("X-Amz-Signature="))
        .collect();
    pairs.sort_unstable();
    let query: Vec<String> = pairs
        .iter()
        .map(|pair| {
            if pair.contains('=') {
                (*pair).to_owned()
            } else {
                format!("{pair}=")
            }
        })
        .collect();
    let headers: String = claim
        .signed
        .iter()
        .map(|name| format!("{name}:{}\n", request.header(name)))
        .collect();
    let payload = match (claim.expires, request.header("x-amz-content-sha256")) {
        (Some(_), _) => "UNSIGNED-PAYLOAD".to_owned(),
        (None, "") => hex::encode(Sha256::digest(&request.body)),
        (None, said) => said.to_owned(),
    };
    if payload.len() == 64 && payload != hex::encode(Sha256::digest(&request.body)) {
        return Err(Wrong::Body);
    }
    let canonical = format!(
        "{}\n{}\n{}\n{headers}\n{}\n{payload}",
        request.method,
        request.path,
        query.join("&"),
        claim.signed.join(";")
    );
    let to_sign = format!(
        "AWS4-HMAC-SHA256\n{}\n{}\n{}",
        claim.at,
        claim.scope,
        hex::encode(Sha256::digest(canonical))
    );
    let mut key = format!("AWS4{secret}").into_bytes();
    for part in claim.scope.split('/') {
        key = hmac(&key, part);
    }
    if hex::encode(hmac(&key, &to_sign)) == claim.signature {
        Ok(())
    } else {
        Err(Wrong::Signature)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// AWS's own example ("Example: GET Object" of the SigV4 page for S3).
    #[test]
    fn the_documented_example_holds_and_no_other() {
        let headers = [
            ("host", "examplebucket.s3.amazonaws.com"),
            ("range", "bytes=0-9"),
            (
                "x-amz-content-sha256",
                "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            ),
            ("x-amz-date", "20130524T000000Z"),
            (
                "authorization",
                "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
            ),
        ];
        let mut request = Request {
            method: "GET".to_owned(),
            path: "/test.txt".to_owned(),
            query: String::new(),
            headers: headers
                .iter()
                .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
                .collect(),
            body: Vec::new(),
        };
        let secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";
        let now: Timestamp = "2013-05-24T00:00:30Z".parse().unwrap();
        let found = claim(&request).unwrap().unwrap();
        assert_eq!(check(&request, &found, secret, now), Ok(()));
        assert_eq!(check(&request, &found, "another", now), Err(Wrong::Signature));
        let late: Timestamp = "2013-05-24T00:16:00Z".parse().unwrap();
        assert_eq!(check(&request, &found, secret, late), Err(Wrong::Skewed));
        request.path = "/other.txt".to_owned();
        assert_eq!(check(&request, &found, secret, now), Err(Wrong::Signature));
    }
}
