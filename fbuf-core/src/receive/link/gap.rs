//! Messages that a sender has left out for this receiver: a gap in front of a message, and never one behind another.

use super::{Inbound, check_sequence};
use crate::{slot::Mark, violation::Violation};

impl Inbound {
    /// Goes on behind a gap. Its message was published with it, but may not be seen yet.
    pub(super) fn pass_gap(&mut self, count: u64) -> Result<(), Violation> {
        if !self.skips {
            return Err(Violation::GapUnasked(count));
        }
        if self.reader.position() == self.behind_gap {
            return Err(Violation::GapBehindGap);
        }
        let next = check_sequence(self.next_mark().sequence().checked_add(count))?;
        self.gaps += 1;
        self.missed = self.missed.saturating_add(count);
        // The gap itself takes a place in the lane.
        self.reader.advance();
        self.behind_gap = self.reader.position();
        self.offset = Mark::of(next).word().wrapping_sub(self.behind_gap);
        Ok(())
    }
}
