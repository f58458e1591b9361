//! A bucket. Every object is one PutObject with its full SHA-256 and `If-None-Match: *`: it is whole and unchangeable the moment it
//! is there, and a key is written once. Nothing is read back: the rights that this needs are `s3:PutObject` and, for SSE-KMS,
//! `kms:GenerateDataKey`.

use crate::{
    PutError, Store,
    aws::{self, Reach, Remembered, said},
    lent::Lent,
};
use aws_credential_types::provider::{SharedCredentialsProvider, error::CredentialsError};
use aws_sdk_s3::config::{
    ConfigBag, Intercept, RuntimeComponents, interceptors::BeforeDeserializationInterceptorContextRef,
};
use aws_sdk_s3::{
    Client,
    config::http::HttpResponse,
    error::{ProvideErrorMetadata as _, SdkError},
    operation::{
        RequestId as _,
        put_object::{PutObjectError, PutObjectOutput},
    },
    primitives::ByteStream,
    types::{ChecksumAlgorithm, ServerSideEncryption},
};
use aws_smithy_runtime_api::box_error::BoxError;
use base64::Engine as _;
use bytes::Bytes;
use jiff::{Timestamp, fmt::rfc2822};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};
use stillframe_evidence::{
    layout::{CaptureId, Key, Writer, evidence_prefix},
    root::Hash,
    segments::Receipt,
};
use tokio::runtime::Runtime;

/// An object is tried for so long before it is given up. Memory is worth waiting for; a host under an intruder's control is not
/// given for ever.
const PATIENCE: Duration = Duration::from_secs(180);
/// The first pause; each is up to twice as long as the one before, at most [`LONGEST`], a random part of it (full jitter).
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(15);
/// And so often at most.
const ATTEMPTS: u32 = 24;

/// A bucket, and the folder of one capture in it.
pub struct S3 {
    runtime: Arc<Runtime>,
    client: Client,
    bucket: String,
    prefix: String,
    kms_key: Option<String>,
    at_once: usize,
    credentials: Option<Remembered>,
    /// Somebody gave up once: the others do not wait as long again.
    given_up: AtomicBool,
    clock: StoreClock,
}

/// What the store said last of its own time, in seconds since 1970, and by how many microseconds the host's clock was ahead of it then.
#[derive(Clone, Debug, Default)]
struct StoreClock(Arc<(AtomicI64, AtomicI64)>);

impl Intercept for StoreClock {
    fn name(&self) -> &'static str {
        "StoreClock"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date");
        if let Some(at) = date.and_then(|date| rfc2822::parse(date).ok()) {
            let at = at.timestamp();
            let ahead = Timestamp::now()
                .as_microsecond()
                .saturating_sub(at.as_microsecond());
            self.0.1.store(ahead, Ordering::Relaxed);
            self.0.0.store(at.as_second(), Ordering::Relaxed);
        }
        Ok(())
    }
}

/// What an `s3://` store needs to know besides its address.
#[derive(Clone, Default)]
pub struct Options {
    /// How S3 is reached.
    pub reach: Reach,
    /// The key under which S3 encrypts, when it is not the bucket's own default.
    pub kms_key: Option<String>,
    /// Whose credentials: the SDK's chain where this is absent.
    pub credentials: Option<SharedCredentialsProvider>,
    /// Or the address of the order that lends them.
    pub lent: Option<String>,
    /// The first part of the capture's prefix; asked of STS (`${aws:userid}`) where this is absent.
    pub writer: Option<Writer>,
    /// Puts that may be under way at once.
    pub at_once: usize,
}

/// `s3://bucket/prefix` in two.
pub fn address(target: &str) -> Result<(&str, &str), String> {
    let rest = target.strip_prefix("s3://").unwrap_or(target);
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b);
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(fits) {
        return Err(format!("--store {target}: `{bucket}` is no name of a bucket"));
    }
    let prefix = prefix.trim_end_matches('/');
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"-._/".contains(&b);
    if !prefix.bytes().all(fits) || prefix.split('/').any(|part| part == "." || part == "..") {
        return Err(format!(
            "--store {target}: the prefix may hold letters, digits, - . _ and / only"
        ));
    }
    Ok((bucket, prefix))
}

