//! What each user may do: rules that the owner of a broker writes down, in TOML.
//!
//! ```toml
//! # Users and groups are named, or numbered; "*" is every user. In patterns, * stands for any characters.
//! [[rule]]
//! name = "cameras"             # refusals name the rule
//! users = ["camera", 1001]
//! groups = ["video"]
//! send = ["camera/*"]          # channels on which these users may send
//! receive = ["camera/*", "status"]
//! trusted = true               # other users get their messages as they are sent: volatile, or leased
//! trusted_pool = false         # senders of other users may take slots from their receivers (from_receiver)
//!
//! [rule.quota]                 # for each of these users; what is not set stays as it is by default
//! bytes = "1GiB"
//! slots = 65536
//! channels = 100
//! links = 1000
//! connections = 16
//! descriptors = 256
//! endpoints = 1000
//! requests_per_second = 1000
//!
//! [[channel]]                  # what holds on some channels for all users
//! names = ["keys/*"]
//! confidential = true          # senders send one-shot messages only, so other users can read nothing else
//! ```
//!
//! Of the broker's own places and descriptors a user has no more than a share, whatever the quota ([`crate::share`]).
//!
//! What any rule about a user allows, that user may do. The quota is that of the first rule about a user
//! which has one. A rule that allows neither to send nor to receive lets its users connect, and see their own
//! endpoints. `packaging/policy.toml` documents what each word means for other users.
//!
//! # Which endpoints are paired
//!
//! Every sender of a channel is linked with every receiver of it, unless the two do not fit: the receiver requires more
//! protection than the sender gives, accepts only smaller or fewer slots, one of them names other users as its peers
//! (`from_users`, `to_users`), the sender takes its slots from the receiver and the policy does not trust that one's
//! pool, or the channel is confidential and the sender's messages are not one-shots. Two ends of *one user* that do not
//! fit are a mistake: the second is refused, with the reason. Between *different users* they are just not paired, and
//! neither is refused; `fbuf ls` lists the reason to the users of both, and `unpaired()` of a sender or receiver.
//!
//! A user that shares a broker with others has at most 128 senders and 128 receivers on a channel, and never more of
//! either than places are left for others (of 1,024, the last 16 of which are root's).
//!
//! A link is paid for by the user that has more endpoints on the channel, since those make most of the links between the
//! two users necessary; by the one that came last if both have as many. No other user can thus charge a user with more
//! links than the square of the number of endpoints that the user has there. If that one has as many links as the quota
//! allows, the pair waits until it has fewer, as pairs do that lack a descriptor, or a client that reads. No endpoint is
//! refused for that, not within one user either, since what is lacking may be taken up by others.

mod pattern;
mod quota;
mod written;

use std::{collections::BTreeSet, fmt, fs::File, io::Read, os::unix::fs::MetadataExt, path::Path, sync::Arc};

use fbuf_protocol::{Resource, Role, channel::ChannelName};

use self::pattern::Pattern;
pub use quota::Quota;
pub use written::{PolicyError, size};

use crate::socket_file::is_exposed;

/// A user, as the kernel knows one process of hers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The id.
    pub id: u32,
    /// All groups, the first one included, in order. Shared by all that is known of the process.
    groups: Arc<[u32]>,
}

impl User {
    /// A user with this id, in these groups.
    #[must_use]
    pub fn new(id: u32, mut groups: Vec<u32>) -> Self {
        groups.sort_unstable();
        groups.dedup();
        Self { id, groups: groups.into() }
    }

    /// Takes as long as a rule has groups, not as this user has: that chooses how many.
    fn is_in_any(&self, groups: &BTreeSet<u32>) -> bool {
        groups.iter().any(|group| self.groups.binary_search(group).is_ok())
    }
}

/// What each user may do.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    rules: Vec<Rule>,
    /// Channels on which other users get one-shot messages only.
    confidential: Vec<Pattern>,
    /// Of users with no quota in their rules.
    quota: Quota,
}

#[derive(Debug, Clone, PartialEq)]
struct Rule {
    name: String,
    everybody: bool,
    users: BTreeSet<u32>,
    groups: BTreeSet<u32>,
    /// Users and groups that it names, and that this machine does not know.
    unknown: Vec<String>,
    send: Vec<Pattern>,
    receive: Vec<Pattern>,
    trusted: bool,
    trusted_pool: bool,
    quota: Option<Quota>,
}

