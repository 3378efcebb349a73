//! Allocations that fail: a smaller pass follows, not the end of the process.

use super::{Check, Limit, Place};
use onpolicy_trainer::room::{Room, Span};
use tch::{Kind, Tensor};

/// Rows for which more memory is asked than any device has.
const TOO_MANY: usize = 100;

/// A pass that asks for too much, twice.
pub fn failures(place: &Place) -> Result<Vec<Check>, anyhow::Error> {
    let mut room = Room::new(4 * TOO_MANY);
    let device = place.placement.device;
    let rows = room.run(Span { least: 1, most: 4 * TOO_MANY }, |rows| {
        if rows > TOO_MANY {
            let _ = Tensor::empty([1i64 << 50], (Kind::Float, device));
        }
        Ok(rows)
    })?;
    let retries = room.take_failures() as f64;
    Ok(vec![
        Check::new("memory: rows after two failed allocations", rows as f64, Limit::Most(100.0)),
        Check::new("memory: passes that were run again", retries, Limit::Least(2.0)),
    ])
}
