//! Images in registries: OCI distribution specification 1.1 ("Pull"), and the way that docker and podman sign in.
//!
//! What comes from a registry is checked as what comes from a file: the manifest by the digest that the reference or the
//! registry names, the rest by the digests in the manifest. How to reach one is behind the feature `registry`.

mod challenge;
#[cfg(feature = "registry")]
mod client;
mod credentials;
mod reference;
#[cfg(feature = "registry")]
mod stream;

#[cfg(feature = "registry")]
pub(super) use client::Client;
pub use reference::RegistryRef;
#[cfg(feature = "registry")]
pub(super) use stream::Incoming;

/// Reads a reference, what a registry asks for, and a file of credentials. For fuzzing: it must end without a panic
/// whatever it reads.
pub fn fuzz(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(reference) = RegistryRef::parse(&text) {
        let parts = reference.parts();
        assert!(!parts.host.is_empty() && !parts.repository.contains("//"), "{text}");
        assert!(!parts.base().contains(['?', '#', '@']) && !parts.repository.contains(".."), "{text}");
        assert_eq!(reference.to_string(), text);
    }
    if let Some(challenge::Challenge::Bearer(token)) = challenge::Challenge::parse(&text) {
        let url = token.url("library/debian");
        assert!(!url.contains([' ', '"', '\n']), "{url}");
    }
    let _ = credentials::find(bytes, "registry-1.docker.io");
    assert_eq!(credentials::unpacked(&credentials::packed(bytes)).as_deref(), Some(bytes));
}