/// A key below the prefix of a store.
pub fn below(prefix: &str, key: &str) -> String {
    match prefix {
        "" => key.to_owned(),
        prefix => format!("{prefix}/{key}"),
    }
}

impl S3 {
    /// Opens `s3://bucket/prefix` for one capture. An error is one line for the person who named it.
    pub fn open(target: &str, capture: CaptureId, options: Options) -> Result<Self, String> {
        let (bucket, prefix) = address(target)?;
        let no_runtime = |error: io::Error| format!("--store {target}: no runtime: {error}");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(no_runtime)?;
        let runtime = Arc::new(runtime);
        // Retrying is done here, where it is known whether an attempt may have taken effect.
        let config = runtime
            .block_on(aws::config(&options.reach, 1, options.credentials.clone()))
            .map_err(|why| format!("--store {target}: {why}"))?;
        let lent = match &options.lent {
            Some(address) => {
                let lent = runtime.block_on(Lent::borrow(&config, address));
                Some(lent.map_err(|why| format!("--store {target}: {why}"))?)
            }
            None => None,
        };
        let is_lent = lent.is_some();
        let provider = lent
            .map(SharedCredentialsProvider::new)
            .or(config.credentials_provider());
        let credentials = provider.map(Remembered::new);
        if let Some(credentials) = credentials.as_ref().filter(|_| is_lent) {
            let no_thread = |error| format!("--store {target}: no thread for what is lent: {error}");
            credentials.tend(&runtime).map_err(no_thread)?;
        }
        let mut config = config.into_builder();
        config.set_credentials_provider(credentials.clone().map(SharedCredentialsProvider::new));
        let config = config.build();
        let clock = StoreClock::default();
        let writer = match options.writer {
            Some(writer) => writer,
            None => runtime
                .block_on(identity(&config, &clock))
                .map_err(|why| format!("--store {target}: {why}"))?,
        };
        let config = aws_sdk_s3::config::Builder::from(&config)
            .interceptor(clock.clone())
            .build();
        Ok(S3 {
            client: Client::from_conf(config),
            credentials,
            clock,
            runtime,
            bucket: bucket.to_owned(),
            prefix: below(prefix, &evidence_prefix(&writer, capture)),
            kms_key: options.kms_key,
            at_once: options.at_once.max(1),
            given_up: AtomicBool::new(false),
        })
    }

    async fn put_once(
        &self,
        key: &str,
        bytes: Bytes,
        sha256: &str,
    ) -> Result<PutObjectOutput, SdkError<PutObjectError, HttpResponse>> {
        let encryption = self.kms_key.as_ref().map(|_| ServerSideEncryption::AwsKms);
        self.client
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .if_none_match("*")
            .checksum_algorithm(ChecksumAlgorithm::Sha256)
            .checksum_sha256(sha256)
            .set_server_side_encryption(encryption)
            .set_ssekms_key_id(self.kms_key.clone())
            .content_length(i64::try_from(bytes.len()).unwrap_or(i64::MAX))
            .body(ByteStream::from(bytes))
            .send()
            .await
    }

