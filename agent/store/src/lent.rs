//! Credentials that the controller lends, for a host whose own role has no right: they lie in an order, an object of another bucket. A presigned address
//! leads to it once; what is found there may write one capture's prefix, and may read that one order again, where the controller renews it.

use crate::aws::said;
use aws_config::SdkConfig;
use aws_credential_types::{
    Credentials,
    provider::{ProvideCredentials, SharedCredentialsProvider, error::CredentialsError, future},
};
use aws_sdk_s3::config::{
    ConfigBag, Intercept, RuntimeComponents, interceptors::BeforeTransmitInterceptorContextMut,
};
use aws_sdk_s3::{Client, config::IdentityCache, operation::get_object::GetObjectOutput};
use aws_smithy_runtime_api::{box_error::BoxError, client::orchestrator::HttpRequest};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

/// An order is a kilobyte or two.
const MAX_ORDER: usize = 64 << 10;
/// New credentials are asked for so long before the old ones end, or when a quarter of their time is left.
const BEFORE: SignedDuration = SignedDuration::from_mins(5);
/// Between two questions, when there was nothing new.
const AGAIN: Duration = Duration::from_secs(2);
/// An answer that takes longer is not waited for: what is there is good for a while.
const PATIENCE: Duration = Duration::from_secs(5);

/// What an order holds.
#[derive(Clone, Serialize, Deserialize)]
pub struct LentOrder {
    /// As AWS calls them.
    pub access_key_id: String,
    /// Secret.
    pub secret_access_key: String,
    /// Secret.
    pub session_token: String,
    /// When the credentials were made.
    pub lent: Timestamp,
    /// When they end.
    pub expires: Timestamp,
    /// Where the order lies, to be read again.
    pub bucket: String,
    /// Its key there.
    pub key: String,
}

impl std::fmt::Debug for LentOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "credentials lent until {}", self.expires)
    }
}

impl LentOrder {
    /// When to look for the next ones.
    fn due(&self) -> Timestamp {
        let whole = self.expires.duration_since(self.lent);
        let before = if whole / 4 < BEFORE { whole / 4 } else { BEFORE };
        self.expires.saturating_sub(before).unwrap_or(self.expires)
    }

    fn credentials(&self, until: Timestamp) -> Credentials {
        let seconds = u64::try_from(until.as_second()).unwrap_or(0);
        Credentials::new(
            &self.access_key_id,
            &self.secret_access_key,
            Some(self.session_token.clone()),
            Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)),
            "Lent",
        )
    }
}

/// Credentials of an order, and of those that take its place.
#[derive(Debug)]
pub struct Lent {
    config: SdkConfig,
    order: Mutex<LentOrder>,
    /// When the order was read again last.
    asked: Mutex<Option<Instant>>,
}

/// Sends a request to a presigned address: without any header of AWS's, since S3 refuses those that were not signed.
#[derive(Debug)]
struct Presigned(String);

impl Intercept for Presigned {
    fn name(&self) -> &'static str {
        "Presigned"
    }

    fn modify_before_transmit(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request_mut();
        let names: Vec<String> = request
            .headers()
            .iter()
            .map(|(name, _)| name.to_owned())
            .collect();
        for name in names
            .iter()
            .filter(|name| name.starts_with("x-amz-") || name.starts_with("amz-"))
        {
            request.headers_mut().remove(name.as_str());
        }
        Ok(request.set_uri(self.0.as_str())?)
    }
}

impl Lent {
    /// Takes them from behind a presigned address. An error is one line, without the address: it is a secret as long as it is good.
    pub async fn borrow(config: &SdkConfig, address: &str) -> Result<Self, String> {
        // Else the request would go where a bucket of the placeholder's name is, and that may be anybody's.
        HttpRequest::empty()
            .set_uri(address)
            .map_err(|_| "the address of the order is none".to_owned())?;
        let mut unsigned = config.clone().into_builder();
        unsigned.set_credentials_provider(None);
        let unsigned = aws_sdk_s3::config::Builder::from(&unsigned.build())
            .allow_no_auth()
            .interceptor(Presigned(address.to_owned()))
            .build();
        let answer = Client::from_conf(unsigned)
            .get_object()
            .bucket("order")
            .key("order")
            .send()
            .await
            .map_err(|error| {
                format!(
                    "the order with the lent credentials could not be read: {}",
                    said(&error)
                )
            })?;
        Ok(Lent {
            config: config.clone(),
            order: Mutex::new(read(answer).await?),
            asked: Mutex::default(),
        })
    }

