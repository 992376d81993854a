//! Feeds any text to [`Policy::parse`], and asks what is understood about any user and channel. Nothing may panic,
//! a user whom some rule lets do something is served, and trust is only in what is allowed.
#![no_main]

use arbitrary::{Result, Unstructured};
use fbuf_broker::{
    Policy,
    policy::{PolicyError, User},
};
use fbuf_core::protection::{Mechanism, Protection};
use fbuf_protocol::{Limits, Role, Slots, channel::ChannelName};
use libfuzzer_sys::fuzz_target;

const ROLES: [Role; 2] = [
    Role::sender(64, 4, Mechanism::Shared, Slots::Segments),
    Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT },
];

/// Whom to ask about, as it stands before the text: a user, a group, and the length and the bytes of a channel.
fn question(input: &mut Unstructured) -> Result<(User, String)> {
    let (id, group) = (input.arbitrary()?, input.arbitrary()?);
    let length = usize::from(input.arbitrary::<u8>()?);
    let channel = String::from_utf8_lossy(input.bytes(length)?).into_owned();
    Ok((User::new(id, vec![group]), channel))
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Unstructured::new(bytes);
    let Ok((user, channel)) = question(&mut input) else { return };
    let Ok(text) = std::str::from_utf8(input.take_rest()) else { return };
    let policy = match Policy::parse(text) {
        Ok(policy) => policy,
        Err(error) => {
            assert!(!matches!(error, PolicyError::Unreadable { .. }), "there is no file");
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    assert!(!policy.to_string().is_empty());
    let quota = policy.quota(&user);
    assert!(policy.serves(&user) || *quota == Default::default(), "a quota for somebody whom no rule is about");
    assert!(!policy.serves(&user) || policy.is_about_others_than(user.id.wrapping_add(1)));
    let Ok(channel) = ChannelName::new(channel) else { return };
    let _ = policy.is_confidential(&channel);
    for role in ROLES {
        match policy.permit(&user, role, &channel) {
            Ok(()) => assert!(policy.serves(&user)),
            Err(rules) => {
                assert_eq!(rules.is_empty(), !policy.serves(&user));
                assert!(!policy.trusts(&user, role, &channel), "trusted with what is not allowed");
            }
        }
    }
});
