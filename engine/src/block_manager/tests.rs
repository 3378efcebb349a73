use super::*;

/// Tokens of blocks full of one number each.
fn text(blocks: &[u32]) -> Vec<u32> {
    blocks.iter().flat_map(|&token| [token; BLOCK_SIZE]).collect()
}

/// A table that holds these full blocks, registered as far as it goes.
fn hold(manager: &mut BlockManager, version: u64, tokens: &[u32]) -> Vec<u32> {
    let mut table = Vec::new();
    assert!(manager.prepare(&mut table, 0..tokens.len(), &mut Vec::new()));
    let mut chain = Some(Chain::root(version));
    for _ in 0..tokens.len() / BLOCK_SIZE {
        chain = chain.and_then(|chain| manager.register(chain, tokens, &mut table));
    }
    table
}

fn check(manager: &BlockManager, tables: &[&[u32]]) {
    manager.check(tables.iter().copied()).unwrap();
}

#[test]
fn the_lru_list_gives_blocks_in_the_order_they_came() {
    let mut lru = Lru::new(5);
    assert_eq!((lru.len(), lru.pop_oldest()), (0, None));
    for block in [3, 0, 4, 1] {
        lru.push_newest(block);
    }
    lru.remove(0);
    lru.remove(3);
    lru.push_newest(3);
    assert!(lru.contains(3) && !lru.contains(0) && !lru.contains(2));
    let order: Vec<u32> = std::iter::from_fn(|| lru.pop_oldest()).collect();
    assert_eq!(order, [4, 1, 3]);
    assert_eq!(lru.len(), 0);
}

#[test]
fn a_table_grows_by_whole_blocks() {
    let mut manager = BlockManager::new(4);
    let (mut table, mut copies) = (Vec::new(), Vec::new());
    for (span, blocks) in [(0..1, 1), (1..16, 1), (16..17, 2), (17..49, 4), (49..64, 4)] {
        assert!(manager.prepare(&mut table, span, &mut copies));
        assert_eq!((manager.used(), manager.free()), (blocks, 4 - blocks));
    }
    assert!(!manager.prepare(&mut table, 64..65, &mut copies));
    assert_eq!((table.as_slice(), copies.as_slice()), ([0, 1, 2, 3].as_slice(), [].as_slice()));
    check(&manager, &[&table]);
    manager.release_table(&mut table);
    assert_eq!((manager.used(), manager.free()), (0, 4));
}

#[test]
fn a_shared_block_is_copied_by_all_writers_but_the_last() {
    let mut manager = BlockManager::new(5);
    let mut tables = [vec![], vec![], vec![]];
    assert!(manager.prepare(&mut tables[0], 0..20, &mut Vec::new()));
    for i in 1..3 {
        manager.share(&tables[0].clone());
        tables[i] = tables[0].clone();
    }
    assert_eq!((manager.references(1), manager.used()), (3, 2));
    let mut copies = Vec::new();
    for table in &mut tables {
        assert!(manager.prepare(table, 20..21, &mut copies));
    }
    assert_eq!(copies, [(1, 2), (1, 3)]);
    assert_eq!(tables, [[0, 2], [0, 3], [0, 1]]);
    assert_eq!((manager.references(0), manager.references(1), manager.used()), (3, 1, 4));
    check(&manager, &[&tables[0], &tables[1], &tables[2]]);
}

#[test]
fn a_refused_growth_changes_nothing() {
    let mut manager = BlockManager::new(3);
    let (mut table, mut copies) = (Vec::new(), Vec::new());
    assert!(manager.prepare(&mut table, 0..20, &mut copies));
    manager.share(&table);
    let other = table.clone();
    // One block for the copy and one to grow into, where there is one.
    assert!(!manager.prepare(&mut table, 20..33, &mut copies));
    assert_eq!((table.as_slice(), copies.len(), manager.free()), ([0, 1].as_slice(), 0, 1));
    check(&manager, &[&table, &other]);
}

#[test]
fn lookup_finds_the_longest_registered_beginning() {
    let mut manager = BlockManager::new(8);
    let table = hold(&mut manager, 1, &text(&[7, 8, 9]));
    let find = |version, blocks: &[u32], limit| manager.lookup(version, &text(blocks), limit).1;
    assert_eq!(find(1, &[7, 8, 9, 9], 4), table);
    assert_eq!(find(1, &[7, 8, 9], 2), table[..2]);
    assert_eq!(find(1, &[7, 8, 8], 3), table[..2]);
    assert!(find(1, &[8, 9], 2).is_empty());
    let spoilt: Vec<u32> = text(&[7, 8]).into_iter().take(31).chain([0]).collect();
    assert_eq!(manager.lookup(1, &spoilt, 2).1, table[..1]);
    assert!(find(2, &[7, 8, 9], 3).is_empty(), "another version's KV is not found");
}

#[test]
fn blocks_are_found_under_their_own_salt_alone() {
    for hash in [prefix::mix, |_: u64, _: &[u32; BLOCK_SIZE]| 5] {
        let mut manager = BlockManager::with_hash(12, hash);
        let root = |salt: Option<&str>| Root {
            version: 1,
            salt: salt.map_or_else(Salt::default, Salt::of),
        };
        let tokens = text(&[7]);
        let mut table = Vec::new();
        assert!(manager.prepare(&mut table, 0..16, &mut Vec::new()));
        let chain = Chain::root(root(Some("a")));
        manager.register(chain, &tokens, &mut table).unwrap();
        assert_eq!(manager.lookup(root(Some("a")), &tokens, 1).1, table);
        for other in [None, Some("b"), Some("")] {
            assert!(manager.lookup(root(other), &tokens, 1).1.is_empty(), "{other:?}");
        }
        assert!(manager.lookup(root(Some("a")).at(2), &tokens, 1).1.is_empty());
        assert_eq!(chain.restart(2), Chain::root(root(Some("a")).at(2)));
        // The same tokens are kept once for each salt, where the hash tells them apart.
        let plain = hold(&mut manager, 1, &tokens);
        assert_ne!(plain, table);
        let found = manager.lookup(1, &tokens, 1).1;
        assert!(found == plain || found.is_empty());
        check(&manager, &[&table, &plain]);
    }
}

