//! Who is who in a run: one certificate authority per run, one identity per replica and one for the caller.
//!
//! The launching process makes an [`Authority`], issues an [`Identity`] for each
//! [`Member`](crate::topology::Member), and sends it by a channel that nobody else reads. `tls` makes of an identity what a
//! connection needs: both ends prove who they are, to each other and before the first byte. Sockets are `protocol::tcp`'s.

pub mod identity;
pub(crate) mod tls;

pub use identity::{Authority, Identity, IdentityError};
