//! AWS as the controller uses it beside the store: Systems Manager. It knows no verb and prints nothing.

pub mod ssm;
