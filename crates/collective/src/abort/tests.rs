use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::AbortHandle;

#[test]
fn first_reason_stays_and_hooks_run_once() {
    let calls: Arc<AtomicUsize> = Arc::default();
    let abort = AbortHandle::new();
    let hook = |calls: &Arc<AtomicUsize>| {
        let calls = Arc::clone(calls);
        move || {
            calls.fetch_add(1, Ordering::SeqCst);
        }
    };
    abort.on_abort(hook(&calls));
    assert!(abort.check().is_ok());

    abort.clone().abort("revoked");
    abort.abort("again");
    assert_eq!(abort.reason(), Some("revoked"));
    assert_eq!(abort.check().unwrap_err().to_string(), "collective aborted: revoked");
    assert_eq!(calls.load(Ordering::SeqCst), 1);

    abort.on_abort(hook(&calls));
    assert_eq!(calls.load(Ordering::SeqCst), 2, "a late hook runs at once");
}
