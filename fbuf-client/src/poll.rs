//! Waiting for several things at once, in one thread: endpoints, and descriptors of the program.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use fbuf_core::wait::Fencing;
use nix::poll::{PollFd, PollFlags};

use crate::{
    guard::{Endpoint, bounded},
    receiver::Receiver,
    sender::{Sender, WaitFor},
    sockets::timeout_until,
    wait::{FOR_EVER, Next, Waiting, deadline, within},
};

/// One of the things that [`poll`] waits for.
///
/// It borrows an endpoint or a descriptor for one call, so an array of them is made for each.
#[derive(Debug)]
pub struct Pollable<'a> {
    what: What<'a>,
    is_ready: bool,
}

enum What<'a> {
    Endpoint(&'a mut (dyn Endpoint + Send + 'a)),
    Descriptor(BorrowedFd<'a>, PollFlags),
}

impl<'a> Pollable<'a> {
    /// A message of a receiver, or anything else of which [`Receiver::try_get`] tells.
    pub fn receiver(receiver: &'a mut Receiver) -> Self {
        Self::new(What::Endpoint(receiver))
    }

    /// What a sender waits for.
    pub fn sender(sender: &'a mut Sender, what: WaitFor) -> Self {
        sender.await_event(what);
        Self::new(What::Endpoint(sender))
    }

    /// A descriptor that can be read from, or that has an error or an end to tell.
    pub fn readable(descriptor: &'a (impl AsFd + ?Sized)) -> Self {
        Self::new(What::Descriptor(descriptor.as_fd(), PollFlags::POLLIN))
    }

    /// A descriptor that can be written to, or that has an error or an end to tell.
    pub fn writable(descriptor: &'a (impl AsFd + ?Sized)) -> Self {
        Self::new(What::Descriptor(descriptor.as_fd(), PollFlags::POLLOUT))
    }

    fn new(what: What<'a>) -> Self {
        Self { what, is_ready: false }
    }

    /// Whether the last [`poll`] has found that it is there, or that there is something to tell of it. An endpoint is asked
    /// for it without waiting: that there is a message is certain, but that it can be had at once is not.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.is_ready
    }

    fn endpoint(&mut self) -> Option<&mut (dyn Endpoint + Send + 'a)> {
        match &mut self.what {
            What::Endpoint(endpoint) => Some(*endpoint),
            What::Descriptor(..) => None,
        }
    }

    /// What poll(2) is told of it.
    fn polled(&self) -> PollFd<'_> {
        match &self.what {
            What::Endpoint(endpoint) => PollFd::new(endpoint.sockets().as_fd(), PollFlags::POLLIN),
            What::Descriptor(descriptor, events) => PollFd::new(*descriptor, *events),
        }
    }
}

