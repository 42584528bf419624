//! What a sparse call visits: block tables and key lists.

use crate::error::{KernelError, Result};

/// Which key blocks each query block of one head visits (compressed rows).
///
/// Query blocks count from the first query of the call, key blocks from the first key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadTable {
    /// Queries per block.
    pub block_q: usize,
    /// Keys per block.
    pub block_k: usize,
    /// `indptr[i]..indptr[i+1]` are the entries of query block i; length = query blocks + 1.
    pub indptr: Vec<usize>,
    /// Key block numbers, ascending within a query block.
    pub blocks: Vec<u32>,
    /// Optional row masks, one per entry: bit r says that row r of the query block attends
    /// to this key block. Needs `block_q` ≤ 64. This is how per-token routing (MoBA) stays exact.
    pub rows: Option<Vec<u64>>,
}

impl HeadTable {
    /// Table from one list of key blocks per query block (sorted and deduplicated here).
    pub fn from_lists(block_q: usize, block_k: usize, lists: Vec<Vec<u32>>) -> Self {
        let mut indptr = Vec::with_capacity(lists.len() + 1);
        indptr.push(0);
        let mut blocks = Vec::new();
        for mut l in lists {
            l.sort_unstable();
            l.dedup();
            blocks.extend_from_slice(&l);
            indptr.push(blocks.len());
        }
        Self { block_q, block_k, indptr, blocks, rows: None }
    }

    /// Every causal block: query i of `tq` sees keys up to `tk - tq + i`.
    pub fn dense_causal(block_q: usize, block_k: usize, tq: usize, tk: usize) -> Self {
        let lists = (0..tq.div_ceil(block_q))
            .map(|qb| {
                let last_q = ((qb + 1) * block_q).min(tq) - 1;
                let visible = (tk + last_q + 1).saturating_sub(tq).min(tk);
                (0..visible.div_ceil(block_k) as u32).collect()
            })
            .collect();
        Self::from_lists(block_q, block_k, lists)
    }

    /// Entries of query block `qb`.
    pub fn row(&self, qb: usize) -> &[u32] {
        &self.blocks[self.indptr[qb]..self.indptr[qb + 1]]
    }

    /// Check the table against a problem of `tq` queries and `tk` keys.
    pub fn check(&self, tq: usize, tk: usize) -> Result<()> {
        let bad = |name, value: String, remedy: &str| {
            Err(KernelError::Param { op: "block table", name, value, remedy: remedy.into() })
        };
        if self.block_q == 0 || self.block_k == 0 {
            return bad("block size", format!("{}x{}", self.block_q, self.block_k), "use sizes of at least 1");
        }
        if self.indptr.len() != tq.div_ceil(self.block_q) + 1 {
            return bad(
                "indptr length",
                self.indptr.len().to_string(),
                &format!("{tq} queries in blocks of {} need {}", self.block_q, tq.div_ceil(self.block_q) + 1),
            );
        }
        if self.indptr[0] != 0
            || *self.indptr.last().unwrap_or(&0) != self.blocks.len()
            || self.indptr.windows(2).any(|w| w[0] > w[1])
        {
            return bad("indptr", "not monotone from 0 to the number of entries".into(), "rebuild it");
        }
        let nk = tk.div_ceil(self.block_k) as u32;
        for w in self.indptr.windows(2) {
            let r = &self.blocks[w[0]..w[1]];
            if r.windows(2).any(|p| p[0] >= p[1]) || r.last().is_some_and(|&x| x >= nk) {
                return bad("blocks", format!("{r:?}"), &format!("ascending, distinct, below {nk}"));
            }
        }
        if let Some(rows) = &self.rows {
            if rows.len() != self.blocks.len() {
                return bad("row masks", rows.len().to_string(), "one per entry");
            }
            if self.block_q > 64 {
                return bad("block_q", self.block_q.to_string(), "row masks need block_q of at most 64");
            }
        }
        Ok(())
    }
}

/// One [`HeadTable`] per (batch, query head), batch major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockTable {
    /// `batch * heads` tables.
    pub heads: Vec<HeadTable>,
}

/// Keys that each group of queries of one head visits, besides any block table.
///
/// A key later than a query (bottom-right causal alignment) is masked for that query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadKeys {
    /// Consecutive queries that share a list.
    pub group: usize,
    /// `indptr[g]..indptr[g+1]` are the keys of group g; length = groups + 1.
    pub indptr: Vec<usize>,
    /// Key positions, ascending within a group.
    pub keys: Vec<u32>,
}

impl HeadKeys {
    /// Lists from one `Vec` per query group (sorted and deduplicated here).
    pub fn from_lists(group: usize, lists: Vec<Vec<u32>>) -> Self {
        let t = HeadTable::from_lists(1, 1, lists);
        Self { group, indptr: t.indptr, keys: t.blocks }
    }

    /// Keys of query group `g`.
    pub fn row(&self, g: usize) -> &[u32] {
        &self.keys[self.indptr[g]..self.indptr[g + 1]]
    }

    /// Check the lists against a problem of `tq` queries and `tk` keys.
    pub fn check(&self, tq: usize, tk: usize) -> Result<()> {
        // The same invariants as a table of 1-key blocks.
        let as_table = HeadTable {
            block_q: self.group,
            block_k: 1,
            indptr: self.indptr.clone(),
            blocks: self.keys.clone(),
            rows: None,
        };
        as_table.check(tq, tk)
    }
}

/// One [`HeadKeys`] per (batch, query head), batch major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyLists {
    /// `batch * heads` lists.
    pub heads: Vec<HeadKeys>,
}
