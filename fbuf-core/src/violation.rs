//! What a peer can do wrong. Whatever a peer wrote is read once, copied and checked (invariant 4);
//! the check that fails names the rule here, and the link it happened on is closed.

/// A rule of the link that the peer broke.
///
/// It costs the link and nothing else: other links of the same endpoint go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A lane entry carries neither the mark that the next one has nor the one that stands there now.
    #[error("a lane entry is marked {found}, where only {expected}, or the mark of one lap before, can stand")]
    Mark {
        /// The mark that was found.
        found: u64,
        /// The mark that the reader waits for.
        expected: u64,
    },
    /// A lane entry of an unknown kind.
    #[error("a lane entry is of the unknown kind {kind}")]
    Kind {
        /// The number of the kind.
        kind: u8,
    },
    /// A prefix that says nothing.
    #[error("a lane entry is {prefix} without a value, or with a slot")]
    EmptyPrefix {
        /// Which prefix.
        prefix: &'static str,
    },
    /// A prefix behind another one.
    #[error("a lane entry is {prefix} in a place where none can stand: one stands before a message at most")]
    PrefixOrder {
        /// Which prefix.
        prefix: &'static str,
    },
    /// A prefix that was not declared when the link was made.
    #[error("a lane entry is {prefix}, and the sender has declared none for this link")]
    PrefixUndeclared {
        /// Which prefix.
        prefix: &'static str,
    },
    /// A slot that was never announced.
    #[error("a message names slot {named} of {known}")]
    Slot {
        /// The slot that was named.
        named: u32,
        /// How many are known.
        known: u32,
    },
    /// Bytes that do not lie in a slot, or a message of several parts, which no sender has declared.
    #[error("a message claims {length} bytes from byte {offset} on in a slot of {slot_bytes}, or more parts than one")]
    Body {
        /// How many there would be.
        length: u32,
        /// How many would come before them.
        offset: u32,
        /// The size of a slot.
        slot_bytes: u32,
    },
    /// A slot that was sent again while it is still held here.
    #[error("slot {slot} was sent again while it is still held")]
    StillHeld {
        /// The slot.
        slot: u32,
    },
    /// A link message that cannot be read.
    #[error("a link message cannot be read: {reason}")]
    Garbage {
        /// Why not.
        reason: String,
    },
    /// A link message that has no place where it came.
    #[error("{found} where {wanted} was due")]
    OutOfTurn {
        /// What came.
        found: &'static str,
        /// What would have had its place here.
        wanted: &'static str,
    },
    /// Numbers in a link message that contradict each other or a limit.
    #[error("{what} is {found}, allowed is {allowed}")]
    Terms {
        /// Which number.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What it may be, in words.
        allowed: &'static str,
    },
    /// A descriptor that may not be mapped.
    #[error("an unsuitable descriptor: {0}")]
    Descriptor(Unsuitable),
    /// Slots that a receiver makes were to be used, and the receiver is not trusted.
    #[error(
        "the slots of this sender are made by its receiver, which is of another user and not trusted: \
         use slots of the sender's own, or have the broker's policy trust the receiver's user"
    )]
    UntrustedReceiver,
    /// A link socket that the peer never reads.
    #[error("the link socket is full: the peer does not read it")]
    SocketFull,
}

impl From<Unsuitable> for Violation {
    fn from(error: Unsuitable) -> Self {
        Self::Descriptor(error)
    }
}

/// Why a descriptor that a peer sent is not mapped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsuitable {
    /// Not a memfd, or one that was made without sealing.
    #[error("it is not a memfd that can be sealed")]
    NotSealable,
    /// Not exactly the seals that make a second writer impossible.
    #[error("its seals are {found:#x}, exactly {wanted:#x} are required")]
    Seals {
        /// What `F_GET_SEALS` says.
        found: i32,
        /// What it has to say.
        wanted: i32,
    },
    /// Not the size that was announced.
    #[error("it has {found} bytes, {wanted} were announced")]
    Size {
        /// What `fstat` says.
        found: u64,
        /// What it has to say.
        wanted: u64,
    },
    /// Memory that is promised but not there.
    #[error("only {reserved} of its {size} bytes are reserved")]
    Holes {
        /// The bytes that exist.
        reserved: u64,
        /// The bytes that are claimed.
        size: u64,
    },
    /// Memory behind its end, which would have to be freed.
    #[error("{reserved} bytes are reserved for its {size}: more than a huge page lies behind its end")]
    Excess {
        /// The bytes that exist.
        reserved: u64,
        /// The bytes that are claimed.
        size: u64,
    },
    /// It is not open for what it was sent for.
    #[error("it is not open for {purpose}")]
    NotOpenFor {
        /// For what: reading, or writing.
        purpose: &'static str,
    },
    /// Two descriptors of one slot name different memory.
    #[error("the descriptor to write it and the one to read it name different memory")]
    OtherMemory,
    /// The memory of one slot, or segment, is also that of another.
    #[error("it is the memory of other slots too")]
    Shared,
    /// Its owner could take it away from a process that has mapped it.
    #[error("it lies in huge pages that its owner can take away")]
    Removable,
    /// The kernel would not map it: this process has no room for it.
    #[error("the kernel does not map it: {reason}")]
    Unmappable {
        /// What the kernel says.
        reason: String,
    },
}