    async fn put_until(&self, key: &str, body: &Bytes, sha256: Hash) -> Result<Receipt, PutError> {
        let sha256 = base64::engine::general_purpose::STANDARD.encode(sha256.0);
        let patience = if self.given_up.load(Ordering::Relaxed) {
            PATIENCE / 12
        } else {
            PATIENCE
        };
        let (began, mut attempts, mut lost) = (Instant::now(), 0, false);
        loop {
            attempts += 1;
            let error = match self.put_once(key, body.clone(), &sha256).await {
                Ok(answer) => match self.receipt(&answer, &sha256) {
                    Ok(receipt) => return Ok(receipt),
                    Err(why) => {
                        return Err(PutError {
                            error: io::Error::other(why),
                            lost: true,
                        });
                    }
                },
                Err(error) => error,
            };
            match judge(&error) {
                // Ours, by an attempt whose answer did not come; the controller can look.
                Fate::Taken if lost => return Ok(Receipt::default()),
                Fate::Taken => {
                    let why = "the key is taken: somebody else has written it";
                    return Err(PutError {
                        error: io::Error::new(io::ErrorKind::AlreadyExists, why),
                        lost: false,
                    });
                }
                Fate::Refused => {
                    return Err(PutError {
                        error: describe(&error),
                        lost,
                    });
                }
                Fate::Failed => (),
                Fate::Unknown => lost = true,
            }
            if attempts >= ATTEMPTS || began.elapsed() > patience {
                self.given_up.store(true, Ordering::Relaxed);
                let error = describe(&error);
                let error = io::Error::new(
                    error.kind(),
                    format!("{error} ({attempts} attempts in {} s)", began.elapsed().as_secs()),
                );
                return Err(PutError { error, lost });
            }
            tokio::time::sleep(pause(attempts)).await;
        }
    }
    fn receipt(&self, answer: &PutObjectOutput, sha256: &str) -> Result<Receipt, String> {
        if answer.checksum_sha256().is_some_and(|theirs| theirs != sha256) {
            return Err("the store answered with another checksum".to_owned());
        }
        let date = Timestamp::from_second(self.clock.0.0.load(Ordering::Relaxed)).ok();
        Ok(Receipt {
            confirmed: answer.checksum_sha256().is_some(),
            checksum: answer.checksum_sha256().map(str::to_owned),
            version_id: answer.version_id().map(str::to_owned),
            kms_key: answer.ssekms_key_id().map(str::to_owned),
            date: date.filter(|at| at.as_second() > 0),
        })
    }
}

