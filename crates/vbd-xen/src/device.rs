//! What to do about a device, from what both ends of it say. No xenstore, no threads: a function of what is there.
//!
//! The rules are those that front-ends rely on:
//! - this end says 2 (waiting) at once; when the front-end has written its rings and says 3 (some say 4 at once), this end
//!   connects and says 4;
//! - a front-end that says 5 waits for this end's 5, then says 6; this end's 6 comes last;
//! - a front-end that begins anew (a suspended domain that was resumed, a kernel that was started by another) says 1, or 3
//!   with other rings;
//! - a toolstack that wants a device gone sets `online` to 0 and writes 5 into this end's state, or takes the front-end's
//!   directory away.

use crate::status::State;

/// How far a device has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The toolstack has not finished writing it.
    Unwritten,
    /// The provider is asked for its disk.
    Providing,
    /// It is not for this server.
    Ignored,
    /// The provider has refused it.
    Refused,
    /// For the front-end.
    Waiting,
    Connecting,
    Connected,
    /// Its connection is being ended.
    Ending,
    /// It was connected, and may be again; or it failed.
    Closed,
}

/// What is known when a decision is to be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    pub(crate) phase: Phase,
    /// What the front-end says.
    pub(crate) frontend: State,
    /// What this end says, as far as xenstore knows.
    pub(crate) own: State,
    /// The toolstack wants the device to stay.
    pub(crate) online: bool,
    /// The front-end offers other rings than those in use.
    pub(crate) renewed: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Nothing,
    /// Say this, if it is not said already.
    Say(State),
    /// Say that this end waits, with what it offers.
    Wait,
    Connect,
    /// End the connection, then look again.
    End,
}

/// The decision. Phases with work under way decide nothing: they are looked at again when it is done.
pub(crate) fn decide(view: View) -> Action {
    use State::*;
    let say = |state| if view.own == state { Action::Nothing } else { Action::Say(state) };
    let wait = match (view.online, view.own) {
        (false, _) => say(Closed),
        (true, InitWait) => Action::Nothing,
        (true, _) => Action::Wait,
    };
    match (view.phase, view.frontend) {
        (Phase::Unwritten | Phase::Providing | Phase::Ignored | Phase::Connecting | Phase::Ending, _) => {
            Action::Nothing
        }

        (Phase::Waiting, Initialised | Connected) => Action::Connect,
        (Phase::Waiting, Closing) => say(Closing),
        (Phase::Waiting, Closed) if view.online && view.own == InitWait => Action::Nothing,
        (Phase::Waiting, Closed) => say(Closed),
        (Phase::Waiting, _) => wait,

        (Phase::Connected, Connected) => Action::Nothing,
        (Phase::Connected, Initialised) if view.renewed => Action::End,
        (Phase::Connected, Initialised) => Action::Nothing,
        (Phase::Connected, Closing) => say(Closing),
        (Phase::Connected, Initialising | InitWait | Closed | Unknown) => Action::End,
        (Phase::Connected, Reconfiguring | Reconfigured) => Action::Nothing,

        (Phase::Closed, Initialising | InitWait) => wait,
        // One that has failed is to be closed by its front-end first.
        (Phase::Closed, Initialised) if view.online && view.own == Closed => Action::Connect,
        (Phase::Refused | Phase::Closed, Closing) => say(Closing),
        (Phase::Refused, _) if view.online => Action::Nothing,
        (Phase::Refused, _) | (Phase::Closed, Closed | Unknown) => say(Closed),
        (Phase::Closed, Initialised | Connected | Reconfiguring | Reconfigured) => Action::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(phase: Phase, frontend: State, own: State) -> View {
        View { phase, frontend, own, online: true, renewed: false }
    }

    #[test]
    fn a_life() {
        use State::*;
        assert_eq!(decide(view(Phase::Waiting, Initialising, Initialising)), Action::Wait);
        assert_eq!(decide(view(Phase::Waiting, Initialising, InitWait)), Action::Nothing);
        assert_eq!(decide(view(Phase::Waiting, Initialised, InitWait)), Action::Connect);
        assert_eq!(decide(view(Phase::Connected, Initialised, Connected)), Action::Nothing);
        assert_eq!(decide(view(Phase::Connected, Connected, Connected)), Action::Nothing);
        assert_eq!(decide(view(Phase::Connected, Closing, Connected)), Action::Say(Closing));
        assert_eq!(decide(view(Phase::Connected, Closed, Closing)), Action::End);
        assert_eq!(decide(view(Phase::Closed, Closed, Closing)), Action::Say(Closed));
        assert_eq!(decide(view(Phase::Closed, Closed, Closed)), Action::Nothing);
        // A kernel started by the one before.
        assert_eq!(decide(view(Phase::Closed, Initialising, Closed)), Action::Wait);
    }

    #[test]
    fn a_front_end_that_connects_at_once() {
        assert_eq!(decide(view(Phase::Waiting, State::Connected, State::InitWait)), Action::Connect);
    }

    #[test]
    fn a_domain_that_was_resumed_has_other_rings() {
        let resumed = View { renewed: true, ..view(Phase::Connected, State::Initialised, State::Connected) };
        assert_eq!(decide(resumed), Action::End);
        assert_eq!(decide(view(Phase::Connected, State::Initialising, State::Connected)), Action::End);
    }

    #[test]
    fn a_device_that_has_failed_is_closed_by_its_front_end_first() {
        use State::*;
        assert_eq!(decide(view(Phase::Closed, Initialised, Closing)), Action::Nothing);
        assert_eq!(decide(view(Phase::Closed, Connected, Closing)), Action::Nothing);
        assert_eq!(decide(view(Phase::Closed, Closed, Closing)), Action::Say(Closed));
        assert_eq!(decide(view(Phase::Closed, Initialised, Closed)), Action::Connect);
    }

    #[test]
    fn the_toolstack_takes_a_device_away() {
        use State::*;
        let offline = |phase, frontend, own| View { online: false, ..view(phase, frontend, own) };
        // Unplugged while in use: its 5 stays until the front-end has closed.
        assert_eq!(decide(offline(Phase::Connected, Connected, Closing)), Action::Nothing);
        assert_eq!(decide(offline(Phase::Connected, Closing, Closing)), Action::Nothing);
        assert_eq!(decide(offline(Phase::Connected, Closed, Closing)), Action::End);
        assert_eq!(decide(offline(Phase::Closed, Closed, Closing)), Action::Say(Closed));
        // Never connected, refused, destroyed.
        assert_eq!(decide(offline(Phase::Waiting, Initialising, Closing)), Action::Say(Closed));
        assert_eq!(decide(offline(Phase::Refused, Initialising, Closing)), Action::Say(Closed));
        assert_eq!(decide(offline(Phase::Connected, Unknown, Closing)), Action::End);
    }
}
