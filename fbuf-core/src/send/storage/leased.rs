//! The sender's side of leased messages: slots that it can write until it sends them, and then not before they are back.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Unkept, Unpublished};
use crate::memory::{leasable::OPENING, memfd::unmappable};
use crate::{
    memory::{Leasable, Map, MemoryError, Pages, Pieces},
    peer::Peer,
    points,
    process::fork::Withheld,
    send::fbuf::Outgoing,
    slot::{Geometry, SlotId},
    socket::{
        link_message::{self, ReceivedGrant},
        wire::Descriptor,
    },
    violation::{Unsuitable, Violation},
};

/// How soon a slot is tried again that somebody holds a lease on without saying so.
const AGAIN: Duration = Duration::from_millis(10);

/// Slots that are memory of their own. They take the place of segments in the pool of a sender of leased
/// messages.
#[derive(Debug)]
pub(crate) struct LeasedSlots {
    geometry: Geometry,
    pages: Pages,
    slots: Vec<Slot>,
    /// Whether a receiver gives them.
    given: bool,
    /// The receiver that gave them, if one did.
    giver: Option<u64>,
    /// Those that gave before, and may still have sent something that is to be read.
    former: Vec<u64>,
}

#[derive(Debug, Default)]
struct Slot {
    /// None before a receiver has given it.
    memory: Option<Arc<Leasable>>,
    access: WriteAccess,
    /// While it may be written.
    draft: Option<WritableSlot>,
}

/// How the right to write a slot is had.
#[derive(Debug, Default)]
enum WriteAccess {
    /// By opening it: it is this user's. Not before this time, when somebody stands in the way.
    Own(Option<Instant>),
    /// From its receiver, which hands the right back with each message. This side does not have it.
    #[default]
    Away,
    Here(Withheld<OwnedFd>),
}

#[derive(Debug)]
struct WritableSlot {
    map: Map,
    /// What is mapped.
    memory: Arc<Leasable>,
}

/// A slot that its sender reads on.
#[derive(Debug)]
pub(crate) struct View {
    map: Map,
    memory: Arc<Leasable>,
}

impl View {
    /// Where its bytes are.
    pub(crate) fn bytes(&self) -> *const u8 {
        self.map.beginning()
    }
}

