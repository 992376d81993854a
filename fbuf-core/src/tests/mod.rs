//! Both halves of a link in one process, with peers that are honest, hostile, or granted little.

#[cfg(not(miri))]
mod at_fork;
mod exchange;
pub(crate) mod hostile;
mod scarce;
