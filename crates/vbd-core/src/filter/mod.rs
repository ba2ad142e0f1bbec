//! Filters: channels in front of channels.