impl Store for S3 {
    fn kind(&self) -> &'static str {
        "s3"
    }

    fn at_once(&self) -> usize {
        self.at_once
    }

    fn put(&self, key: &Key, bytes: &mut Vec<u8>) -> Result<Receipt, PutError> {
        // A copy would be megabytes of a host's memory. The name of what has its hash in its name says what was hashed when it was made.
        let body = Bytes::from(std::mem::take(bytes));
        let sha256 = key.sha256().unwrap_or_else(|| Hash::of(&body));
        let key = format!("{}/{key}", self.prefix);
        let result = self.runtime.block_on(self.put_until(&key, &body, sha256));
        *bytes = body.try_into_mut().map(Vec::from).unwrap_or_default();
        if result.is_ok() {
            self.given_up.store(false, Ordering::Relaxed);
        }
        result
    }

    fn clock_ahead_us(&self) -> Option<i64> {
        let (said, ahead) = &*self.clock.0;
        (said.load(Ordering::Relaxed) > 0).then(|| ahead.load(Ordering::Relaxed))
    }

    fn secrets(&self) -> Vec<String> {
        self.credentials
            .as_ref()
            .map(Remembered::secrets)
            .unwrap_or_default()
    }

    fn finish(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Who the credentials belong to, as bucket policies see it in `${aws:userid}`.
async fn identity(config: &aws_config::SdkConfig, clock: &StoreClock) -> Result<Writer, String> {
    let retry = aws_config::retry::RetryConfig::standard().with_max_attempts(5);
    let config = aws_sdk_sts::config::Builder::from(config)
        .retry_config(retry)
        // Nothing has been put yet, and the first event is to say how the host's clock stands.
        .interceptor(clock.clone())
        .build();
    let answer = aws_sdk_sts::Client::from_conf(config)
        .get_caller_identity()
        .send()
        .await
        .map_err(|error| {
            format!(
                "who the credentials belong to could not be asked of STS ({}); --writer gives it",
                said(&error)
            )
        })?;
    answer
        .user_id()
        .unwrap_or_default()
        .parse()
        .map_err(|error| format!("STS gave a user id that is no writer: {error}"))
}

/// What an attempt that did not succeed came to.
enum Fate {
    /// Something stands under the key.
    Taken,
    /// It will be refused again.
    Refused,
    /// It took no effect; another may.
    Failed,
    /// It may have taken effect.
    Unknown,
}

fn is_about_credentials(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<CredentialsError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

fn judge(error: &SdkError<PutObjectError, HttpResponse>) -> Fate {
    match error {
        SdkError::ConstructionFailure(_) => Fate::Failed,
        SdkError::DispatchFailure(failure) if failure.is_user() => Fate::Failed,
        // Without credentials nothing was sent.
        error if is_about_credentials(error) => Fate::Failed,
        SdkError::TimeoutError(_) | SdkError::DispatchFailure(_) | SdkError::ResponseError(_) => {
            Fate::Unknown
        }
        SdkError::ServiceError(service) => {
            let status = service.raw().status().as_u16();
            match (status, service.err().code()) {
                (412, _) => Fate::Taken,
                // Another put of the same key is under way: an attempt of ours that was thought dead.
                (409, _) => Fate::Unknown,
                (
                    400,
                    Some(
                        "BadDigest"
                        | "XAmzContentSHA256Mismatch"
                        | "IncompleteBody"
                        | "RequestTimeout"
                        | "ExpiredToken",
                    ),
                )
                | (403, Some("RequestTimeTooSkewed" | "ExpiredToken" | "SignatureDoesNotMatch"))
                | (429, _) => Fate::Failed,
                // A 503 that is not S3's own may come from something on the way that had passed the request on.
                (503, Some("SlowDown")) => Fate::Failed,
                (500..=599, _) => Fate::Unknown,
                _ => Fate::Refused,
            }
        }
        _ => Fate::Unknown,
    }
}

/// What the service said, or what went wrong on the way, in one line.
fn describe(error: &SdkError<PutObjectError, HttpResponse>) -> io::Error {
    match error {
        SdkError::ServiceError(service) => {
            let kind = match service.raw().status().as_u16() {
                401 | 403 => io::ErrorKind::PermissionDenied,
                404 => io::ErrorKind::NotFound,
                _ => io::ErrorKind::Other,
            };
            let text = format!(
                "{}: {}{}",
                service.err().code().unwrap_or("an error without a code"),
                service.err().message().unwrap_or("without a message"),
                service
                    .err()
                    .request_id()
                    .map_or_else(String::new, |id| format!(" (request {id})")),
            );
            io::Error::new(kind, text)
        }
        other => io::Error::other(said(other)),
    }
}

fn pause(attempts: u32) -> Duration {
    let longest = SHORTEST.saturating_mul(1 << attempts.min(16)).min(LONGEST);
    let mut random = [0; 2];
    // Without randomness all wait as long; nothing else depends on it.
    let share = getrandom::fill(&mut random).map_or(1.0, |()| {
        f64::from(u16::from_ne_bytes(random)) / f64::from(u16::MAX)
    });
    longest.mul_f64(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_bucket_and_a_prefix() {
        assert_eq!(address("s3://bucket"), Ok(("bucket", "")));
        assert_eq!(
            address("s3://a-bucket.x/cases/2026/"),
            Ok(("a-bucket.x", "cases/2026"))
        );
        for wrong in [
            "s3://",
            "s3://Bucket",
            "s3://b$(id)/",
            "s3://bucket/$(id)",
            "s3://bucket/a b",
            "s3://bucket/../x",
        ] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
        assert_eq!(below("", "k"), "k");
        assert_eq!(below("p/q", "k"), "p/q/k");
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        for attempts in 0..100 {
            assert!(pause(attempts) <= LONGEST);
        }
        assert!((0..32).map(|_| pause(1)).max() <= Some(2 * SHORTEST));
    }
}
