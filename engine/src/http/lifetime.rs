//! Whether the server goes on, as requests see it.

use tokio::sync::watch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Serving,
    Draining,
    CutOff,
}

/// The server's side.
pub(super) struct Phase(watch::Sender<State>);

/// A request's side; among the extensions of each request that came by a connection.
#[derive(Debug, Clone)]
pub struct Lifetime(watch::Receiver<State>);

impl Phase {
    /// A server that begins to serve.
    pub(super) fn begin() -> (Self, Lifetime) {
        let (sender, receiver) = watch::channel(State::Serving);
        (Self(sender), Lifetime(receiver))
    }

    /// Running requests may finish; no other is taken.
    pub(super) fn drain(&self) {
        self.0.send_replace(State::Draining);
    }

    /// Running requests must end now.
    pub(super) fn cut_off(&self) {
        self.0.send_replace(State::CutOff);
    }
}

impl Lifetime {
    /// True once no new request is taken.
    pub fn is_ending(&self) -> bool {
        *self.0.borrow() != State::Serving
    }

    /// Waits until running requests must end.
    pub async fn cut_off(mut self) {
        if self.0.wait_for(|state| *state == State::CutOff).await.is_err() {
            // The server is gone, and with it whoever could be told.
            std::future::pending().await
        }
    }
}
