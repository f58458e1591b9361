//! AWS as the controller uses it beside the store: Systems Manager. It knows no verb and prints nothing.

pub mod ssm;

use aws_sdk_ssm::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};

/// What a service said, in one line.
pub fn said<E, R>(error: &SdkError<E, R>) -> String
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
    R: std::fmt::Debug,
{
    match error.as_service_error() {
        Some(service) => format!(
            "{}: {}",
            service.code().unwrap_or("an error without a code"),
            service.message().unwrap_or("without a message")
        ),
        None => DisplayErrorContext(error).to_string(),
    }
}
