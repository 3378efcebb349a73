//! A request's sink, and the tokens that it is to get once there is time for it.

use onpolicy_plugin_api::{Event, Sink};

/// Events reach the sink in their order; tokens wait for the next event of another kind, for
/// [`Outlet::flush`], or for the end of the request.
pub struct Outlet {
    sink: Box<dyn Sink>,
    held: Vec<Event>,
    /// The sink has refused an event.
    refused: bool,
}

impl Outlet {
    /// Nothing has been sent yet.
    pub fn new(sink: Box<dyn Sink>) -> Self {
        Self { sink, held: Vec::new(), refused: false }
    }

    /// Keeps an event for later.
    pub fn hold(&mut self, event: Event) {
        self.held.push(event);
    }

    /// Sends an event, after those that wait.
    pub fn send(&mut self, event: Event) {
        self.hold(event);
        self.flush();
    }

    /// Sends what waits.
    pub fn flush(&mut self) {
        for event in self.held.drain(..) {
            self.refused |= !self.sink.send(event);
        }
    }

    /// True once nobody listens any more.
    pub fn is_closed(&self) -> bool {
        self.refused || self.sink.is_closed()
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.flush();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use onpolicy_plugin_api::{FinishReason, Token, TokenStats};
    use std::sync::mpsc;

    /// A sink that shows what it gets.
    pub struct Listener(pub mpsc::Sender<Event>);

    impl Sink for Listener {
        fn send(&mut self, event: Event) -> bool {
            self.0.send(event).is_ok()
        }

        fn is_closed(&self) -> bool {
            false
        }
    }

    fn token(id: u32) -> Event {
        let stats = TokenStats::default();
        Event::Token { index: 0, token: Token { id, stats, weight_version: 0, top: Vec::new() } }
    }

    fn finished() -> Event {
        Event::Finished { index: 0, reason: FinishReason::Length }
    }

    #[test]
    fn events_come_in_their_order() {
        let (sender, inbox) = mpsc::channel();
        let mut outlet = Outlet::new(Box::new(Listener(sender)));
        let came = || inbox.try_iter().collect::<Vec<_>>();
        outlet.hold(token(1));
        outlet.hold(token(2));
        assert_eq!(came(), []);
        outlet.flush();
        assert_eq!(came(), [token(1), token(2)]);
        outlet.hold(token(3));
        outlet.send(finished());
        assert_eq!(came(), [token(3), finished()]);
        outlet.hold(token(4));
        drop(outlet);
        assert_eq!(came(), [token(4)], "what waits at the end is sent");
    }

    #[test]
    fn a_refusal_is_remembered() {
        let (sender, inbox) = mpsc::channel();
        let mut outlet = Outlet::new(Box::new(Listener(sender)));
        drop(inbox);
        outlet.hold(token(1));
        assert!(!outlet.is_closed(), "nothing was sent yet");
        outlet.flush();
        assert!(outlet.is_closed());
    }
}