#[test]
fn the_hash_depends_on_parent_and_every_token() {
    let tokens: [u32; BLOCK_SIZE] = std::array::from_fn(|i| i as u32);
    let mut hashes = vec![prefix::mix(0, &tokens), prefix::mix(1, &tokens)];
    for i in 0..BLOCK_SIZE {
        let mut other = tokens;
        other[i] += 1;
        hashes.push(prefix::mix(0, &other));
    }
    hashes.sort_unstable();
    hashes.dedup();
    assert_eq!(hashes.len(), 2 + BLOCK_SIZE);
}

#[test]
fn equal_blocks_become_one() {
    let mut manager = BlockManager::new(8);
    let first = hold(&mut manager, 0, &text(&[1, 2]));
    let second = hold(&mut manager, 0, &text(&[1, 2, 3]));
    assert_eq!(second, [0, 1, 4]);
    assert_eq!((manager.used(), manager.references(0), manager.references(4)), (3, 2, 1));
    check(&manager, &[&first, &second]);
}

#[test]
fn a_collision_costs_a_hit_and_nothing_else() {
    let mut manager = BlockManager::with_hash(8, |_, _| 5);
    let first = hold(&mut manager, 0, &text(&[1, 2]));
    let second = hold(&mut manager, 0, &text(&[3, 4]));
    assert_eq!(manager.lookup(0, &text(&[1, 2]), 2).1, first[..1]);
    assert!(manager.lookup(0, &text(&[3, 4]), 2).1.is_empty());
    assert!(manager.lookup(1, &text(&[1, 2]), 2).1.is_empty());
    check(&manager, &[&first, &second]);
}

#[test]
fn the_same_tokens_after_others_are_not_found() {
    // The hash knows nothing of what came before.
    let mut manager = BlockManager::with_hash(8, |_, tokens| u64::from(tokens[0]));
    let first = hold(&mut manager, 0, &text(&[1, 2]));
    let second = hold(&mut manager, 0, &text(&[3, 2]));
    assert_eq!(manager.lookup(0, &text(&[1, 2]), 2).1, first);
    assert_eq!(manager.lookup(0, &text(&[3, 2]), 2).1, second[..1]);
    check(&manager, &[&first, &second]);
}

#[test]
fn the_longest_unused_block_is_evicted_and_the_end_of_a_chain_first() {
    let mut manager = BlockManager::new(5);
    let mut old = hold(&mut manager, 0, &text(&[1, 2]));
    let mut new = hold(&mut manager, 0, &text(&[3, 4]));
    manager.release_table(&mut new);
    manager.release_table(&mut old);
    // Used once more, the chain released first is now the newest.
    let (_, mut again) = manager.lookup(0, &text(&[3, 4]), 2);
    manager.share(&again);
    assert_eq!((manager.used(), manager.free()), (2, 3));
    manager.release_table(&mut again);
    assert_eq!((manager.used(), manager.free()), (0, 5));
    let order: Vec<u32> = (0..5).map(|_| manager.allocate()).collect();
    assert_eq!(order, [4, 1, 0, 3, 2], "the free one, then [1, 2] and [3, 4] from their ends");
    assert!(manager.lookup(0, &text(&[3, 4]), 2).1.is_empty());
}

#[test]
fn eviction_shortens_a_chain_from_its_end() {
    let mut manager = BlockManager::new(3);
    let mut table = hold(&mut manager, 0, &text(&[1, 2, 3]));
    manager.release_table(&mut table);
    let mut taken = Vec::new();
    for left in [2, 1, 0] {
        taken.push(manager.allocate());
        assert_eq!(manager.lookup(0, &text(&[1, 2, 3]), 3).1.len(), left);
        check(&manager, &[&taken]);
    }
}

#[test]
fn check_reports_a_wrong_table() {
    let mut manager = BlockManager::new(4);
    let table = hold(&mut manager, 0, &text(&[1, 2]));
    let wrong = manager.check([table.as_slice(), &[0]].into_iter()).unwrap_err();
    assert_eq!(wrong, "block 0: counts 1 holders, has 2");
    manager.free.push(1);
    let wrong = manager.check([table.as_slice()].into_iter()).unwrap_err();
    assert_eq!(wrong, "block 1: 1 holders, 1 x free, false cached");
    manager.free = vec![3];
    let wrong = manager.check([table.as_slice()].into_iter()).unwrap_err();
    assert_eq!(wrong, "block 2: 0 holders, 0 x free, false cached");
}

#[test]
fn forgotten_blocks_are_taken_before_unused_ones() {
    let mut manager = BlockManager::new(8);
    let tokens = text(&[1, 2, 3]);
    let mut table = hold(&mut manager, 7, &tokens);
    let mut kept = hold(&mut manager, 7, &text(&[9]));
    manager.release_table(&mut table);
    manager.forget_cached();
    check(&manager, &[&kept]);
    assert_eq!((manager.used(), manager.free()), (1, 7));
    assert!(manager.lookup(7, &tokens, 3).1.is_empty());
    assert_eq!(manager.lookup(7, &text(&[9]), 1).1, kept);
    let mut next = hold(&mut manager, 8, &tokens);
    next.sort_unstable();
    assert_eq!(next, [0, 1, 2]);
    manager.release_table(&mut kept);
    check(&manager, &[&next]);
}
