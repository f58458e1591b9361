//! How both programs reach AWS: through the SDK, by its usual variables and by flags that say the same, with TLS roots of our own and
//! without any file of the machine that it runs on. It knows no bucket and no command.

pub use aws_config::SdkConfig;
use aws_config::{
    BehaviorVersion,
    environment::EnvironmentVariableCredentialsProvider,
    identity::IdentityCache,
    imds::{credentials::ImdsCredentialsProvider, region::ImdsRegionProvider},
    meta::credentials::CredentialsProviderChain,
    provider_config::ProviderConfig,
    retry::RetryConfig,
    timeout::TimeoutConfig,
};
use aws_credential_types::{
    Credentials,
    provider::{ProvideCredentials, SharedCredentialsProvider, error::CredentialsError, future},
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_async::{
    rt::sleep::{SharedAsyncSleep, TokioSleep},
    time::{SharedTimeSource, SystemTimeSource},
};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode},
};
use aws_types::{
    origin::Origin,
    region::Region,
    service_config::{LoadServiceConfig, ServiceConfigKey},
};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::runtime::Runtime;

/// How AWS is reached, where it is not as the SDK's variables say (`AWS_REGION`, `AWS_ENDPOINT_URL`, `AWS_ENDPOINT_URL_S3` and the like, `AWS_USE_FIPS_ENDPOINT`,
/// `AWS_USE_DUALSTACK_ENDPOINT`, `AWS_CA_BUNDLE`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// The region; else `AWS_REGION`, else what the instance's metadata service says.
    pub region: Option<String>,
    /// Where requests go instead of AWS.
    pub endpoint: Option<String>,
    /// FIPS endpoints.
    pub fips: bool,
    /// Endpoints that answer over IPv6 too.
    pub dual_stack: bool,
    /// A file of PEM certificates that are trusted instead of the roots built in; else `AWS_CA_BUNDLE`.
    pub ca_bundle: Option<PathBuf>,
}

/// The instance metadata service, and the SDKs' variable that says otherwise.
const LINK_LOCAL: &str = "http://169.254.169.254";
const METADATA: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
/// A connection that is not there after so long will not come.
const CONNECT: Duration = Duration::from_secs(10);
/// Longer than any one request takes that is still worth waiting for.
const ATTEMPT: Duration = Duration::from_secs(120);

/// The configuration of every client. `attempts` is how often the SDK itself tries; without `credentials` they are those of the SDK's variables, else
/// of the instance's role (IMDSv2). No file is read: the files of a suspect's user would say where evidence goes, and as whom.
pub async fn config(
    reach: &Reach,
    attempts: u32,
    credentials: Option<SharedCredentialsProvider>,
) -> Result<SdkConfig, String> {
    let http = client(reach)?;
    let sleep = SharedAsyncSleep::new(TokioSleep::new());
    let surroundings = ProviderConfig::empty()
        .with_http_client(http.clone())
        .with_sleep_impl(sleep.clone());
    let endpoint = variable(METADATA).unwrap_or_else(|| LINK_LOCAL.to_owned());
    // Said outright: else the library would look for it in the files of the user.
    let metadata = aws_config::imds::Client::builder()
        .configure(&surroundings)
        .endpoint(endpoint)
        .map_err(|error| format!("{METADATA}: {error}"))?
        .build();
    let region = match reach
        .region
        .clone()
        .or_else(|| variable("AWS_REGION"))
        .or_else(|| variable("AWS_DEFAULT_REGION"))
    {
        Some(region) => Some(Region::new(region)),
        None => {
            ImdsRegionProvider::builder()
                .imds_client(metadata.clone())
                .build()
                .region()
                .await
        }
    };
    let region = region.ok_or("no region: give --region or AWS_REGION (no metadata service says it)")?;
    let credentials = credentials.unwrap_or_else(|| {
        let role = ImdsCredentialsProvider::builder()
            .configure(&surroundings)
            .imds_client(metadata)
            .build();
        let chain =
            CredentialsProviderChain::first_try("Environment", EnvironmentVariableCredentialsProvider::new())
                .or_else("Ec2InstanceMetadata", role);
        SharedCredentialsProvider::new(chain)
    });
    let is_set = |name: &str| variable(name).is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let cache = IdentityCache::lazy().build();
    let mut config = SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(region)
        .http_client(http)
        .sleep_impl(sleep)
        .time_source(SharedTimeSource::new(SystemTimeSource::new()))
        .credentials_provider(credentials)
        .identity_cache(cache)
        .retry_config(RetryConfig::standard().with_max_attempts(attempts.max(1)))
        .timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(CONNECT)
                .operation_attempt_timeout(ATTEMPT)
                .build(),
        )
        .use_fips(reach.fips || is_set("AWS_USE_FIPS_ENDPOINT"))
        .use_dual_stack(reach.dual_stack || is_set("AWS_USE_DUALSTACK_ENDPOINT"));
    // A flag is for every service; a variable of one service is for it alone, and goes before the one for all.
    match reach.endpoint.clone() {
        Some(endpoint) => {
            config = config.endpoint_url(endpoint);
            config.insert_origin("endpoint_url", Origin::shared_config());
        }
        None => {
            config.set_endpoint_url(variable("AWS_ENDPOINT_URL"));
            config.set_service_config(Some(OfOneService));
        }
    }
    Ok(config.build())
}

/// Variables of one service, such as `AWS_ENDPOINT_URL_S3`.
#[derive(Debug)]
struct OfOneService;

impl LoadServiceConfig for OfOneService {
    fn load_config(&self, key: ServiceConfigKey<'_>) -> Option<String> {
        let service = key.service_id().to_uppercase().replace([' ', '-'], "_");
        variable(&format!("{}_{service}", key.env()))
    }
}

