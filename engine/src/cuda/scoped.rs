//! A thread's setting that holds for some work.

use std::{cell::Cell, thread::LocalKey};

/// Runs `body` with `setting` at `value`; it is as before afterwards, after a panic, too.
pub(super) fn with<T: Copy + 'static, R>(
    setting: &'static LocalKey<Cell<T>>,
    value: T,
    body: impl FnOnce() -> R,
) -> R {
    struct Restore<T: Copy + 'static>(&'static LocalKey<Cell<T>>, T);
    impl<T: Copy> Drop for Restore<T> {
        fn drop(&mut self) {
            self.0.set(self.1);
        }
    }
    let _restore = Restore(setting, setting.replace(value));
    body()
}
