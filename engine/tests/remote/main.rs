//! A pool of servers as an engine, against servers that do and do not do what they should.

mod fake;
mod requests;
mod support;
mod weights;
