//! The gate in front of the S3 server: signatures and their times, the identity's, the session's and the bucket's policies, Object Lock's demand for a
//! checksum. What it lets through reaches the server as it was sent. It answers STS's `GetCallerIdentity` as well. To policies it says that every
//! request came over TLS, which on loopback it does not.

use super::{
    faults::{self, Faults},
    http::{Handler, Reply, Request, Response, Server, forward},
    iam::{Question, decide},
    localstack::LocalStack,
    principals::{Principal, Principals, xml_error},
    sigv4::{decode, parameter},
};
use anyhow::{Context as _, Result, ensure};
use jiff::{Timestamp, fmt::rfc2822::DateTimePrinter};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// A gate, and what is behind it.
pub struct Gate {
    /// Who may ask.
    pub principals: Arc<Principals>,
    /// What goes wrong on puts.
    pub faults: Arc<Faults>,
    /// Every decision: who, what, on what, and why not.
    pub log: Arc<Mutex<Vec<Decision>>>,
    server: Server,
    local: Arc<LocalStack>,
    policies: Arc<Mutex<BTreeMap<String, Value>>>,
    services: Services,
    roles: Roles,
}

/// Roles that can be assumed, and their policies.
type Roles = Arc<Mutex<BTreeMap<String, Vec<Value>>>>;

/// Who answers for a service other than S3, by the name in the signature.
type Services = Arc<Mutex<BTreeMap<String, Handler>>>;

/// One decision.
#[derive(Clone, Debug)]
pub struct Decision {
    /// `${aws:userid}`.
    pub userid: String,
    /// `s3:PutObject`.
    pub action: String,
    /// `arn:aws:s3:::bucket/key`.
    pub resource: String,
    /// Why it was refused, by a policy.
    pub refused: Option<String>,
}

struct Inside {
    principals: Arc<Principals>,
    faults: Arc<Faults>,
    log: Arc<Mutex<Vec<Decision>>>,
    local: Arc<LocalStack>,
    policies: Arc<Mutex<BTreeMap<String, Value>>>,
    services: Services,
    roles: Roles,
}

impl Gate {
    /// Starts it and the server behind it.
    pub fn start() -> Result<Self> {
        let inside = Arc::new(Inside {
            principals: Arc::default(),
            faults: Arc::default(),
            log: Arc::default(),
            local: Arc::new(LocalStack::start()?),
            policies: Arc::default(),
            services: Arc::default(),
            roles: Arc::default(),
        });
        let handler = inside.clone();
        let server = Server::start(Arc::new(move |request| handler.handle(&request)))?;
        Ok(Gate {
            principals: inside.principals.clone(),
            faults: inside.faults.clone(),
            log: inside.log.clone(),
            local: inside.local.clone(),
            policies: inside.policies.clone(),
            services: inside.services.clone(),
            roles: inside.roles.clone(),
            server,
        })
    }

    /// What `AWS_ENDPOINT_URL` is to be.
    pub fn url(&self) -> String {
        self.server.url()
    }

    /// Has `handler` answer for a service from here on.
    pub fn serve(&self, service: &str, handler: Handler) {
        self.services
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(service.to_owned(), handler);
    }

    /// Puts an object behind the gate, as whoever owns the account can.
    pub fn plant(&self, bucket: &str, key: &str, bytes: Vec<u8>) -> Result<()> {
        let request = Request {
            method: "PUT".to_owned(),
            path: format!("/{bucket}/{key}"),
            query: String::new(),
            headers: [("host".to_owned(), "127.0.0.1".to_owned())].into(),
            body: bytes,
        };
        let answer = forward(&request, self.local.port)?;
        ensure!(answer.status < 300, "{bucket}/{key}: {}", answer.status);
        Ok(())
    }

    /// Enters a role that whoever may can assume.
    pub fn role(&self, arn: &str, policies: Vec<Value>) {
        self.roles
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(arn.to_owned(), policies);
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.server.port()
    }

    /// Makes a bucket behind the gate, locked for a day in COMPLIANCE mode where asked, under this policy.
    pub fn bucket(&self, name: &str, locked: bool, policy: Option<Value>) -> Result<()> {
        let ask = |method: &str, query: &str, headers: &[(&str, &str)], body: &str| {
            let request = Request {
                method: method.to_owned(),
                path: format!("/{name}"),
                query: query.to_owned(),
                headers: headers
                    .iter()
                    .chain(&[("host", "127.0.0.1")])
                    .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
                    .collect(),
                body: body.as_bytes().to_vec(),
            };
            let answer = forward(&request, self.local.port)?;
            ensure!(
                answer.status < 300,
                "{method} {name}?{query}: {} {}",
                answer.status,
                String::from_utf8_lossy(&answer.body)
            );
            anyhow::Ok(())
        };
        let lock = [("x-amz-bucket-object-lock-enabled", "true")];
        ask("PUT", "", if locked { &lock } else { &[] }, "")?;
        if locked {
            let rule = "<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention><Mode>COMPLIANCE</Mode><Days>1</Days></DefaultRetention></Rule></ObjectLockConfiguration>";
            ask("PUT", "object-lock", &[], rule)?;
        }
        if let Some(policy) = policy {
            self.policies
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(name.to_owned(), policy);
        }
        Ok(())
    }

