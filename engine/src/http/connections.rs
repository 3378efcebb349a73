//! Connections: how many are open, how long each may keep the server waiting, and how they end.

use super::lifetime::{Lifetime, Phase};
use axum::{Router, body::Body, extract::Request};
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use metrics::{describe_gauge, gauge};
use std::{future::Future, io, pin::pin, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_io_timeout::TimeoutWriter;
use tower::ServiceExt;

/// Open connections.
pub const CONNECTIONS: &str = "onpolicy_http_connections";
/// How long the last words of requests that are cut off may take to be written.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long no connection is taken after one could not be: too many files are open.
const BREATH: Duration = Duration::from_millis(100);

/// What one peer may cost, however it behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Most open connections; one more waits until another is closed.
    pub connections: usize,
    /// How long the headers of a request may take; a connection without a request is closed after
    /// this time too.
    pub header_time: Duration,
    /// How long a peer may read nothing while there is something to read; then it is cut off.
    pub write_time: Duration,
    /// How long running requests may go on after the signal to stop.
    pub grace: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 2048,
            header_time: Duration::from_secs(30),
            write_time: Duration::from_secs(30),
            grace: Duration::from_secs(10),
        }
    }
}

/// Serves until `shutdown`. Then no connection and no request is taken any more; those that run
/// have [`ConnectionLimits::grace`] to finish, and what is left is answered with a 503 (a stream
/// with an error event).
///
/// # Errors
/// The listener fails.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    limits: ConnectionLimits,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    describe_gauge!(CONNECTIONS, "Open connections.");
    let mut server = Server::new(app, limits);
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            (stream, place) = server.accept(&listener) => server.spawn(stream, place),
        }
    }
    drop(listener);
    server.stop().await;
    Ok(())
}

struct Server {
    app: Router,
    limits: ConnectionLimits,
    places: Arc<Semaphore>,
    phase: Phase,
    lifetime: Lifetime,
    graceful: GracefulShutdown,
    /// Ends them when dropped.
    connections: JoinSet<()>,
}

impl Server {
    fn new(app: Router, limits: ConnectionLimits) -> Self {
        let (phase, lifetime) = Phase::begin();
        let (graceful, connections) = (GracefulShutdown::new(), JoinSet::new());
        let places = Arc::new(Semaphore::new(limits.connections));
        Self { app, limits, places, phase, lifetime, graceful, connections }
    }

    /// The next connection, once there is a place for it.
    async fn accept(&self, listener: &TcpListener) -> (TcpStream, OwnedSemaphorePermit) {
        let place = self.places.clone().acquire_owned().await;
        let place = place.expect("the semaphore is never closed");
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return (stream, place),
                // The peer has gone again.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::error!(%error, "a connection could not be taken");
                    sleep(BREATH).await;
                }
            }
        }
    }

    fn spawn(&mut self, stream: TcpStream, place: OwnedSemaphorePermit) {
        // Events of a stream are small; they must not wait for each other.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("TCP_NODELAY could not be set: {error}");
        }
        let mut stream = TimeoutWriter::new(stream);
        stream.set_timeout(Some(self.limits.write_time));
        let lifetime = self.lifetime.clone();
        let service = self.app.clone().map_request(move |request: Request<Incoming>| {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(lifetime.clone());
            request
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.header_time)
            .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(service));
        let connection = self.graceful.watch(connection);
        while self.connections.try_join_next().is_some() {}
        self.connections.spawn(async move {
            let _open = Open::new(place);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
        });
    }

    async fn stop(self) {
        self.phase.drain();
        let mut done = pin!(self.graceful.shutdown());
        if timeout(self.limits.grace, &mut done).await.is_ok() {
            return;
        }
        tracing::warn!("requests that still run after {:?} are cut off", self.limits.grace);
        self.phase.cut_off();
        let _ = timeout(FAREWELL, done).await;
    }
}

/// An open connection, counted as long as it lives.
struct Open {
    _place: OwnedSemaphorePermit,
}

impl Open {
    fn new(place: OwnedSemaphorePermit) -> Self {
        gauge!(CONNECTIONS).increment(1);
        Self { _place: place }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        gauge!(CONNECTIONS).decrement(1);
    }
}
