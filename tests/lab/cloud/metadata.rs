//! The instance metadata service, version 2 alone: a token by PUT, then the credentials of the instance's role and the identity document.

use super::{
    http::{Reply, Request, Response, Server},
    principals::Principals,
};
use anyhow::Result;
use serde_json::{Value, json};
use std::sync::Arc;

const TOKEN: &str = "lab-metadata-token";
/// How long the credentials of a role are good for, in seconds.
const SECONDS: i64 = 3600;

/// The service of one instance. Its credentials are those of `role`, which has these policies.
pub fn start(
    principals: Arc<Principals>,
    instance: &str,
    role: &str,
    policies: Vec<Value>,
) -> Result<Server> {
    let (instance, role) = (instance.to_owned(), role.to_owned());
    Server::start(Arc::new(move |request: Request| {
        Reply::Whole(answer(&request, &principals, &instance, &role, &policies))
    }))
}

fn answer(
    request: &Request,
    principals: &Principals,
    instance: &str,
    role: &str,
    policies: &[Value],
) -> Response {
    let text = |body: String| Response::new(200, "text/plain", body);
    if request.method == "PUT" && request.path == "/latest/api/token" {
        let mut token = text(TOKEN.to_owned());
        token.headers.push((
            "x-aws-ec2-metadata-token-ttl-seconds".to_owned(),
            "21600".to_owned(),
        ));
        return token;
    }
    if request.header("x-aws-ec2-metadata-token") != TOKEN {
        return Response::new(401, "text/plain", "");
    }
    let credentials = "/latest/meta-data/iam/security-credentials";
    match request.path.trim_end_matches('/') {
        path if path == credentials => text(role.to_owned()),
        path if path == format!("{credentials}/{role}") => {
            let arn = format!("arn:aws:iam::123456789012:role/{role}");
            let (key, principal) = principals.add(
                &format!("AROALAB{role}:{instance}"),
                &arn,
                policies.to_vec(),
                None,
                Some(SECONDS),
            );
            let body = json!({
                "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": key, "SecretAccessKey": principal.secret, "Token": principal.token,
                "LastUpdated": jiff::Timestamp::now().to_string(), "Expiration": principal.expires.map(|e| format!("{e:.0}")),
            });
            Response::new(200, "application/json", body.to_string())
        }
        "/latest/meta-data/placement/region" => text("us-east-1".to_owned()),
        "/latest/dynamic/instance-identity/document" => text(
            json!({"instanceId": instance, "accountId": "123456789012", "region": "us-east-1"}).to_string(),
        ),
        "/latest/dynamic/instance-identity/rsa2048" => text("bm8gcmVhbCBzaWduYXR1cmU=".to_owned()),
        _ => Response::new(404, "text/plain", ""),
    }
}