    /// The requests that a policy refused.
    pub fn refusals(&self) -> Vec<Decision> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.iter().filter(|d| d.refused.is_some()).cloned().collect()
    }
}

/// What a call of Systems Manager is about: every one of them must be allowed. By a tag, it is some instance.
fn resources(operation: &str, body: &[u8]) -> Vec<String> {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let arn = |service: &str, rest: &str| format!("arn:aws:{service}:us-east-1:123456789012:{rest}");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    match operation {
        "DescribeDocument" => vec![arn("ssm", &format!("document/{}", text(&body["Name"])))],
        "SendCommand" => {
            let ids = body["InstanceIds"].as_array().into_iter().flatten().map(text);
            let ids = ids.chain(body["Targets"].is_array().then(|| "i-0any".to_owned()));
            let instance = |id: String| match id.starts_with("mi-") {
                true => arn("ssm", &format!("managed-instance/{id}")),
                false => arn("ec2", &format!("instance/{id}")),
            };
            let mut all: Vec<String> = ids.map(instance).collect();
            all.push(arn("ssm", &format!("document/{}", text(&body["DocumentName"]))));
            all
        }
        // These take none.
        _ => vec!["*".to_owned()],
    }
}

impl Inside {
    fn handle(&self, request: &Request) -> Reply {
        match self.judge(request) {
            Ok(reply) => reply,
            Err(error) => Reply::Whole(xml_error(500, "LabError", &format!("{error:#}"))),
        }
    }

    fn judge(&self, request: &Request) -> Result<Reply> {
        let (claim, principal) = match self.principals.who(request) {
            Ok(who) => who,
            Err((status, code, message)) => return Ok(Reply::Whole(xml_error(status, code, &message))),
        };
        let other = self
            .services
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&claim.service)
            .cloned();
        if let Some(handler) = other {
            let operation = request
                .header("x-amz-target")
                .rsplit('.')
                .next()
                .unwrap_or_default();
            let action = format!("{}:{operation}", claim.service);
            for resource in resources(operation, &request.body) {
                let question = Question {
                    action: &action,
                    resource: &resource,
                    context: &BTreeMap::new(),
                };
                if let Err(why) = decide(&principal.policies, principal.session.as_ref(), None, &question)? {
                    let why = format!("{action} on {resource}: {why}");
                    let body = serde_json::json!({"__type": "AccessDeniedException", "message": why});
                    return Ok(Reply::Whole(Response::new(
                        400,
                        "application/x-amz-json-1.1",
                        body.to_string(),
                    )));
                }
            }
            return Ok(handler(request.clone()));
        }
        if claim.service == "sts" {
            let mut answer = self.sts(request, &principal)?;
            let now = DateTimePrinter::new().timestamp_to_rfc9110_string(&Timestamp::now())?;
            answer.headers.push(("date".to_owned(), now));
            return Ok(Reply::Whole(answer));
        }
        let (bucket, key) = request
            .path
            .trim_start_matches('/')
            .split_once('/')
            .unwrap_or((request.path.trim_start_matches('/'), ""));
        let key = decode(key);
        let action = action(request, &key)
            .with_context(|| format!("{} {}?{}", request.method, request.path, request.query))?;
        let resource = if key.is_empty() {
            format!("arn:aws:s3:::{bucket}")
        } else {
            format!("arn:aws:s3:::{bucket}/{key}")
        };
        let mut context: BTreeMap<String, String> = [
            ("aws:userid", principal.userid.clone()),
            ("aws:principalarn", principal.arn.clone()),
            ("aws:securetransport", "true".to_owned()),
        ]
        .into_iter()
        .map(|(n, v)| (n.to_owned(), v))
        .collect();
        if action == "s3:PutObject" {
            context.insert("s3:objectcreationoperation".to_owned(), "true".to_owned());
        }
        if let Some(condition) = request.headers.get("if-none-match") {
            context.insert("s3:if-none-match".to_owned(), condition.clone());
        }
        let policy = self
            .policies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(bucket)
            .cloned();
        let question = Question {
            action: &action,
            resource: &resource,
            context: &context,
        };
        let decided = decide(
            &principal.policies,
            principal.session.as_ref(),
            policy.as_ref(),
            &question,
        )?;
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Decision {
                userid: principal.userid.clone(),
                action: action.clone(),
                resource: resource.clone(),
                refused: decided.clone().err(),
            });
        if let Err(why) = decided {
            return Ok(Reply::Whole(xml_error(
                403,
                "AccessDenied",
                &format!("{} may not {action} {resource}: {why}", principal.arn),
            )));
        }
        if action == "s3:GetBucketPolicy" {
            let answer = policy.map_or_else(
                || xml_error(404, "NoSuchBucketPolicy", "The bucket policy does not exist"),
                |policy| Response::new(200, "application/json", policy.to_string()),
            );
            return Ok(Reply::Whole(answer));
        }
        if action == "s3:PutObject" {
            // Object Lock demands a checksum in a header: a trailer does not count.
            if !request
                .headers
                .keys()
                .any(|name| name.starts_with("x-amz-checksum-") || name == "content-md5")
            {
                return Ok(Reply::Whole(xml_error(
                    400,
                    "InvalidRequest",
                    "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object Lock parameters",
                )));
            }
            if key.starts_with("evidence/") {
                self.faults.pass(&principal.userid);
            }
            if let Some(fault) = self.faults.next() {
                let answer = match fault.takes_effect() {
                    true => Some(forward(request, self.local.port)?),
                    false => None,
                };
                return Ok(faults::reply(fault, answer));
            }
        }
        Ok(Reply::Whole(forward(request, self.local.port)?))
    }
}

