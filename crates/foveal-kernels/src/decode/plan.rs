//! Equal shares of work, whatever the lengths: the units of work of all sequences and heads are laid end to
//! end and cut at equal distances, so that a share may end inside one head and the next begin there
//! (Sanovar et al. 2024, "Lean Attention", arXiv 2405.10480).

use std::ops::Range;

/// Least cost of a share, in bytes.
const SHARE: u128 = 256 << 10;
/// Fewest keys for each share on average: partial results are merged at a cost of their own.
const KEYS: usize = 1024;
/// Most shares.
const MOST: u128 = 256;
/// Shares end at multiples of so many keys of a job: whole tiles of keys.
const GRAIN: u128 = 16;

/// Keys of one job in a share: the job, and which of its keys.
pub(super) type Piece = (usize, Range<usize>);

/// Cut jobs of (keys, cost of a key) into shares. By the problem alone, not the number of threads, so that the
/// answer is too; there are enough of them for any machine, and a thread that is held up leaves more to others.
pub(super) fn shares(jobs: &[(usize, u64)]) -> Vec<Vec<Piece>> {
    let total: u128 = jobs.iter().map(|&(keys, cost)| keys as u128 * u128::from(cost.max(1))).sum();
    let keys: usize = jobs.iter().map(|&(keys, _)| keys.div_ceil(KEYS)).sum();
    let count = (total / SHARE).min(keys as u128).clamp(1, MOST);
    let mut shares: Vec<Vec<Piece>> = vec![Vec::new()];
    let (mut cut, mut start) = (1, 0u128);
    for (job, &(keys, cost)) in jobs.iter().enumerate() {
        let cost = u128::from(cost.max(1));
        let end = start + keys as u128 * cost;
        let mut from = 0;
        while cut < count && total * cut / count < end {
            let key = (total * cut / count).saturating_sub(start) / cost;
            let to = ((key + GRAIN / 2) / GRAIN * GRAIN).clamp(from as u128, keys as u128) as usize;
            push(&mut shares, job, from..to);
            shares.push(Vec::new());
            (from, cut) = (to, cut + 1);
        }
        push(&mut shares, job, from..keys);
        start = end;
    }
    shares.retain(|s| !s.is_empty());
    shares
}

fn push(shares: &mut [Vec<Piece>], job: usize, range: Range<usize>) {
    if let (false, Some(last)) = (range.is_empty(), shares.last_mut()) {
        last.push((job, range));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (Largest share / mean share) in cost, after checking that each key is in exactly one share, in order.
    fn unevenness(jobs: &[(usize, u64)]) -> f64 {
        let shares = shares(jobs);
        let mut next = vec![0; jobs.len()];
        for (job, range) in shares.iter().flatten() {
            assert_eq!(range.start, next[*job]);
            assert!(!range.is_empty());
            next[*job] = range.end;
        }
        assert!(next.iter().zip(jobs).all(|(n, j)| *n == j.0));
        let cost = |s: &Vec<Piece>| s.iter().map(|(j, r)| r.len() as u64 * jobs[*j].1).sum::<u64>() as f64;
        let costs: Vec<f64> = shares.iter().map(cost).collect();
        costs.iter().copied().fold(0.0, f64::max) * costs.len() as f64 / costs.iter().sum::<f64>().max(1.0)
    }

    #[test]
    fn shares_are_equal_however_skewed_the_lengths() {
        for cost in [136, 256, 512] {
            // One long sequence among short ones; lengths that double; all equal; one alone.
            let skewed: Vec<_> = (0..64).map(|i| (if i == 17 { 131_072 } else { 37 + i }, cost)).collect();
            let doubling: Vec<_> = (0..17).map(|i| (1 << i, cost)).collect();
            for jobs in [skewed, doubling, vec![(8192, cost); 3], vec![(1_000_000, cost)]] {
                let most = unevenness(&jobs);
                assert!(most < 1.05, "cost {cost}: {most}");
                assert!(shares(&jobs).len() >= 12);
            }
        }
        // Costs differ between jobs: shares are equal in cost, not in keys.
        assert!(unevenness(&[(65_536, 40), (65_536, 512), (3, 9), (65_536, 136)]) < 1.05);
    }

    #[test]
    fn little_work_stays_in_one_share() {
        assert_eq!(shares(&[(10, 512), (0, 7), (5, 512)]), [vec![(0, 0..10), (2, 0..5)]]);
        assert!(shares(&[]).is_empty());
        assert!(shares(&[(0, 1)]).is_empty());
        // Many rows on few keys: merging would cost more than it saves.
        assert_eq!(shares(&[(500, 1 << 20)]).len(), 1);
    }
}
