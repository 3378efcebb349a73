//! Which requests of the engine belong to which answer, so that a client can abort them by name.

use onpolicy_plugin_api::RequestId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// The generations that are not over.
#[derive(Debug, Default)]
pub struct Registry {
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    live: HashMap<u64, Entry>,
}

#[derive(Debug, Default)]
struct Entry {
    /// Names of all requests, or of the one of this number.
    names: Vec<(String, Option<usize>)>,
    requests: Vec<RequestId>,
}

impl Entry {
    fn find(&self, name: &str) -> Vec<RequestId> {
        let meant = self.names.iter().filter(|(known, _)| known == name);
        let requests = meant.flat_map(|(_, which)| match which {
            Some(which) => self.requests.get(*which..=*which).unwrap_or_default(),
            None => &self.requests[..],
        });
        requests.copied().collect()
    }
}

impl Registry {
    /// Adds a generation without requests; it is forgotten when the result is dropped.
    pub fn add(self: &Arc<Self>) -> Registered {
        let mut entries = self.entries();
        let key = entries.next;
        entries.next += 1;
        entries.live.insert(key, Entry::default());
        Registered { registry: self.clone(), key }
    }

    /// The requests of this name; none if there is none.
    pub fn find(&self, name: &str) -> Vec<RequestId> {
        self.entries().live.values().flat_map(|entry| entry.find(name)).collect()
    }

    /// Generations that are not over.
    pub fn len(&self) -> usize {
        self.entries().live.len()
    }

    /// True if all generations are over.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

/// A generation's place in the registry.
#[derive(Debug)]
pub struct Registered {
    registry: Arc<Registry>,
    key: u64,
}

impl Registered {
    /// One more request of the engine is part of it.
    pub fn request(&self, id: RequestId) {
        if let Some(entry) = self.registry.entries().live.get_mut(&self.key) {
            entry.requests.push(id);
        }
    }

    /// Names it by the answer's id, `cmpl-7`, and by what the client may have called it, `7`.
    pub fn name(&self, id: &str) {
        let mut entries = self.registry.entries();
        if let Some(entry) = entries.live.get_mut(&self.key) {
            entry.names.push((id.to_string(), None));
            entry.names.extend(id.split_once('-').map(|(_, name)| (name.to_string(), None)));
        }
    }

    /// Names each of its requests, in their order.
    pub fn name_each(&self, names: &[String]) {
        if let Some(entry) = self.registry.entries().live.get_mut(&self.key) {
            let numbered = names.iter().cloned().zip((0..).map(Some));
            entry.names.extend(numbered);
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.registry.entries().live.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_are_found_by_both_names_until_they_are_dropped() {
        let registry = Arc::new(Registry::default());
        let (one, two) = (registry.add(), registry.add());
        [1, 2].into_iter().for_each(|id| one.request(RequestId(id)));
        two.request(RequestId(3));
        one.name("cmpl-a-b");
        two.name("chatcmpl-a-b");
        assert_eq!(registry.find("cmpl-a-b"), [RequestId(1), RequestId(2)]);
        let mut both = registry.find("a-b");
        both.sort();
        assert_eq!(both, [RequestId(1), RequestId(2), RequestId(3)]);
        assert_eq!(registry.find("b"), []);
        drop(one);
        assert_eq!(registry.find("a-b"), [RequestId(3)]);
        assert_eq!(registry.len(), 1);
        drop(two);
        assert!(registry.is_empty());
    }
}
