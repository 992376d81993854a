#![doc = include_str!("../README.md")]
//!
//! # This crate
//!
//! All of [`fbuf_client`] under one name, and with the feature `embedded` a broker for the same process.

pub use fbuf_client::*;

/// A broker that lives in this process: [`Embedded::start`](embedded::Embedded::start).
#[cfg(feature = "embedded")]
pub mod embedded {
    pub use fbuf_broker::{Embedded, Policy};
}

/// The code of docs/recipes.md, as a test.
#[cfg(all(doctest, feature = "embedded"))]
#[doc = include_str!("../docs/recipes.md")]
struct Recipes;
