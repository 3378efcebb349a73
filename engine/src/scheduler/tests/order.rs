//! Who begins before whom, and who shares prefixes with whom.

use super::*;

#[test]
fn lower_priorities_begin_first_and_equal_ones_in_order_of_arrival() {
    let mut s = scheduler([64, 2, 64]);
    add(&mut s, 0, 1, 5, 2);
    step(&mut s);
    for (id, priority) in [(1, 5), (2, 0), (3, -7), (4, 0)] {
        s.add(NewRequest { priority, ..request(id, id as u32 + 1, 5, 1) }).unwrap();
    }
    s.check().unwrap();
    // Sequences 2, 3, 4 and 5 wait. Each round, the older of the two that run ends.
    let mut began = Vec::new();
    for _ in 0..4 {
        s.finish(s.running[0]);
        let new = chunks(&step(&mut s)).into_iter().filter(|(_, start, ..)| *start == 0);
        began.extend(new.map(|(id, ..)| id));
    }
    assert_eq!(began, [4, 3, 5, 2]);
}

#[test]
fn a_request_that_has_begun_is_older_than_one_of_a_lower_number_that_waits() {
    let mut s = scheduler([6, 4, 64]);
    for (id, priority) in [(0, 0), (1, 9)] {
        s.add(NewRequest { priority, ..request(id, id as u32 + 1, 15, 2) }).unwrap();
    }
    step(&mut s);
    assert_eq!(s.running, [0, 1, 2, 3].map(SeqId));
    s.add(NewRequest { priority: -9, ..request(2, 3, 15, 1) }).unwrap();
    s.set_version(1, true);
    s.check().unwrap();
    // The preempted ones come back first, in the order in which they began.
    let again = step(&mut s);
    assert_eq!(chunks(&again).first(), Some(&(0, 0, 16, true)));
    assert_eq!(s.waiting(), 1);
    s.abort(RequestId(0));
    s.finish(SeqId(2));
    step(&mut s);
    // The urgent one began after what ran, so it is younger than that.
    assert_eq!(s.running, [SeqId(3), SeqId(4)]);
    assert_eq!(s.preempt_latest(), Some(SeqId(4)));
    s.check().unwrap();
}

#[test]
fn a_leader_that_waits_by_priority_is_replaced_in_its_place() {
    let mut s = scheduler([64, 2, 64]);
    add(&mut s, 0, 1, 5, 2);
    step(&mut s);
    s.add(NewRequest { priority: 3, ..request(1, 2, 5, 2) }).unwrap();
    s.add(NewRequest { priority: 1, ..request(2, 3, 5, 2) }).unwrap();
    s.finish(SeqId(4));
    s.finish(SeqId(2));
    s.check().unwrap();
    assert_eq!(s.waiting, [SeqId(5), SeqId(3)]);
    s.abort(RequestId(2));
    assert_eq!(s.waiting, [SeqId(3)]);
}

#[test]
fn salts_part_prefixes() {
    let mut s = scheduler(ROOMY);
    let salted = |id, salt: Option<&str>| NewRequest {
        cache_salt: salt.map(String::from),
        ..request(id, 1, 40, 2)
    };
    let mut next = 0;
    let mut starts_at = |s: &mut Scheduler, salt| {
        s.add(salted(next, salt)).unwrap();
        let start = step(s).chunks[0].start;
        s.abort(RequestId(next));
        next += 1;
        start
    };
    assert_eq!(starts_at(&mut s, Some("a")), 0);
    assert_eq!(starts_at(&mut s, None), 0);
    assert_eq!(starts_at(&mut s, Some("b")), 0);
    assert_eq!([Some("a"), None, Some("b")].map(|salt| starts_at(&mut s, salt)), [32; 3]);
    // A salt lasts through an update.
    s.set_version(1, false);
    assert_eq!([Some("a"), Some("b")].map(|salt| starts_at(&mut s, salt)), [0; 2]);
    assert_eq!(starts_at(&mut s, Some("a")), 32);
}
