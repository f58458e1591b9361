//! Who may ask: keys, whose they are, and what policies they carry. What STS hands out is entered here, too.

use super::{
    http::{Request, Response},
    sigv4::{self, Claim, Wrong},
};
use jiff::{Timestamp, ToSpan as _};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
};

/// One key.
#[derive(Clone, Debug)]
pub struct Principal {
    /// The secret half.
    pub secret: String,
    /// What must come along where the key is temporary.
    pub token: Option<String>,
    /// `${aws:userid}`.
    pub userid: String,
    /// `aws:PrincipalArn`: the role or the user.
    pub arn: String,
    /// Policies of the identity.
    pub policies: Vec<Value>,
    /// The session policy.
    pub session: Option<Value>,
    /// When it ends.
    pub expires: Option<Timestamp>,
}

/// What the lab's secrets begin with, and its tokens.
pub const SECRET: &str = "lab/secret/";
/// See [`SECRET`].
pub const TOKEN: &str = "lab+token+";

/// So many characters that nobody has seen before.
fn random(count: usize) -> String {
    let bytes: String = std::iter::repeat_with(|| uuid::Uuid::new_v4().simple().to_string())
        .take(count / 32 + 1)
        .collect();
    bytes.chars().take(count).collect()
}

/// Everybody.
#[derive(Default)]
pub struct Principals {
    keys: Mutex<BTreeMap<String, Principal>>,
    next: Mutex<u64>,
    /// Seconds that sessions are good for, whatever was asked for; that where this is zero.
    lent_seconds: AtomicI64,
}

impl Principals {
    fn keys(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Principal>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters one, and gives its key. Secrets look like nothing else, so that a test can search for them.
    pub fn add(
        &self,
        userid: &str,
        arn: &str,
        policies: Vec<Value>,
        session: Option<Value>,
        seconds: Option<i64>,
    ) -> (String, Principal) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next += 1;
        let kind = if seconds.is_some() { "ASIA" } else { "AKIA" };
        let key = format!("{kind}LAB{:013}", *next);
        let principal = Principal {
            secret: format!("{SECRET}{}", random(40 - SECRET.len())),
            token: seconds.is_some().then(|| format!("{TOKEN}{}", random(600))),
            userid: userid.to_owned(),
            arn: arn.to_owned(),
            policies,
            session,
            expires: seconds.map(|s| {
                Timestamp::now()
                    .saturating_add(s.seconds())
                    .unwrap_or(Timestamp::MAX)
            }),
        };
        self.keys().insert(key.clone(), principal.clone());
        (key, principal)
    }

    /// Has sessions end after so many seconds, whatever is asked for.
    pub fn shorten_sessions(&self, seconds: i64) {
        self.lent_seconds.store(seconds, Ordering::SeqCst);
    }

    /// See [`Principals::shorten_sessions`].
    pub fn lent_seconds(&self) -> i64 {
        self.lent_seconds.load(Ordering::SeqCst)
    }

    /// The newest session of this user id, with its key.
    pub fn session(&self, userid: &str) -> Option<(String, Principal)> {
        let keys = self.keys();
        let of = keys.iter().filter(|(_, p)| p.userid == userid);
        of.max_by_key(|(_, p)| p.expires)
            .map(|(key, p)| (key.clone(), p.clone()))
    }

    /// Every secret and every token that was handed out.
    pub fn secrets(&self) -> Vec<String> {
        let keys = self.keys();
        keys.values()
            .flat_map(|p| [Some(p.secret.clone()), p.token.clone()])
            .flatten()
            .collect()
    }

    /// Ends every temporary key that there is now.
    pub fn expire(&self) {
        for principal in self.keys().values_mut().filter(|p| p.expires.is_some()) {
            principal.expires = Some(Timestamp::UNIX_EPOCH);
        }
    }

    /// Who asks; or what AWS would answer: a status, a code, a message.
    pub fn who(&self, request: &Request) -> Result<(Claim, Principal), (u16, &'static str, String)> {
        let refused = |status, code, message: &str| (status, code, message.to_owned());
        let claim = match sigv4::claim(request) {
            Ok(Some(claim)) => claim,
            Ok(None) => return Err(refused(403, "AccessDenied", "Anonymous access is not allowed")),
            Err(error) => return Err((400, "AuthorizationHeaderMalformed", error.to_string())),
        };
        let Some(principal) = self.keys().get(&claim.access_key).cloned() else {
            return Err(refused(403, "InvalidAccessKeyId", "The key does not exist"));
        };
        if principal.expires.is_some_and(|end| end <= Timestamp::now()) {
            return Err(refused(400, "ExpiredToken", "The provided token has expired"));
        }
        let sent = match request.header("x-amz-security-token") {
            "" => sigv4::parameter(&request.query, "X-Amz-Security-Token"),
            token => Some(token.to_owned()),
        };
        if sent != principal.token {
            return Err(refused(
                403,
                "InvalidToken",
                "The token does not belong to the key",
            ));
        }
        match sigv4::check(request, &claim, &principal.secret, Timestamp::now()) {
            Ok(()) => Ok((claim, principal)),
            Err(Wrong::Signature) => Err(refused(
                403,
                "SignatureDoesNotMatch",
                "The signature does not match",
            )),
            Err(Wrong::Skewed) => Err(refused(
                403,
                "RequestTimeTooSkewed",
                "The difference between the request time and the current time is too large",
            )),
            Err(Wrong::Expired) => Err(refused(403, "AccessDenied", "Request has expired")),
            Err(Wrong::Body) => Err(refused(
                400,
                "XAmzContentSHA256Mismatch",
                "The body is not what was signed",
            )),
        }
    }
}

/// An error as S3 and STS say it.
pub fn xml_error(status: u16, code: &str, message: &str) -> Response {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message><RequestId>LAB</RequestId></Error>"
    );
    Response::new(status, "application/xml", body)
}
