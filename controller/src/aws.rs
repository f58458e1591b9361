//! AWS as the controller uses it beside the store: Systems Manager, and sessions that are lent. It knows no verb and prints nothing.

pub mod session;
pub mod ssm;

pub use stillframe_store::aws::said;