impl Inside {
    fn sts(&self, request: &Request, principal: &Principal) -> Result<Response> {
        let form = String::from_utf8_lossy(&request.body).replace('+', "%20");
        let field = |name: &str| parameter(&form, name).unwrap_or_default();
        if field("Action") == "GetCallerIdentity" {
            return Ok(caller_identity(principal));
        }
        ensure!(field("Action") == "AssumeRole", "STS: {}", field("Action"));
        let (arn, name) = (field("RoleArn"), field("RoleSessionName"));
        let question = Question {
            action: "sts:AssumeRole",
            resource: &arn,
            context: &BTreeMap::new(),
        };
        let allowed = decide(&principal.policies, principal.session.as_ref(), None, &question)?;
        let policies = self
            .roles
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&arn)
            .cloned();
        let (Ok(()), Some(policies)) = (allowed, policies) else {
            let body = format!(
                "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>{} may not assume {arn}</Message></Error></ErrorResponse>",
                principal.arn
            );
            return Ok(Response::new(403, "text/xml", body));
        };
        let session = match field("Policy") {
            text if text.is_empty() => None,
            text => Some(serde_json::from_str(&text).context("a session policy")?),
        };
        let seconds = match self.principals.lent_seconds() {
            0 => field("DurationSeconds").parse()?,
            short => short,
        };
        let role = arn.rsplit('/').next().unwrap_or_default();
        let userid = format!("AROALAB{role}:{name}");
        let (key, lent) = self
            .principals
            .add(&userid, &arn, policies, session, Some(seconds));
        let body = format!(
            "<AssumeRoleResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><AssumeRoleResult><AssumedRoleUser><Arn>{arn}</Arn>\
             <AssumedRoleId>{userid}</AssumedRoleId></AssumedRoleUser><Credentials><AccessKeyId>{key}</AccessKeyId><SecretAccessKey>{}</SecretAccessKey>\
             <SessionToken>{}</SessionToken><Expiration>{:.0}</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>",
            lent.secret,
            lent.token.unwrap_or_default(),
            lent.expires.context("no end")?,
        );
        Ok(Response::new(200, "text/xml", body))
    }
}

fn action(request: &Request, key: &str) -> Result<String> {
    let has = |name: &str| {
        request
            .query
            .split('&')
            .any(|pair| pair.split('=').next() == Some(name))
    };
    let name = match (&request.method[..], key.is_empty()) {
        ("PUT", false) if has("retention") => "PutObjectRetention",
        ("PUT", false) => "PutObject",
        ("GET" | "HEAD", false) if has("versionId") => "GetObjectVersion",
        ("GET" | "HEAD", false) => "GetObject",
        ("DELETE", false) if has("versionId") => "DeleteObjectVersion",
        ("DELETE", false) => "DeleteObject",
        ("GET", true) if has("versions") => "ListBucketVersions",
        ("GET", true) if has("list-type") => "ListBucket",
        ("GET", true) if has("object-lock") => "GetBucketObjectLockConfiguration",
        ("GET", true) if has("versioning") => "GetBucketVersioning",
        ("GET", true) if has("policy") => "GetBucketPolicy",
        ("HEAD", true) => "ListBucket",
        _ => anyhow::bail!("an operation that the gate does not know"),
    };
    Ok(format!("s3:{name}"))
}

fn caller_identity(principal: &Principal) -> Response {
    let body = format!(
        "<GetCallerIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><GetCallerIdentityResult><Arn>{}</Arn><UserId>{}</UserId><Account>123456789012</Account></GetCallerIdentityResult><ResponseMetadata><RequestId>LAB</RequestId></ResponseMetadata></GetCallerIdentityResponse>",
        principal.arn, principal.userid
    );
    Response::new(200, "text/xml", body)
}
