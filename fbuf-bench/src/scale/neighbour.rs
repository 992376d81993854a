//! Attaching beside a process that gives the broker as much to do as it can, in several ways. It is another user,
//! if this one may start a process as another; else it is paced together with whoever attaches.

use std::{
    os::unix::process::CommandExt,
    process::{Child, Command, ExitStatus},
};

use fbuf_protocol::Resource;
use nix::unistd::geteuid;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::{
    Extent,
    attach::{STEPS, TRIES, attach},
    broker::BrokerProcess,
    figure::{Figure, Subject, Unit},
};
use crate::{Result, pair::Line};

/// The user that the neighbour is. 65534 stands for users without an id, who are never one user.
const OTHER: u32 = 65_533;

/// What the neighbour does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kind {
    /// Nothing that has to do with the broker: it only keeps processors busy.
    Spins,
    /// Asks, over several connections.
    Asks,
    /// Opens both ends of a channel, links them, and closes them.
    Opens,
    /// Connects and hangs up.
    Connects,
    /// Has as much of something as it may, and asks for more.
    Hoards(#[serde(with = "by_name")] Resource),
    /// Has as many connections as it may, and connects again and again.
    Knocks,
    /// Has so many links to one receiver, and fills their lanes again as soon as they were read.
    Refills(u32),
    /// Has so many links to one receiver, on which nothing comes but bells.
    Rings(u32),
}

/// How a resource is told to the process that hoards it.
mod by_name {
    use super::*;

    pub fn serialize<S: Serializer>(resource: &Resource, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(resource.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Resource, D::Error> {
        let name = String::deserialize(deserializer)?;
        let named = Resource::ALL.iter().find(|resource| resource.name() == name);
        named.copied().ok_or_else(|| D::Error::custom(format!("no resource is called {name:?}")))
    }
}

/// A neighbour of some kind, as this user or as another one.
type Setting = Option<(Kind, bool)>;

/// What is measured, in turn; as another user only by one who may start such a process.
fn settings() -> Vec<Setting> {
    let hoards = Resource::ALL.iter().copied().map(Kind::Hoards);
    let as_other = [Kind::Asks, Kind::Opens, Kind::Connects, Kind::Knocks].into_iter().chain(hoards);
    let as_other = as_other.filter(|_| geteuid().is_root()).map(|kind| Some((kind, true)));
    // Connections that a user hoards, or has not been seen to close, no other process of that user has.
    let as_own = [Kind::Spins, Kind::Asks, Kind::Opens].map(|kind| Some((kind, false)));
    std::iter::once(None).chain(as_own).chain(as_other).collect()
}

fn describe(setting: Setting) -> String {
    match setting {
        None => "nobody".to_owned(),
        Some((Kind::Spins, _)) => "spins".to_owned(),
        Some((kind, other)) => {
            let what = match kind {
                Kind::Hoards(resource) => format!("hoards {}", resource.name()),
                other => format!("{other:?}").to_lowercase(),
            };
            format!("{what}, {}", if other { "another user" } else { "the same user" })
        }
    }
}

/// The process.
pub(super) struct Neighbour(Child);

impl Neighbour {
    /// Starts it, and waits until it does what it does.
    pub(super) fn start(address: &str, kind: Kind, is_other: bool) -> Result<Self> {
        // Which another user can run wherever it lies.
        let mut command = Command::new("/proc/self/exe");
        command.args(["bench", "neighbour"]).current_dir("/");
        if is_other {
            command.uid(OTHER).gid(OTHER);
        }
        let (child, line) = Line::to(&mut command)?;
        let neighbour = Self(child);
        line.tell(&(address, kind))?;
        line.hear::<std::result::Result<(), String>>()??;
        Ok(neighbour)
    }

    /// How it has ended, if it has.
    pub(super) fn has_ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.0.try_wait()?)
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn measure(extent: Extent) -> Result<Vec<Figure>> {
    let broker = BrokerProcess::start(geteuid().is_root().then_some(OTHER))?;
    let nobody = broker.holdings()?.descriptors;
    let settings = settings();
    let mut times = vec![Vec::new(); settings.len()];
    for _ in 0..extent.runs {
        for (times, &setting) in times.iter_mut().zip(&settings) {
            let neighbour =
                setting.map(|(kind, is_other)| Neighbour::start(&broker.address, kind, is_other)).transpose()?;
            for _ in 0..TRIES {
                let steps = attach(&broker.address);
                times.push(steps.map_err(|error| format!("beside one that {}: {error}", describe(setting)))?);
            }
            if let Some(mut neighbour) = neighbour
                && let Some(status) = neighbour.has_ended()?
            {
                return Err(format!("the neighbour that {} has ended: {status}", describe(setting)).into());
            }
            broker.wait_until_left(nobody)?;
        }
    }
    let mut figures = Vec::new();
    for (times, &setting) in times.iter().zip(&settings) {
        for (index, step) in STEPS.into_iter().enumerate() {
            let times: Vec<_> = times.iter().map(|time: &[f64; STEPS.len()]| time[index]).collect();
            let beside = (step, u32::from(setting.is_some()));
            figures.push(Figure::new(Subject::Neighbour, describe(setting), beside, Unit::Ns, &times)?);
        }
    }
    Ok(figures)
}