impl Rule {
    /// All channels, for some users.
    fn all(users: BTreeSet<u32>, trusted: bool) -> Self {
        let any = || Pattern::any().into_iter().collect();
        let name = if trusted { "trusted" } else { "own" }.to_owned();
        let (send, receive, groups, unknown) = (any(), any(), BTreeSet::new(), Vec::new());
        Self {
            name,
            everybody: false,
            users,
            groups,
            unknown,
            send,
            receive,
            trusted,
            trusted_pool: trusted,
            quota: None,
        }
    }

    fn is_about(&self, user: &User) -> bool {
        self.everybody || self.users.contains(&user.id) || user.is_in_any(&self.groups)
    }

    fn allows(&self, role: Role, channel: &ChannelName) -> bool {
        let patterns = match role {
            Role::Sender { .. } => &self.send,
            Role::Receiver { .. } => &self.receive,
        };
        patterns.iter().any(|pattern| pattern.matches(channel))
    }

    /// Whether it trusts those that it is about in this role.
    fn trusts(&self, role: Role) -> bool {
        match role {
            Role::Sender { .. } => self.trusted,
            Role::Receiver { .. } => self.trusted_pool,
        }
    }
}

impl Policy {
    /// One user, by id, which may do everything.
    #[must_use]
    pub fn only(user: u32) -> Self {
        let rules = vec![Rule::all(BTreeSet::from([user]), false)];
        Self { rules, confidential: Vec::new(), quota: Quota::default() }
    }

    /// The user that runs this process, which may do everything.
    #[must_use]
    pub fn own() -> Self {
        Self::only(nix::unistd::geteuid().as_raw())
    }

    /// One user more, which may do everything. What that one sends to others, and others send to that one, is
    /// sealed.
    #[must_use]
    pub fn allow(mut self, user: u32) -> Self {
        self.rules.push(Rule::all(BTreeSet::from([user]), false));
        self
    }

    /// One user more, that others trust with memory: they get its messages as they are sent, volatile or leased if that
    /// one likes, and may fill slots that its receivers make.
    #[must_use]
    pub fn trust(mut self, user: u32) -> Self {
        self.rules.push(Rule::all(BTreeSet::from([user]), true));
        self
    }

    /// On the channels of this pattern, other users get one-shot messages only.
    ///
    /// # Errors
    /// [`PolicyError::Pattern`]
    pub fn confidential(mut self, pattern: &str) -> Result<Self, PolicyError> {
        self.confidential.push(written::pattern("a confidential channel", pattern.to_owned())?);
        Ok(self)
    }

    /// With this quota for users with none in their rules.
    #[must_use]
    pub fn with_quota(mut self, quota: Quota) -> Self {
        self.quota = quota;
        self
    }

    /// Reads a policy. Users and groups that it names are looked up now; of those that this machine does not know
    /// ([`Self::unknown`]) no rule is.
    ///
    /// # Errors
    /// [`PolicyError`]
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let (rules, confidential) = written::read(text)?;
        Ok(Self { rules, confidential, quota: Quota::default() })
    }

    /// Reads the policy of a file, which no user but root and the one that reads it may write.
    ///
    /// # Errors
    /// [`PolicyError`]
    pub fn read(path: &Path) -> Result<Self, PolicyError> {
        let name = || path.display().to_string();
        let unreadable = |error| PolicyError::Unreadable { path: name(), error };
        let mut file = File::open(path).map_err(unreadable)?;
        let found = file.metadata().map_err(unreadable)?;
        if found.uid() != 0 && found.uid() != nix::unistd::geteuid().as_raw() {
            return Err(PolicyError::Foreign { path: name(), owner: found.uid() });
        }
        if is_exposed(found.mode(), found.gid()) {
            return Err(PolicyError::Exposed { path: name(), mode: found.mode() & 0o7777 });
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(unreadable)?;
        Self::parse(&text)
    }

    /// The users and groups that it names and this machine does not know, and the names of their rules.
    pub fn unknown(&self) -> impl Iterator<Item = (&str, &str)> {
        self.rules.iter().flat_map(|rule| rule.unknown.iter().map(|unknown| (&*rule.name, &**unknown)))
    }

    fn about<'a>(&'a self, user: &User) -> impl Iterator<Item = &'a Rule> {
        self.rules.iter().filter(|rule| rule.is_about(user))
    }

    /// Whether it is about anybody but this user.
    #[must_use]
    pub fn is_about_others_than(&self, user: u32) -> bool {
        let others = |rule: &Rule| rule.everybody || !rule.groups.is_empty() || rule.users.iter().any(|&id| id != user);
        self.rules.iter().any(others)
    }
}

