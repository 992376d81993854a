#![doc = include_str!("../README.md")]
//!
//! # This crate
//!
//! All of [`fbuf_client`] under one name, and with the feature `embedded` a broker for the same process. With the feature `tokio` there are
//! endpoints for tasks (`AsyncReceiver`, `AsyncSender`).

pub use fbuf_client::*;

/// A broker that lives in this process: [`Embedded::start`](embedded::Embedded::start).
///
/// It serves the user of this process, or those of a policy, and is the same broker as that of the command: each user has
/// a quota, and what is refused says by which rule.
///
/// ```
/// use fbuf::{
///     Client, OpenError, Refusal, Resource,
///     embedded::{Embedded, Policy, PolicyError, Quota},
/// };
///
/// fn policy(rules: &str, senders: u64) -> Result<Policy, PolicyError> {
///     Ok(Policy::parse(rules)?.with_quota(Quota::default().with(Resource::Endpoints, senders)))
/// }
///
/// let rules = "[[rule]]\nname = \"all\"\nusers = [\"*\"]\nsend = [\"*\"]";
/// let broker = Embedded::start_with(policy(rules, 1)?)?;
/// let client = Client::connect_to(broker.address())?;
/// let _sender = client.sender("frames").open()?;
/// match client.sender("frames").open() {
///     Err(OpenError::Refused(Refusal::QuotaExceeded(quota))) => assert_eq!(quota.limit, 1),
///     other => panic!("{other:?}"),
/// }
///
/// broker.set_policy(policy(rules, 2)?); // as SIGHUP has the command do
/// let _second = client.sender("frames").open()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[cfg(feature = "embedded")]
pub mod embedded {
    pub use fbuf_broker::{Embedded, Policy, PolicyError, Quota};
}

/// The code of docs/recipes.md, as a test.
#[cfg(all(doctest, feature = "embedded", feature = "tokio"))]
#[doc = include_str!("../docs/recipes.md")]
struct Recipes;
