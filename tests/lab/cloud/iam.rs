//! The subset of IAM that the project's policies use, evaluated: an explicit Deny wins; a session policy must allow; the identity's policy or the
//! bucket's must allow. Everything that is not in the subset is an error, never a guess.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use std::collections::BTreeMap;

/// One request, as policies see it.
pub struct Question<'a> {
    /// `s3:PutObject`.
    pub action: &'a str,
    /// `arn:aws:s3:::bucket/key`.
    pub resource: &'a str,
    /// Condition keys, in lower case: `aws:userid`, `s3:if-none-match`.
    pub context: &'a BTreeMap<String, String>,
}

/// What policies say, and which statement says it.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Allowed by the statement of that Sid.
    Allowed(String),
    /// Denied by it.
    Denied(String),
    /// No statement allows it.
    Silent,
}

/// What one policy says.
pub fn ask(policy: &Value, question: &Question) -> Result<Answer> {
    let mut allowed = None;
    for statement in list(&policy["Statement"]) {
        if !applies(statement, question)? {
            continue;
        }
        let sid = statement["Sid"]
            .as_str()
            .unwrap_or("a statement without a Sid")
            .to_owned();
        match statement["Effect"].as_str() {
            Some("Deny") => return Ok(Answer::Denied(sid)),
            Some("Allow") => allowed = allowed.or(Some(sid)),
            other => bail!("Effect {other:?}"),
        }
    }
    Ok(allowed.map_or(Answer::Silent, Answer::Allowed))
}

/// What all of them say together; the reason is for the caller to read.
pub fn decide(
    identity: &[Value],
    session: Option<&Value>,
    bucket: Option<&Value>,
    question: &Question,
) -> Result<Result<(), String>> {
    let mut allows = false;
    for policy in identity.iter().chain(bucket) {
        match ask(policy, question)? {
            Answer::Denied(sid) => return Ok(Err(format!("explicit deny: {sid}"))),
            Answer::Allowed(_) => allows = true,
            Answer::Silent => (),
        }
    }
    if let Some(session) = session {
        match ask(session, question)? {
            Answer::Denied(sid) => return Ok(Err(format!("explicit deny in the session policy: {sid}"))),
            Answer::Silent => return Ok(Err("the session policy does not allow it".to_owned())),
            Answer::Allowed(_) => (),
        }
    }
    Ok(if allows {
        Ok(())
    } else {
        Err("no policy allows it".to_owned())
    })
}

fn list(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(list) => list.iter().collect(),
        Value::Null => Vec::new(),
        one => vec![one],
    }
}

fn any(patterns: &Value, text: &str, context: &BTreeMap<String, String>, fold: bool) -> Result<bool> {
    for pattern in list(patterns) {
        let pattern = pattern.as_str().context("a pattern that is no string")?;
        // A variable without a value matches nothing.
        let Some(pattern) = substitute(pattern, context) else {
            continue;
        };
        let hit = if fold {
            like(&pattern.to_ascii_lowercase(), &text.to_ascii_lowercase())
        } else {
            like(&pattern, text)
        };
        if hit {
            return Ok(true);
        }
    }
    Ok(false)
}

