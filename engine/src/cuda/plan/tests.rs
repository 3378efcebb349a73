//! Every row sees every token exactly once, however the work is cut.

use super::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Spans over owned block tables.
fn spans<'a>(lengths: &[(usize, usize)], tables: &'a [Vec<u32>]) -> Vec<Span<'a>> {
    let mut row = 0;
    let spans = lengths.iter().zip(tables).map(|(&(len, rows), blocks)| {
        row += rows;
        Span { rows: row - rows..row, first_position: len - rows, blocks }
    });
    spans.collect()
}

/// Block tables of sequences, the first `shared` blocks of which are the same.
fn tables(lengths: &[(usize, usize)], shared: usize) -> Vec<Vec<u32>> {
    let table = |(i, &(len, _)): (usize, &(usize, usize))| {
        let own = |block: usize| (1000 * (i + 1) + block) as u32;
        (0..len.div_ceil(BLOCK)).map(|b| if b < shared { b as u32 } else { own(b) }).collect()
    };
    lengths.iter().enumerate().map(table).collect()
}

/// Checks that the tiles and pieces are those of `spans`.
fn check(spans: &[Span], machine: &Machine) -> Work {
    let work = Work::new(spans, machine);
    let mut seen: Vec<Vec<(usize, u32)>> = vec![Vec::new(); work.pieces.len()];
    let mut ordinals = vec![Vec::new(); work.pieces.len()];
    for tile in &work.tiles {
        let rows = &work.tile_rows[tile.rows.clone()];
        assert!(!rows.is_empty() && rows.len() * machine.group <= MOST_ROWS.max(machine.group));
        assert!(!tile.tokens.is_empty() && tile.tokens.start.is_multiple_of(BLOCK));
        for &row in rows {
            ordinals[row].push(tile.ordinal);
            let tokens = tile.tokens.clone();
            seen[row].extend(tokens.map(|t| (t, spans[tile.span].blocks[t / BLOCK])));
        }
    }
    for span in spans {
        for row in span.rows.clone() {
            let position = span.first_position + row - span.rows.start;
            seen[row].sort_unstable();
            seen[row].retain(|&(token, _)| token <= position);
            let want: Vec<_> = (0..=position).map(|t| (t, span.blocks[t / BLOCK])).collect();
            assert_eq!(seen[row], want, "row {row}");
            ordinals[row].sort_unstable();
            let pieces = ordinals[row].len();
            assert_eq!(ordinals[row], (0..pieces).collect::<Vec<_>>());
            assert_eq!(work.pieces[row], if pieces == 1 { 0 } else { pieces });
        }
    }
    work
}

const H100: Machine = Machine { group: 7, kv_heads: 2, blocks: 396 };

#[test]
fn one_long_sequence_is_cut_for_the_whole_device() {
    let lengths = [(32_000, 1)];
    let tables = tables(&lengths, 0);
    let work = check(&spans(&lengths, &tables), &H100);
    assert_eq!(work.tiles.len(), 125);
    assert!(work.tiles.iter().all(|tile| tile.tokens.len() == 256));
}

#[test]
fn a_short_one_is_not_cut() {
    let lengths = [(200, 1), (256, 1)];
    let tables = tables(&lengths, 0);
    let work = check(&spans(&lengths, &tables), &H100);
    assert_eq!((work.tiles.len(), work.pieces.iter().sum::<usize>()), (2, 0));
}

#[test]
fn samples_of_a_group_share_tiles() {
    let lengths = [(330, 1); 16];
    let tables = tables(&lengths, 20);
    let machine = Machine { blocks: 2, ..H100 };
    let work = check(&spans(&lengths, &tables), &machine);
    let shared: Vec<_> = work.tiles.iter().filter(|tile| tile.tokens.start == 0).collect();
    assert_eq!(shared.len(), 2, "nine rows fit into a tile");
    assert!(shared.iter().all(|tile| tile.tokens == (0..320) && tile.rows.len() == 8));
    assert_eq!(work.tiles.len(), 18);
    assert_eq!(work.pieces, [2; 16]);
}

#[test]
fn few_shared_blocks_are_read_by_each_sample() {
    let lengths = [(250, 1); 16];
    let work = check(&spans(&lengths, &tables(&lengths, 15)), &H100);
    assert_eq!((work.tiles.len(), work.pieces), (16, vec![0; 16]));
}

#[test]
fn groups_side_by_side_are_told_apart() {
    let lengths = [(300, 1), (310, 1), (400, 1), (401, 1)];
    let mut tables = tables(&lengths, 0);
    tables[1] = [&tables[0][..17], &tables[1][17..]].concat();
    tables[3] = [&tables[2][..20], &tables[3][20..]].concat();
    let work = check(&spans(&lengths, &tables), &Machine { blocks: 1, ..H100 });
    assert_eq!(work.pieces, [2; 4]);
    assert_eq!(work.tiles.len(), 6);
}

#[test]
fn random_batches_lose_and_repeat_nothing() {
    let mut rng = StdRng::seed_from_u64(5);
    for _ in 0..300 {
        let count = rng.random_range(0..12);
        let lengths: Vec<(usize, usize)> = (0..count)
            .map(|_| {
                let len = rng.random_range(1..900);
                (len, if rng.random_bool(0.5) { 1 } else { rng.random_range(1..=len) })
            })
            .collect();
        let tables = tables(&lengths, rng.random_range(0..20));
        let machine = Machine {
            group: rng.random_range(1..=64),
            kv_heads: rng.random_range(1..9),
            blocks: rng.random_range(1..400),
        };
        check(&spans(&lengths, &tables), &machine);
    }
}

#[test]
fn decoding_stays_within_its_bounds() {
    let mut rng = StdRng::seed_from_u64(6);
    for _ in 0..300 {
        let rows = rng.random_range(1..80);
        let longest = if rng.random_bool(0.5) { 500 } else { 9000 };
        let base = rng.random_range(1..longest);
        let lengths: Vec<_> = (0..rows).map(|_| (base + rng.random_range(0..longest), 1)).collect();
        let tables = tables(&lengths, rng.random_range(0..base / BLOCK + 1));
        let machine = Machine {
            group: rng.random_range(1..=16),
            kv_heads: rng.random_range(1..33),
            blocks: rng.random_range(1..400),
        };
        let (sizes, most) =
            (check(&spans(&lengths, &tables), &machine).sizes(), machine.most_of_decode(rows));
        let fits = sizes.tiles <= most.tiles
            && sizes.tile_rows <= most.tile_rows
            && sizes.pieces <= most.pieces;
        assert!(fits, "{sizes:?} {most:?} {machine:?}");
    }
}
