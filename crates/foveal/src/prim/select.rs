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

/// Indices of the k largest entries, ascending by index. All of them if k ≥ len.
pub fn topk(x: &[f32], k: usize) -> Vec<u32> {
    let mut idx: Vec<u32> = (0..x.len() as u32).collect();
    if k == 0 {
        return Vec::new();
    }
    if k < idx.len() {
        idx.select_nth_unstable_by(k - 1, |&a, &b| order(x, a, b));
        idx.truncate(k);
        idx.sort_unstable();
    }
    idx
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