impl LeasedSlots {
    /// Slots of this user, each in one of these pieces of memory, all of which is made to exist: and in which pages it lies.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub(crate) fn own(memory: Vec<OwnedFd>, geometry: Geometry, pages: Pages) -> Result<(Self, Pages), MemoryError> {
        let refused = |error: Unsuitable| MemoryError::Refused {
            call: "what the broker gave",
            asked: geometry.cell_bytes(),
            error: io::Error::other(error),
        };
        let given = |memory| Leasable::given(memory, geometry.cell_bytes()).map_err(refused);
        let memory: Vec<_> = memory.into_iter().map(given).collect::<Result<_, _>>()?;
        // Two fbufs would write the same bytes.
        if (0..memory.len()).any(|index| memory[..index].iter().any(|other| other.is_same(&memory[index]))) {
            return Err(refused(Unsuitable::Shared));
        }
        let slots = geometry.max_slots();
        if memory.len() != slots as usize {
            return Err(refused(Unsuitable::Size { found: memory.len() as u64, wanted: slots.into() }));
        }
        let found = memory.iter().map(|memory| memory.reserve(pages)).collect::<Result<Vec<_>, _>>()?;
        // What some of them lack, the pool lacks.
        let pages = found.into_iter().min().unwrap_or(Pages::Base);
        let slot = |memory| Slot { memory: Some(Arc::new(memory)), access: WriteAccess::Own(None), draft: None };
        let slots = memory.into_iter().map(slot).collect();
        Ok((Self { geometry, pages, slots, given: false, giver: None, former: Vec::new() }, pages))
    }

    /// Slots that the receiver will give.
    pub(crate) fn of_receiver(geometry: Geometry) -> Self {
        Self {
            geometry,
            pages: Pages::Transparent,
            slots: (0..geometry.max_slots()).map(|_| Slot::default()).collect(),
            given: true,
            giver: None,
            former: Vec::new(),
        }
    }

    /// Whether a receiver gives them.
    pub(crate) fn are_given(&self) -> bool {
        self.given
    }

    /// How many there are.
    pub(crate) fn len(&self) -> u32 {
        self.slots.len() as u32
    }

    /// The slots, to be read.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub(crate) fn hand_over(&self) -> io::Result<Vec<Descriptor>> {
        let memory = self.slots.iter().filter_map(|slot| slot.memory.as_ref());
        memory.map(|memory| Ok(memory.as_fd().try_clone_to_owned()?.into())).collect()
    }

    /// A receiver gives the right to write a slot, and before the first time the slot: what is written is the same
    /// memory as what is read, exactly as [`Leasable::create`] makes it, with all its pages.
    ///
    /// # Errors
    /// [`Violation`]
    pub(crate) fn give(&mut self, grant: ReceivedGrant) -> Result<(), Violation> {
        let ReceivedGrant { giver, grant: link_message::WriteGrant { slot, writer, reader } } = grant;
        let giver = giver.peer();
        if self.former.contains(&giver.endpoint) {
            // It has gone, and what it had sent before is of no use.
            return Ok(());
        }
        if self.giver != Some(giver.endpoint) {
            self.forget();
            self.former.extend(self.giver.replace(giver.endpoint));
        }
        let known = self.len();
        let Some(place) = self.slots.get(slot as usize) else { return Err(Violation::Slot { named: slot, known }) };
        let memory = match (reader, &place.memory) {
            (Some(reader), _) => {
                let memory =
                    Leasable::given(reader.into_foreign().map_err(unmappable("fcntl"))?, self.geometry.cell_bytes())?;
                let mut others = (0..).zip(&self.slots).filter(|(other, _)| *other != slot);
                // Two fbufs would write the same bytes.
                if others.any(|(_, other)| other.has(&memory)) {
                    return Err(Unsuitable::Shared.into());
                }
                Arc::new(memory)
            }
            (None, Some(memory)) => memory.clone(),
            (None, None) => {
                return Err(Violation::OutOfTurn { found: "the right to write a slot", wanted: "the slot" });
            }
        };
        memory.verify_writer(writer.as_fd(), giver.same_user)?;
        let writer = writer.into_owned().map_err(unmappable("fcntl"))?;
        let place = &mut self.slots[slot as usize];
        (place.memory, place.access) = (Some(memory), WriteAccess::Here(writer.into()));
        points::reach("right: accepted");
        Ok(())
    }

    /// A receiver is gone: forgets what it gave.
    pub(crate) fn forget_giver(&mut self, giver: Peer) {
        self.former.retain(|&former| former != giver.endpoint);
        if self.giver == Some(giver.endpoint) {
            self.giver = None;
            self.forget();
        }
    }

    fn forget(&mut self) {
        for slot in &mut self.slots {
            if !matches!(slot.access, WriteAccess::Own(_)) {
                (slot.memory, slot.access) = (None, WriteAccess::Away);
            }
        }
    }

    /// Whether a slot that receivers have handed back can be had now.
    pub(crate) fn is_available(&self, slot: SlotId) -> bool {
        self.slots.get(slot.index()).is_some_and(|slot| match &slot.access {
            WriteAccess::Own(None) | WriteAccess::Here(_) => true,
            WriteAccess::Own(Some(time)) => *time <= Instant::now(),
            WriteAccess::Away => slot.is_current_draft(),
        })
    }

    /// Whether somebody holds a lease on some slot without saying so: time will tell, and nothing else.
    pub(crate) fn is_blocked(&self) -> bool {
        self.slots.iter().any(|slot| matches!(slot.access, WriteAccess::Own(Some(_))))
    }

    /// The bytes of a slot, to be written; none if they cannot be had now.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub(crate) fn prepare(&mut self, number: SlotId) -> Result<Option<Pieces>, MemoryError> {
        let huge = self.pages != Pages::Base;
        let Some(slot) = self.slots.get_mut(number.index()) else { return Ok(None) };
        if !slot.is_current_draft() {
            slot.draft = None;
            match slot.open(huge)? {
                Some(draft) => slot.draft = Some(draft),
                None => return Ok(None),
            }
            slot.give_up_writer();
        }
        Ok(slot.draft.as_ref().map(|draft| Pieces::one(&draft.map, number.number())))
    }

    /// The bytes of a slot that was not sent after all.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub(crate) fn reclaim(&mut self, number: SlotId) -> Result<Option<Pieces>, MemoryError> {
        match self.slots.get(number.index()).and_then(|slot| slot.draft.as_ref()) {
            // Be it that of a receiver that has gone.
            Some(draft) => Ok(Some(Pieces::one(&draft.map, number.number()))),
            None => self.prepare(number),
        }
    }

    /// Whether what was written of a slot lies in memory of a receiver that has gone.
    fn is_stale(&self, slot: SlotId) -> bool {
        self.slots.get(slot.index()).is_some_and(|slot| slot.draft.is_some() && !slot.is_current_draft())
    }

    /// Unmaps what was written of a slot and was not sent, if it lies in memory of a receiver that has gone.
    pub(crate) fn drop_stale(&mut self, slot: SlotId) {
        if self.is_stale(slot)
            && let Some(slot) = self.slots.get_mut(slot.index())
        {
            slot.draft = None;
        }
    }

    /// Before a slot is sent: gives up the right to write it, if any receiver gets it (`is_lent`).
    ///
    /// # Errors
    /// [`Unpublished::Stale`], [`Unpublished::NotMoved`]: it stays as it is.
    pub(crate) fn publish(&mut self, outgoing: &Outgoing, is_lent: bool) -> Result<(), Unpublished> {
        if !is_lent {
            // A message that cannot be sent was left out for no receiver.
            return if self.is_stale(outgoing.slot) { Err(Unpublished::Stale) } else { Ok(()) };
        }
        let (huge, header) = (self.pages != Pages::Base, self.geometry.header());
        let slot = self.slots.get_mut(outgoing.slot.index()).ok_or(Unpublished::Stale)?;
        if !slot.is_current_draft() {
            // It was written in memory of a receiver that has gone, and another has come since.
            let new = slot.open(huge).map_err(Unpublished::NotMoved)?;
            let (Some(new), Some(old)) = (new, &slot.draft) else { return Err(Unpublished::Stale) };
            let length = (outgoing.body.offset() + outgoing.body.length()) as usize;
            #[expect(unsafe_code, reason = "only here is it known which mapping has the message")]
            // SAFETY: the one was just mapped, and the fbuf that wrote the other has ended, since its slot is about to
            // be sent (invariant 2).
            let copied = unsafe {
                new.map.copy_from(&old.map, 0, length) && new.map.copy_from(&old.map, header.start, header.len())
            };
            if !copied {
                return Err(Unpublished::Stale);
            }
            slot.give_up_writer();
        }
        slot.draft = None;
        points::reach("lease: vacated");
        Ok(())
    }

    /// A slot, to be read on by its sender once it is sent.
    ///
    /// # Errors
    /// [`Unkept`]
    pub(crate) fn view(&self, slot: SlotId) -> Result<View, Unkept> {
        let memory = self.slots.get(slot.index()).and_then(|slot| slot.memory.clone()).ok_or(Unkept::Stale)?;
        let refused = |error| Unkept::NotMapped(MemoryError::Refused { call: "mmap", asked: memory.size(), error });
        let map = Map::of_reader(memory.as_fd(), memory.size()).map_err(refused)?;
        Ok(View { map, memory })
    }

    /// Whether a slot is still that which is read on here.
    pub(crate) fn is_seen(&self, slot: SlotId, view: &View) -> bool {
        let memory = self.slots.get(slot.index()).and_then(|slot| slot.memory.as_ref());
        memory.is_some_and(|memory| Arc::ptr_eq(memory, &view.memory))
    }
}