/// Waits until at least one of several things is ready, for at most so long: how many are. None if the time is over. As poll(2),
/// for endpoints as well.
///
/// It looks at the endpoints again and again before it sleeps if one of them does so ([`Wait`](crate::Wait)), and never sleeps if one never
/// does; then descriptors are looked at once a millisecond. Otherwise all are slept on at once. Descriptors are looked at in
/// each call, so that endpoints that are always ready do not keep the program from them; without descriptors, a call that
/// finds something at once makes no system call.
///
/// ```
/// use std::{io::Read, time::Duration};
/// use fbuf_client::{Pollable, poll};
///
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// # let (mut socket, mut other) = std::os::unix::net::UnixStream::pair()?;
/// let mut orders = client.receiver("orders").keep_waiting().open()?;
/// let mut prices = client.receiver("prices").keep_waiting().open()?;
/// # let mut sender = client.sender("prices").open()?;
/// # sender.wait_for_receivers(1)?;
/// # let fbuf = sender.allocate()?;
/// # sender.write(fbuf)?;
/// # std::io::Write::write_all(&mut other, b"x")?;
/// # let (mut messages, mut bytes) = (0, 0);
/// loop {
///     let mut polled = [Pollable::receiver(&mut orders), Pollable::receiver(&mut prices), Pollable::readable(&socket)];
///     if poll(&mut polled, Some(Duration::from_secs(5)))? == 0 {
///         println!("nothing has happened for 5 s");
///     }
///     let [order, price, input] = polled.map(|polled| polled.is_ready());
///     if order && let Some(order) = orders.try_get()? {
///         println!("an order of {} bytes", order.len());
///     }
///     if price && let Some(price) = prices.try_get()? {
///         println!("a price of {} bytes", price.len());
/// #       messages += 1;
///     }
///     if input {
///         let mut buffer = [0; 4096];
///         println!("{} bytes of input", socket.read(&mut buffer)?);
/// #       bytes += 1;
///     }
/// #   if messages > 0 && bytes > 0 {
/// #       break;
/// #   }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Interrupted`](io::ErrorKind::Interrupted) if an endpoint was [interrupted](crate::InterruptHandle), or a signal handler ran while it
/// slept, and nothing is ready; what poll(2) says, for instance of more descriptors than RLIMIT_NOFILE.
pub fn poll(polled: &mut [Pollable<'_>], timeout: Option<Duration>) -> io::Result<usize> {
    let deadline = timeout.and_then(deadline);
    let endpoints = polled.iter_mut().filter_map(Pollable::endpoint);
    let mut waiting =
        endpoints.map(|endpoint| endpoint.waiting(deadline)).fold(Waiting::asleep(deadline), Waiting::and);
    let mut is_first = true;
    loop {
        let thorough = waiting.is_thorough();
        let found = ask_endpoints(polled, thorough);
        // Before it spins, and so that endpoints do not keep it from descriptors.
        let asked = if found || is_first { ask_descriptors(polled) } else { Ok(false) };
        if found || !matches!(asked, Ok(false)) {
            return settle(polled, asked);
        }
        is_first = false;
        if thorough && is_interrupted(polled) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        match waiting.next() {
            Next::Again => {}
            Next::Look => {
                look(polled);
                let asked = ask_descriptors(polled);
                if !matches!(asked, Ok(false)) {
                    ask_endpoints(polled, true);
                    return settle(polled, asked);
                }
            }
            Next::Sleep => {
                let asked = sleep(polled, deadline);
                if !matches!(asked, Ok(false)) {
                    ask_endpoints(polled, true);
                    return settle(polled, asked);
                }
            }
            Next::Expired => {
                // The last word is with the sockets.
                look(polled);
                ask_endpoints(polled, true);
                let asked = ask_descriptors(polled);
                return settle(polled, asked);
            }
        }
    }
}

/// How many are ready. That a signal handler ran while descriptors were looked at is an error only if none is.
fn settle(polled: &[Pollable<'_>], asked: io::Result<bool>) -> io::Result<usize> {
    let count = polled.iter().filter(|polled| polled.is_ready).count();
    match asked {
        Err(error) if count == 0 || error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(count),
    }
}

fn look(polled: &mut [Pollable<'_>]) {
    polled.iter_mut().filter_map(Pollable::endpoint).for_each(|endpoint| endpoint.look());
}

/// Whether any was interrupted, of all of which it is taken.
fn is_interrupted(polled: &mut [Pollable<'_>]) -> bool {
    let endpoints = polled.iter_mut().filter_map(Pollable::endpoint);
    endpoints.filter(|endpoint| endpoint.sockets().interrupts().take()).count() > 0
}

/// Looks which endpoints are ready: whether any is.
fn ask_endpoints(polled: &mut [Pollable<'_>], thorough: bool) -> bool {
    let mut found = false;
    for polled in polled {
        if let Some(endpoint) = polled.endpoint() {
            let has_news = endpoint.has_news(thorough);
            polled.is_ready = has_news;
            found |= has_news;
        }
    }
    found
}

/// Looks which descriptors of the program are ready: whether any is.
fn ask_descriptors(polled: &mut [Pollable<'_>]) -> io::Result<bool> {
    if polled.iter().all(|polled| matches!(polled.what, What::Endpoint(_))) {
        return Ok(false);
    }
    ask_kernel(polled, Some(Instant::now()), |polled| matches!(polled.what, What::Descriptor(..)), |_| {})
}

/// Has poll(2) say which of these are ready, and tells of endpoints: whether any descriptor is.
fn ask_kernel(
    polled: &mut [Pollable<'_>],
    deadline: Option<Instant>,
    asked: impl Fn(&Pollable<'_>) -> bool,
    mut tell: impl FnMut(usize),
) -> io::Result<bool> {
    let places: Vec<usize> = (0..polled.len()).filter(|&place| asked(&polled[place])).collect();
    let mut asked: Vec<_> = places.iter().map(|&place| polled[place].polled()).collect();
    let result = nix::poll::poll(&mut asked, timeout_until(deadline));
    // Without a result none is.
    let ready: Vec<bool> = asked.iter().map(|asked| result.is_ok() && asked.any() == Some(true)).collect();
    let mut found = false;
    for (place, ready) in places.into_iter().zip(ready) {
        if polled[place].endpoint().is_none() {
            polled[place].is_ready = ready;
            found |= ready;
        } else if ready {
            tell(place);
        }
    }
    result?;
    Ok(found)
}

/// Sleeps until something happens, unless it has happened already: whether a descriptor of the program is ready.
fn sleep(polled: &mut [Pollable<'_>], deadline: Option<Instant>) -> io::Result<bool> {
    let mut woken = vec![false; polled.len()];
    let asked = match arm(polled) {
        Some(time) => ask_kernel(polled, within(time, deadline), |_| true, |place| woken[place] = true),
        None => Ok(false),
    };
    for (polled, woken) in polled.iter_mut().zip(woken) {
        if let Some(endpoint) = polled.endpoint() {
            endpoint.wake(woken);
        }
    }
    asked
}

/// Prepares all to sleep, with one fence: for how long at most. None if there is something to do; in either case
/// [`Endpoint::wake`] follows.
fn arm(polled: &mut [Pollable<'_>]) -> Option<Duration> {
    let mut needs_fence = false;
    for endpoint in polled.iter_mut().filter_map(Pollable::endpoint) {
        if endpoint.is_behind() {
            return None;
        }
        needs_fence |= endpoint.raise();
    }
    let sure = !needs_fence || Fencing::of_this_process().before_sleeping();
    let mut endpoints = polled.iter_mut().filter_map(Pollable::endpoint);
    let time = endpoints.try_fold(FOR_EVER, |time, endpoint| Some(time.min(endpoint.look_again()?)))?;
    Some(bounded(time, sure))
}

impl std::fmt::Debug for What<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Endpoint(endpoint) => f.debug_tuple("Endpoint").field(endpoint.sockets()).finish(),
            Self::Descriptor(descriptor, events) => {
                f.debug_tuple("Descriptor").field(descriptor).field(events).finish()
            }
        }
    }
}
