//! The end of an endpoint's queue of new links that its control thread has.

use std::{ops::Deref, sync::Arc};

use crate::endpoint::PendingLinks;

/// What the control thread fills a queue by. When it is dropped, because that thread has ended, nothing comes any more, and
/// the endpoint is told.
#[derive(Debug)]
pub(crate) struct LinkSource<T>(Arc<PendingLinks<T>>);

impl<T> LinkSource<T> {
    pub(crate) fn new(pending_links: &Arc<PendingLinks<T>>) -> Self {
        Self(pending_links.clone())
    }
}

impl<T> Deref for LinkSource<T> {
    type Target = PendingLinks<T>;
    fn deref(&self) -> &PendingLinks<T> {
        &self.0
    }
}

impl<T> Drop for LinkSource<T> {
    fn drop(&mut self) {
        self.0.close();
    }
}