/// What its broker asks of a policy.
#[doc(hidden)]
impl Policy {
    /// Whether this user may connect.
    #[must_use]
    pub fn serves(&self, user: &User) -> bool {
        self.about(user).next().is_some()
    }

    /// Whether this user may send, or receive, on a channel.
    ///
    /// # Errors
    /// The names of the rules about this user, none of which allows it.
    pub fn permit(&self, user: &User, role: Role, channel: &ChannelName) -> Result<(), Vec<String>> {
        if self.about(user).any(|rule| rule.allows(role, channel)) {
            return Ok(());
        }
        Err(self.about(user).map(|rule| rule.name.clone()).collect())
    }

    /// Whether other users may trust this one on a channel: as a sender, with volatile and leased messages; as a
    /// receiver, with the memory that their senders fill.
    #[must_use]
    pub fn trusts(&self, user: &User, role: Role, channel: &ChannelName) -> bool {
        self.about(user).any(|rule| rule.trusts(role) && rule.allows(role, channel))
    }

    /// Whether other users get one-shot messages only on a channel.
    #[must_use]
    pub fn is_confidential(&self, channel: &ChannelName) -> bool {
        self.confidential.iter().any(|pattern| pattern.matches(channel))
    }

    /// What this user may take up.
    #[must_use]
    pub fn quota(&self, user: &User) -> &Quota {
        self.about(user).find_map(|rule| rule.quota.as_ref()).unwrap_or(&self.quota)
    }
}