impl Slot {
    /// Whether it is this memory, or what was written of it is.
    fn has(&self, memory: &Leasable) -> bool {
        let draft = self.draft.as_ref().map(|draft| &draft.memory);
        self.memory.iter().chain(draft).any(|other| other.is_same(memory))
    }

    /// Whether what may be written is the slot as receivers know it.
    fn is_current_draft(&self) -> bool {
        match (&self.draft, &self.memory) {
            (Some(draft), Some(memory)) => Arc::ptr_eq(&draft.memory, memory),
            _ => false,
        }
    }

    /// Maps it to be written; none if that cannot be now. The right to do so that a receiver gave stays, and is
    /// [given up](Self::give_up_writer) once all is done for which the mapping is made.
    fn open(&mut self, huge: bool) -> Result<Option<WritableSlot>, MemoryError> {
        let Some(memory) = self.memory.clone() else { return Ok(None) };
        let refused = |source| MemoryError::Refused { call: OPENING, asked: memory.size(), error: source };
        let opened;
        let writer = match &mut self.access {
            WriteAccess::Own(when) => match memory.open_writer() {
                Ok(writer) => {
                    points::reach("lease: opened again");
                    *when = None;
                    opened = writer;
                    opened.as_fd()
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    *when = Some(Instant::now() + AGAIN);
                    return Ok(None);
                }
                Err(error) => return Err(refused(error)),
            },
            WriteAccess::Here(writer) => (**writer).as_fd(),
            WriteAccess::Away => return Ok(None),
        };
        Ok(Some(WritableSlot { map: Map::of_writer(writer, memory.size(), huge)?, memory }))
    }

    /// Closes what a receiver gave to write it, once it is mapped: the mapping keeps the file open for writing until it goes.
    fn give_up_writer(&mut self) {
        if let WriteAccess::Here(_) = self.access {
            self.access = WriteAccess::Away;
            points::reach("right: used");
        }
    }
}