fn applies(statement: &Value, question: &Question) -> Result<bool> {
    for key in statement
        .as_object()
        .context("a statement that is no object")?
        .keys()
    {
        if ![
            "Sid",
            "Effect",
            "Principal",
            "Action",
            "Resource",
            "NotResource",
            "Condition",
        ]
        .contains(&&key[..])
        {
            bail!("{key} is not in the subset");
        }
    }
    if !matches!(&statement["Principal"], Value::Null)
        && statement["Principal"] != "*"
        && statement["Principal"] != serde_json::json!({"AWS": "*"})
    {
        let context = question.context;
        if !any(
            &statement["Principal"]["AWS"],
            context.get("aws:principalarn").map_or("", |v| v),
            context,
            false,
        )? {
            return Ok(false);
        }
    }
    if !any(&statement["Action"], question.action, question.context, true)? {
        return Ok(false);
    }
    let resource = match (&statement["Resource"], &statement["NotResource"]) {
        (Value::Null, not) => !any(not, question.resource, question.context, false)?,
        (resource, _) => any(resource, question.resource, question.context, false)?,
    };
    if !resource {
        return Ok(false);
    }
    let no_conditions = serde_json::Map::new();
    for (operator, keys) in statement["Condition"].as_object().unwrap_or(&no_conditions) {
        for (key, wanted) in keys.as_object().context("a condition without keys")? {
            let value = question.context.get(&key.to_ascii_lowercase());
            let equal = |value: &str| any(wanted, value, question.context, false);
            let holds = match &operator[..] {
                "Null" => (wanted == "true" || wanted == true) == value.is_none(),
                "Bool" => {
                    value.is_some_and(|v| *v == wanted.as_str().map_or(wanted.to_string(), str::to_owned))
                }
                "StringEquals" | "StringLike" | "ArnLike" | "ArnEquals" => {
                    value.map_or(Ok(false), |v| equal(v))?
                }
                "StringNotEquals" | "StringNotLike" | "ArnNotLike" | "ArnNotEquals" => {
                    !value.map_or(Ok(false), |v| equal(v))?
                }
                "StringNotEqualsIfExists" => !value.map_or(Ok(true), |v| equal(v))?,
                other => bail!("the operator {other} is not in the subset"),
            };
            if !holds {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Puts in the values of `${aws:userid}` and the like; their own `*` and `?` are no wildcards, which none of ours has.
fn substitute(pattern: &str, context: &BTreeMap<String, String>) -> Option<String> {
    let mut out = String::new();
    let mut rest = pattern;
    while let Some((before, behind)) = rest.split_once("${") {
        let (name, behind) = behind.split_once('}')?;
        out += before;
        out += context.get(&name.to_ascii_lowercase())?;
        rest = behind;
    }
    Some(out + rest)
}

/// `*` for any text, `?` for one character.
fn like(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t, mut star) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => (star = Some((p, t)), p += 1).1,
            Some(b'?') => (p += 1, t += 1).1,
            Some(c) if *c == text[t] => (p += 1, t += 1).1,
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    (p, t) = (at + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn deny_wins_and_a_session_narrows() {
        let context: BTreeMap<String, String> = [("aws:userid".to_owned(), "AROA:i-1".to_owned())].into();
        let question = |action, resource| Question {
            action,
            resource,
            context: &context,
        };
        let identity = [
            json!({"Statement": {"Sid": "Own", "Effect": "Allow", "Action": "s3:PutObject", "Resource": "arn:aws:s3:::b/evidence/${aws:userid}/*"}}),
        ];
        let put = question("s3:PutObject", "arn:aws:s3:::b/evidence/AROA:i-1/x");
        assert_eq!(decide(&identity, None, None, &put).unwrap(), Ok(()));
        let other = question("s3:PutObject", "arn:aws:s3:::b/evidence/AROA:i-2/x");
        assert!(decide(&identity, None, None, &other).unwrap().is_err());
        let deny = json!({"Statement": [{"Sid": "No", "Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": "*", "Condition": {"Null": {"s3:if-none-match": "true"}}}]});
        assert_eq!(
            decide(&identity, None, Some(&deny), &put).unwrap(),
            Err("explicit deny: No".to_owned())
        );
        let session = json!({"Statement": {"Effect": "Allow", "Action": "s3:PutObject", "Resource": "arn:aws:s3:::b/evidence/AROA:i-1/y"}});
        assert!(
            decide(&identity, Some(&session), None, &put)
                .unwrap()
                .unwrap_err()
                .contains("session")
        );
        assert!(ask(&json!({"Statement": {"Effect": "Allow", "NotAction": "x"}}), &put).is_err());
    }

    #[test]
    fn wildcards() {
        for (pattern, text, holds) in [
            ("*", "", true),
            ("a*c", "abbc", true),
            ("a*c", "abb", false),
            ("a?c", "abc", true),
            ("a", "ab", false),
            ("*/x/*", "1/x/2/x/3", true),
        ] {
            assert_eq!(like(pattern, text), holds, "{pattern} {text}");
        }
    }
}
