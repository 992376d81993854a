//! What one user may take up at a broker.

use fbuf_protocol::Resource;

/// What one user may take up. The default is meant for a machine with one user; on a machine that
/// is shared, rules say less.
///
/// ```
/// use fbuf_broker::{Policy, Quota};
/// use fbuf_protocol::Resource;
///
/// let quota = Quota::default().with(Resource::Links, 100).with_requests_per_second(50);
/// assert_eq!(quota.of(Resource::Links), 100);
/// let policy = Policy::own().with_quota(quota);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Quota {
    /// The name of the rule that says so.
    pub rule: String,
    /// Messages to the broker in a second, and connections; the next one waits.
    pub requests_per_second: u32,
    /// By resource.
    limits: [u64; Resource::ALL.len()],
}

impl Default for Quota {
    fn default() -> Self {
        // A fraction of what a broker answers, so that one user does not leave others waiting.
        let requests_per_second = 5000;
        Self { rule: "default".into(), requests_per_second, limits: [0; Resource::ALL.len()] }
            .with(Resource::Bytes, 1 << 44)
            .with(Resource::Slots, 1 << 32)
            .with(Resource::Channels, 16_384)
            .with(Resource::Links, 262_144)
            .with(Resource::Connections, 2048)
            .with(Resource::Descriptors, 16_384)
            .with(Resource::Endpoints, 16_384)
    }
}

impl Quota {
    /// How much of it.
    #[must_use]
    pub fn of(&self, resource: Resource) -> u64 {
        self.limits[resource as usize]
    }

    /// The same, but for so much of one resource.
    #[must_use]
    pub fn with(mut self, resource: Resource, limit: u64) -> Self {
        self.limits[resource as usize] = limit;
        self
    }

    /// The same by the rule of this name, which refusals tell.
    #[must_use]
    pub fn with_rule(self, rule: impl Into<String>) -> Self {
        Self { rule: rule.into(), ..self }
    }

    /// The same, but for so many requests in a second.
    #[must_use]
    pub fn with_requests_per_second(self, requests_per_second: u32) -> Self {
        Self { requests_per_second, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_allows_some_of_each_resource() {
        let quota = Quota::default();
        assert!(Resource::ALL.iter().all(|&resource| quota.of(resource) > 0), "{quota:?}");
    }
}