/// What a service said, or what went wrong on the way, in one line.
pub fn said<E, R>(error: &SdkError<E, R>) -> String
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
    R: std::fmt::Debug,
{
    if let Some(service) = error.as_service_error() {
        let code = service.code().unwrap_or("an error without a code");
        return format!("{code}: {}", service.message().unwrap_or("without a message"));
    }
    let mut line = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let said = error.to_string();
        if !line.ends_with(&said) {
            line = format!("{line}: {said}");
        }
        cause = error.source();
    }
    line
}

/// Credentials, and what was secret in all of them so far.
#[derive(Clone, Debug)]
pub struct Remembered(Arc<Inside>);

#[derive(Debug)]
struct Inside {
    provider: SharedCredentialsProvider,
    secrets: Mutex<Vec<String>>,
}

/// How often it is seen to that credentials last.
const TEND: Duration = Duration::from_secs(1);

impl Remembered {
    /// Of a provider.
    pub fn new(provider: SharedCredentialsProvider) -> Self {
        Remembered(Arc::new(Inside {
            provider,
            secrets: Mutex::default(),
        }))
    }

    /// Secret keys and session tokens; more may come.
    pub fn secrets(&self) -> Vec<String> {
        self.0
            .secrets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Has the provider asked also while nobody needs it, so that it can renew what ends; until the last who has this is gone.
    pub fn tend(&self, runtime: &Arc<Runtime>) -> std::io::Result<()> {
        let (kept, runtime) = (Arc::downgrade(&self.0), Arc::clone(runtime));
        let tend = move || {
            loop {
                std::thread::sleep(TEND);
                let Some(inside) = kept.upgrade() else { return };
                // What goes wrong is told to whoever needs them.
                let _ = runtime.block_on(inside.ask());
            }
        };
        let thread = std::thread::Builder::new().name("lent".to_owned());
        thread.spawn(tend).map(|_| ())
    }
}

impl Inside {
    async fn ask(&self) -> Result<Credentials, CredentialsError> {
        let credentials = self.provider.provide_credentials().await?;
        let mut secrets = self.secrets.lock().unwrap_or_else(PoisonError::into_inner);
        for secret in [Some(credentials.secret_access_key()), credentials.session_token()] {
            if let Some(secret) = secret.filter(|s| !secrets.iter().any(|known| known == s)) {
                secrets.push(secret.to_owned());
            }
        }
        Ok(credentials)
    }
}

impl ProvideCredentials for Remembered {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(self.0.ask())
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Speaks HTTP; trusts the roots built in, or those of the bundle and no others.
pub fn client(reach: &Reach) -> Result<aws_smithy_runtime_api::client::http::SharedHttpClient, String> {
    let bundle = reach
        .ca_bundle
        .clone()
        .or_else(|| std::env::var_os("AWS_CA_BUNDLE").map(PathBuf::from));
    let roots = match &bundle {
        Some(path) => std::fs::read_to_string(path)
            .map_err(|error| format!("the CA bundle {}: {error}", path.display()))?,
        None => ROOTS.to_owned(),
    };
    let mut trust = TrustStore::empty();
    let mut any = false;
    for certificate in certificates(&roots) {
        trust.add_pem_certificate(certificate);
        any = true;
    }
    if let (false, Some(path)) = (any, &bundle) {
        return Err(format!("the CA bundle {}: no certificate in it", path.display()));
    }
    let tls = TlsContext::builder()
        .with_trust_store(trust)
        .build()
        .map_err(|error| format!("TLS: {error}"))?;
    Ok(Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .tls_context(tls)
        .build_https())
}

/// The roots built in: those of AWS. An S3 server elsewhere needs a bundle of its own.
const ROOTS: &str = include_str!("roots.pem");

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// Each certificate of a bundle, with its markers.
fn certificates(bundle: &str) -> impl Iterator<Item = &str> {
    bundle.match_indices(BEGIN).filter_map(|(start, _)| {
        let rest = bundle.get(start..)?;
        rest.get(..rest.find(END)? + END.len())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_taken_apart_and_its_prose_left_out() {
        let bundle = format!("# Root A\n{BEGIN}\nQQ==\n{END}\nRoot B\n{BEGIN}\nQg==\n{END} tail");
        let found: Vec<&str> = certificates(&bundle).collect();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0], format!("{BEGIN}\nQQ==\n{END}"));
        assert_eq!(certificates("nothing").count(), 0);
        assert_eq!(certificates(BEGIN).count(), 0);
    }

    /// Each is what the line above it says.
    #[test]
    fn the_roots_built_in_are_those_of_their_hashes() {
        use base64::Engine as _;
        let sums: Vec<&str> = ROOTS
            .lines()
            .filter_map(|l| l.strip_prefix("# "))
            .filter(|l| l.len() == 64)
            .collect();
        assert_eq!((sums.len(), certificates(ROOTS).count()), (5, 5));
        for (sum, certificate) in sums.iter().zip(certificates(ROOTS)) {
            let body: String = certificate.lines().filter(|l| !l.starts_with('-')).collect();
            let der = base64::engine::general_purpose::STANDARD.decode(body).unwrap();
            assert_eq!(stillframe_evidence::root::Hash::of(&der).to_string(), *sum);
        }
    }

    #[test]
    fn an_unreadable_bundle_is_named() {
        let reach = Reach {
            ca_bundle: Some("/nowhere/bundle.pem".into()),
            ..Reach::default()
        };
        assert!(client(&reach).err().unwrap().contains("/nowhere/bundle.pem"));
    }

    #[test]
    fn the_roots_built_in_are_taken() {
        assert!(client(&Reach::default()).is_ok());
    }
}
