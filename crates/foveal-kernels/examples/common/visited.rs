//! Random tables and lists for the programs that time sparse attention.

use foveal_kernels::{BlockTable, HeadKeys, HeadTable, KeyLists};

/// What a call visits.
pub struct Visited {
    pub table: Option<BlockTable>,
    pub lists: Option<KeyLists>,
}

impl Visited {
    pub const DENSE: Visited = Visited { table: None, lists: None };

    /// Random choices for `heads` heads of `t` tokens.
    pub fn random(
        kind: &str,
        heads: usize,
        t: usize,
        block: usize,
        density: f32,
        random: &mut dyn FnMut() -> f32,
    ) -> Self {
        let n = t.div_ceil(block);
        let mut lists = |of: usize, density: f32| -> Vec<Vec<u32>> {
            (0..n).map(|_| (0..of as u32).filter(|_| random() < density).collect()).collect()
        };
        let (mut tables, mut keys) = (Vec::new(), Vec::new());
        for _ in 0..heads {
            let share = if kind == "stripes" { density / 2.0 } else { density };
            if kind != "keys" {
                tables.push(HeadTable::from_lists(block, block, lists(n, share)));
            }
            if kind == "keys" || kind == "stripes" {
                keys.push(HeadKeys::from_lists(block, lists(t, share)));
            }
        }
        if kind == "rows" {
            for t in &mut tables {
                let mut bits = || (random() * (1u64 << 24) as f32) as u64;
                t.rows = Some((0..t.blocks.len()).map(|_| bits() | bits() << 24 | bits() << 48).collect());
            }
        }
        Self {
            table: (!tables.is_empty()).then_some(BlockTable { heads: tables }),
            lists: (!keys.is_empty()).then_some(KeyLists { heads: keys }),
        }
    }

    #[allow(dead_code)]
    pub fn check(&self, t: usize) -> foveal_kernels::Result<()> {
        self.table.iter().flat_map(|x| &x.heads).try_for_each(|x| x.check(t, t))?;
        self.lists.iter().flat_map(|x| &x.heads).try_for_each(|x| x.check(t, t))
    }
}
