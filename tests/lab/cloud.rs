//! AWS on loopback, as far as Stillframe uses it: an S3 API server behind a gate that judges what that server does not, STS and the instance
//! metadata service for the credentials, Systems Manager with hosts that execute what they are sent, and faults between them and whoever
//! calls. The unmodified programs reach it by the SDK's own variables.

pub mod faults;
pub mod gate;
pub mod http;
pub mod iam;
pub mod localstack;
pub mod metadata;
pub mod principals;
pub mod sigv4;
