//! Top-k and top-p selection. Ties go to the smaller index, NaN ranks below everything, so that
//! a selection is the same on every machine.

use std::cmp::Ordering;

fn order(x: &[f32], a: u32, b: u32) -> Ordering {
    let (p, q) = (x[a as usize], x[b as usize]);
    match (p.is_nan(), q.is_nan()) {
        (true, true) => a.cmp(&b),
        (true, false) => Ordering::Greater,
        (false, true) => Ordering::Less,
        _ => q.partial_cmp(&p).unwrap_or(Ordering::Equal).then(a.cmp(&b)),
    }
}

/// An integer that grows with x: NaN least, the zeros equal.
fn rank(x: f32) -> u32 {
    let bits = (x + 0.0).to_bits();
    // Negative numbers fall as their bits grow.
    let rank = bits ^ ((bits as i32 >> 31) as u32 | 1 << 31);
    if x.is_nan() { 0 } else { rank }
}

/// Indices of the k largest entries, ascending by index. All of them if k ≥ len.
pub fn topk(x: &[f32], k: usize) -> Vec<u32> {
    let mut out = Vec::with_capacity(k.min(x.len()));
    topk_into(x, k, &mut Vec::new(), &mut out);
    out
}

/// [`topk`] into `out`, whose contents are replaced; `ranks` is memory kept from call to call.
/// Linear time: the k-th largest rank is found, then all above it are taken in order.
pub fn topk_into(x: &[f32], k: usize, ranks: &mut Vec<u32>, out: &mut Vec<u32>) {
    out.clear();
    if k == 0 {
        return;
    }
    if k >= x.len() {
        out.extend(0..x.len() as u32);
        return;
    }
    ranks.clear();
    ranks.extend(x.iter().map(|&x| rank(x)));
    let at = x.len() - k;
    let least = *ranks.select_nth_unstable(at).1;
    // Entries equal to the least one taken: as many as there is room for, the first ones.
    let mut ties = ranks[at..].iter().filter(|&&r| r == least).count();
    // No branch to mispredict: every index is written, and stays if the next place is taken.
    out.resize(k + 1, 0);
    let mut n = 0;
    for (i, &x) in (0..).zip(x) {
        let r = rank(x);
        let tie = usize::from(r == least && ties > 0);
        ties -= tie;
        out[n] = i;
        n += usize::from(r > least) + tie;
    }
    out.truncate(k);
}

/// The fewest indices, largest entries first, whose sum reaches `p` times the sum of all
/// (non-negative) entries; ascending by index. At least one if there is any; all when p ≥ 1.
pub fn topp(x: &[f32], p: f32) -> Vec<u32> {
    if p >= 1.0 {
        return (0..x.len() as u32).collect();
    }
    let total: f64 = x.iter().map(|&v| f64::from(v)).sum();
    let mut idx: Vec<u32> = (0..x.len() as u32).collect();
    idx.sort_unstable_by(|&a, &b| order(x, a, b));
    let goal = total * f64::from(p);
    let mut sum = 0f64;
    let mut n = 0;
    for &i in &idx {
        sum += f64::from(x[i as usize]);
        n += 1;
        if sum >= goal {
            break;
        }
    }
    idx.truncate(n);
    idx.sort_unstable();
    idx
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topk_breaks_ties_low_and_ranks_nan_last() {
        assert_eq!(topk(&[1.0, 3.0, 3.0, f32::NAN, 2.0], 2), [1, 2]);
        assert_eq!(topk(&[1.0, 3.0, 3.0, f32::NAN, 2.0], 4), [0, 1, 2, 4]);
        assert_eq!(topk(&[5.0, 5.0, 5.0], 1), [0]);
        assert_eq!(topk(&[1.0], 9), [0]);
        assert!(topk(&[1.0], 0).is_empty());
        assert_eq!(topk(&[-0.0, f32::NEG_INFINITY, 0.0, -1.0, f32::NAN, -0.0], 2), [0, 2]);
        assert_eq!(topk(&[f32::INFINITY, f32::MIN, -1e-40, f32::NEG_INFINITY, f32::NAN], 4), [0, 1, 2, 3]);
    }

    #[test]
    fn topp_takes_the_fewest_that_reach_the_mass() {
        let x = [0.125, 0.5, 0.125, 0.25];
        assert_eq!(topp(&x, 0.5), [1]);
        assert_eq!(topp(&x, 0.51), [1, 3]);
        assert_eq!(topp(&x, 0.95), [0, 1, 2, 3]);
        assert_eq!(topp(&x, 1.0), [0, 1, 2, 3]);
        assert_eq!(topp(&[0.0, 0.0], 0.5), [0]);
    }
}