    /// True at most once in a while.
    fn may_ask(&self) -> bool {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let may = asked.is_none_or(|at| at.elapsed() > AGAIN);
        if may {
            *asked = Some(Instant::now());
        }
        may
    }

    fn current(&self) -> LentOrder {
        self.order.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the order again, by the rights that it gave.
    async fn renew(&self, current: &LentOrder) -> Result<LentOrder, String> {
        let own = SharedCredentialsProvider::new(current.credentials(current.expires));
        let config = self
            .config
            .clone()
            .into_builder()
            .credentials_provider(own)
            .identity_cache(IdentityCache::no_cache())
            .build();
        let answer = Client::new(&config)
            .get_object()
            .bucket(&current.bucket)
            .key(&current.key)
            .send()
            .await
            .map_err(|error| said(&error))?;
        let order = read(answer).await?;
        // Whoever could write there must not send the rest elsewhere.
        if (&order.bucket, &order.key) != (&current.bucket, &current.key) {
            return Err("it names another place than its own".to_owned());
        }
        Ok(order)
    }
}

async fn read(answer: GetObjectOutput) -> Result<LentOrder, String> {
    let (mut body, mut bytes) = (answer.body, Vec::new());
    while let Some(part) = body.next().await {
        bytes.extend_from_slice(&part.map_err(|error| format!("the order was cut off: {error}"))?);
        if bytes.len() > MAX_ORDER {
            return Err("what lies where the order should be is larger than any".to_owned());
        }
    }
    // Without the words of the error, which may quote it.
    serde_json::from_slice(&bytes).map_err(|_| "what lies where the order should be is none".to_owned())
}

impl ProvideCredentials for Lent {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async {
            let now = Timestamp::now();
            let mut order = self.current();
            let mut why = "not just now".to_owned();
            if now >= order.due() && self.may_ask() {
                let renewed = tokio::time::timeout(PATIENCE, self.renew(&order)).await;
                match renewed.unwrap_or_else(|_| Err("no answer in time".to_owned())) {
                    Ok(newer) if newer.expires > order.expires => {
                        *self.order.lock().unwrap_or_else(PoisonError::into_inner) = newer.clone();
                        order = newer;
                    }
                    Ok(_) => why = "nobody renewed them".to_owned(),
                    // What there is may be good for a while.
                    Err(error) => why = error,
                }
            }
            if now >= order.expires {
                let why = format!("what was lent has ended; the order was read again: {why}");
                return Err(CredentialsError::provider_error(why));
            }
            // From when they are due nobody keeps them: they are asked for at every turn, and may be others then.
            let until = if now < order.due() { order.due() } else { now };
            Ok(order.credentials(until))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(minutes: i64) -> LentOrder {
        LentOrder {
            access_key_id: "AKIA".to_owned(),
            secret_access_key: "topsecret".to_owned(),
            session_token: "topsecret".to_owned(),
            lent: Timestamp::UNIX_EPOCH,
            expires: Timestamp::UNIX_EPOCH + SignedDuration::from_mins(minutes),
            bucket: "b".to_owned(),
            key: "k".to_owned(),
        }
    }

    #[test]
    fn it_is_renewed_in_time() {
        assert_eq!(order(60).due().as_second(), 55 * 60);
        assert_eq!(order(4).due().as_second(), 3 * 60);
    }

    #[test]
    fn no_secret_is_printed() {
        assert!(!format!("{:?}", order(60)).contains("topsecret"));
    }
}
