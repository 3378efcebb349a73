//! The table that maps a name in a configuration file to a plug-in.

use crate::{engine::Engine, gate::TokenGate, task::TaskSource, verifier::Verifier};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;

/// Why a plug-in could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PluginError {
    /// No plug-in of this kind has the name.
    #[error("there is no {kind} named '{name}'; there are: {known}")]
    Unknown { kind: &'static str, name: String, known: String },
    /// Its options are wrong.
    #[error("{kind} '{name}': {reason}")]
    Options { kind: &'static str, name: String, reason: String },
}

/// The options of one plug-in: the keys of its configuration section other than `name`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options(pub serde_json::Map<String, serde_json::Value>);

impl Options {
    /// Reads the options into a type; give it `#[serde(deny_unknown_fields)]` so that a
    /// misspelt key is an error.
    ///
    /// # Errors
    /// What serde says of the first key that does not fit.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, String> {
        serde_json::from_value(serde_json::Value::Object(self.0.clone())).map_err(|e| e.to_string())
    }
}

/// Makes a plug-in of type `T` from its options; the error says which option is wrong and why.
pub type Factory<T> = Box<dyn Fn(&Options) -> Result<Box<T>, String> + Send + Sync>;

/// The plug-ins of one kind, by name.
struct Table<T: ?Sized> {
    kind: &'static str,
    factories: BTreeMap<String, Factory<T>>,
}

impl<T: ?Sized> Table<T> {
    fn new(kind: &'static str) -> Self {
        Self { kind, factories: BTreeMap::new() }
    }

    fn make(&self, name: &str, options: &Options) -> Result<Box<T>, PluginError> {
        let Some(factory) = self.factories.get(name) else {
            let known: Vec<&str> = self.factories.keys().map(String::as_str).collect();
            return Err(PluginError::Unknown {
                kind: self.kind,
                name: name.into(),
                known: known.join(", "),
            });
        };
        factory(options).map_err(|reason| PluginError::Options {
            kind: self.kind,
            name: name.into(),
            reason,
        })
    }
}

/// All plug-ins that a configuration file can name. Built-ins and a user's own stand in the same
/// table; a later entry replaces an earlier one of the same name.
pub struct Plugins {
    tasks: Table<dyn TaskSource>,
    verifiers: Table<dyn Verifier>,
    gates: Table<dyn TokenGate>,
    engines: Table<dyn Engine>,
}

impl Default for Plugins {
    fn default() -> Self {
        Self {
            tasks: Table::new("task"),
            verifiers: Table::new("verifier"),
            gates: Table::new("gate"),
            engines: Table::new("engine"),
        }
    }
}

macro_rules! kind {
    ($table:ident, $add:ident, $make:ident, $trait:path, $what:literal) => {
        #[doc = concat!("Adds a ", $what, ".")]
        #[must_use]
        pub fn $add<F, P>(mut self, name: &str, factory: F) -> Self
        where
            P: $trait + 'static,
            F: Fn(&Options) -> Result<P, String> + Send + Sync + 'static,
        {
            let boxed: Factory<dyn $trait> = Box::new(move |options| {
                factory(options).map(|made| Box::new(made) as Box<dyn $trait>)
            });
            self.$table.factories.insert(name.to_string(), boxed);
            self
        }

        #[doc = concat!("Makes the ", $what, " of this name.")]
        ///
        /// # Errors
        /// There is none of this name, or its options are wrong.
        pub fn $make(&self, name: &str, options: &Options) -> Result<Box<dyn $trait>, PluginError> {
            self.$table.make(name, options)
        }
    };
}

impl Plugins {
    kind!(tasks, with_task, make_task, TaskSource, "task source");
    kind!(verifiers, with_verifier, make_verifier, Verifier, "verifier");
    kind!(gates, with_gate, make_gate, TokenGate, "token gate");
    kind!(engines, with_engine, make_engine, Engine, "engine");
}