/// As a person would want to check it.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.rules.is_empty() {
            return writeln!(f, "no rules: nobody is served");
        }
        let join = |patterns: &[Pattern]| match patterns {
            [] => "nothing".to_owned(),
            patterns => patterns.iter().map(|pattern| format!("{:?}", pattern.as_str())).collect::<Vec<_>>().join(", "),
        };
        for rule in &self.rules {
            let ids = |ids: &BTreeSet<u32>| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            writeln!(f, "rule {:?}", rule.name)?;
            if rule.everybody {
                writeln!(f, "  about            everybody")?;
            }
            for (kind, numbers) in [("users", &rule.users), ("groups", &rule.groups)] {
                if !numbers.is_empty() {
                    writeln!(f, "  about {kind:<11}{}", ids(numbers))?;
                }
            }
            if !rule.unknown.is_empty() {
                writeln!(f, "  not known here   {}", rule.unknown.join(", "))?;
            }
            writeln!(f, "  may send to      {}", join(&rule.send))?;
            writeln!(f, "  may receive from {}", join(&rule.receive))?;
            for (word, is_set) in [("trusted", rule.trusted), ("trusted pool", rule.trusted_pool)] {
                writeln!(f, "  {word:<17}{}", if is_set { "yes" } else { "no" })?;
            }
            let quota = rule.quota.as_ref().unwrap_or(&self.quota);
            let limits = Resource::ALL.iter().map(|&resource| resource.describe(quota.of(resource)));
            let limits = limits.collect::<Vec<_>>().join(", ");
            writeln!(f, "  each at most     {limits}, {} requests/s", quota.requests_per_second)?;
        }
        if !self.confidential.is_empty() {
            writeln!(f, "confidential channels {}", join(&self.confidential))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fbuf_core::protection::{Mechanism, Protection};
    use fbuf_protocol::{Limits, Slots};

    const SENDER: Role = Role::sender(64, 4, Mechanism::Shared, Slots::Segments);
    const RECEIVER: Role = Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT };

    fn user(id: u32, groups: &[u32]) -> User {
        User::new(id, groups.to_vec())
    }

    fn channel(name: &str) -> ChannelName {
        ChannelName::new(name).unwrap()
    }

    const EXAMPLE: &str = r#"
        [[rule]]
        name = "cameras"
        users = [1001]
        groups = [44]
        send = ["camera/*"]
        trusted = true
        quota = { bytes = "1GiB", links = 3 }
        [[rule]]
        users = ["*"]
        receive = ["camera/*", "status"]
        trusted_pool = true
        [[channel]]
        names = ["keys/*", "pin"]
        confidential = true
        [[channel]]
        names = ["keys/public"]
    "#;

    #[test]
    fn any_rule_about_a_user_is_enough() {
        let policy = Policy::parse(EXAMPLE).unwrap();
        let (camera, member, viewer) = (user(1001, &[1001]), user(7, &[7, 44]), user(8, &[8]));
        for sender in [&camera, &member] {
            assert_eq!(policy.permit(sender, SENDER, &channel("camera/1")), Ok(()));
            assert!(policy.trusts(sender, SENDER, &channel("camera/1")));
            assert_eq!(policy.permit(sender, RECEIVER, &channel("status")), Ok(()));
            assert_eq!(
                [Resource::Bytes, Resource::Links].map(|resource| policy.quota(sender).of(resource)),
                [1 << 30, 3]
            );
            assert_eq!(policy.quota(sender).of(Resource::Slots), Quota::default().of(Resource::Slots));
        }
        let refused = policy.permit(&camera, SENDER, &channel("status")).unwrap_err();
        assert_eq!(refused, ["cameras", "number 2"]);
        assert_eq!(policy.permit(&viewer, SENDER, &channel("camera/1")).unwrap_err(), ["number 2"]);
        assert!(!policy.trusts(&viewer, SENDER, &channel("camera/1")));
        assert!(
            policy.trusts(&viewer, RECEIVER, &channel("camera/1")) && !policy.trusts(&viewer, RECEIVER, &channel("x"))
        );
        let confidential = |name| policy.is_confidential(&channel(name));
        assert!(confidential("keys/1") && confidential("pin") && !confidential("pins") && !confidential("camera/1"));
        assert_eq!(policy.quota(&viewer), &Quota::default());
    }

    #[test]
    fn without_a_rule_nobody_is_served() {
        let policy = Policy::parse("").unwrap();
        assert!(!policy.serves(&user(0, &[0])) && !policy.is_about_others_than(0));
        let policy = Policy::only(1000);
        assert!(policy.serves(&user(1000, &[])) && !policy.serves(&user(0, &[1000])));
        assert!(!policy.is_about_others_than(1000) && policy.allow(1001).is_about_others_than(1000));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("[[rule]]\nsend = [\"x\"]", "about nobody"),
            ("[[rule]]\nusers = [1]\nsend = [\"\"]", "pattern \"\""),
            ("[[channel]]\nnames = [\"\"]", "a channel has the pattern"),
            ("[[channel]]\nconfidential = true", "missing field `names`"),
            ("[[rule]]\nuser = [1]", "unknown field `user`"),
            ("[[rule]]\nusers = [1]\nquota = { bytes = \"many\" }", "line 3"),
            ("[[rule]]\nusers = [-1]", "line 2"),
            ("rule = 1", "line 1"),
        ] {
            let error = Policy::parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let error = Policy::read(Path::new("/no/such/policy")).unwrap_err().to_string();
        assert!(error.contains("/no/such/policy"), "{error}");
    }

    #[test]
    fn users_and_groups_that_are_gone_leave_a_rule_to_the_others() {
        let text = "[[rule]]\nname = \"r\"\nusers = [\"no-such-user\", 7]\ngroups = [\"no-such-group\"]";
        let policy = Policy::parse(text).unwrap();
        assert!(policy.serves(&user(7, &[])) && !policy.serves(&user(8, &[])));
        let unknown: Vec<_> = policy.unknown().collect();
        assert_eq!(unknown, [("r", "the user \"no-such-user\""), ("r", "the group \"no-such-group\"")]);
        assert!(policy.to_string().contains("no-such-user"), "{policy}");
        // A rule about none that is known is about no user, and not about all.
        let policy = Policy::parse("[[rule]]\nusers = [\"no-such-user\"]").unwrap();
        assert!(!policy.serves(&user(0, &[0])) && !policy.is_about_others_than(0));
    }

    #[test]
    fn a_file_that_others_can_write_is_no_policy() {
        use std::{fs, os::unix::fs::PermissionsExt};
        let path = std::env::temp_dir().join(format!("fbuf-policy-{}", std::process::id()));
        fs::write(&path, EXAMPLE).unwrap();
        let read_as = |mode| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            Policy::read(&path)
        };
        let (closed, open) = (read_as(0o644), read_as(0o646));
        fs::remove_file(&path).unwrap();
        assert!(closed.is_ok() && open.unwrap_err().to_string().contains("mode 646"));
    }

    #[test]
    fn it_can_be_read_by_a_person() {
        let text = Policy::parse(EXAMPLE).unwrap().to_string();
        for words in [
            "rule \"cameras\"",
            "about users      1001",
            "\"camera/*\", \"status\"",
            "1.0 GiB",
            "everybody",
            "\"keys/*\", \"pin\"",
        ] {
            assert!(text.contains(words), "{words} is missing in\n{text}");
        }
    }
}
