//! What mistral.rs answers about one sample. Only failures are of interest: tokens are drawn here
//! (see [`sample`](super::sample)). To end a sample early is to hang up: what mistral.rs sends at
//! the end of the step finds nobody, and it drops the sample.

use super::lock;
use mistralrs::Response;
use std::{
    future::poll_fn,
    sync::Mutex,
    task::{Context, Poll},
};
use tokio::sync::{Notify, mpsc::Receiver};

/// The line on which mistral.rs answers.
pub(super) struct Line {
    answers: Mutex<Option<Receiver<Response>>>,
    hung_up: Notify,
}

impl Line {
    /// A line on which `answers` come in.
    pub fn new(answers: Receiver<Response>) -> Self {
        Self { answers: Mutex::new(Some(answers)), hung_up: Notify::new() }
    }

    /// Takes no more answers, from this moment on.
    pub fn hang_up(&self) {
        lock(&self.answers).take();
        self.hung_up.notify_one();
    }

    /// Whether somebody has hung up.
    pub fn is_open(&self) -> bool {
        lock(&self.answers).is_some()
    }

    /// Waits until somebody hangs up.
    ///
    /// # Errors
    /// mistral.rs fails before that; what it says.
    pub async fn closed(&self) -> Result<(), String> {
        loop {
            tokio::select! {
                () = self.hung_up.notified() => return Ok(()),
                answer = poll_fn(|context| self.poll(context)) => match answer {
                    Answer::HungUp => return Ok(()),
                    Answer::Of(Some(response)) => failure(response)?,
                    Answer::Of(None) => return Err("mistral.rs gave the sample up".into()),
                },
            }
        }
    }

    fn poll(&self, context: &mut Context<'_>) -> Poll<Answer> {
        match &mut *lock(&self.answers) {
            Some(answers) => {
                answers.poll_recv(context).map(|answer| Answer::Of(answer.map(Box::new)))
            }
            None => Poll::Ready(Answer::HungUp),
        }
    }
}

enum Answer {
    HungUp,
    /// None: mistral.rs will say no more.
    Of(Option<Box<Response>>),
}

/// The failure that a response tells of, if it does.
fn failure(response: Box<Response>) -> Result<(), String> {
    match *response {
        Response::InternalError(error) | Response::ValidationError(error) => Err(error.to_string()),
        Response::ModelError(error, _) | Response::CompletionModelError(error, _) => Err(error),
        _ => Ok(()),
    }
}
