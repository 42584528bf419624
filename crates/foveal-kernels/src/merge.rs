//! Combine partial attention results over disjoint key sets.

/// Fold the partial `(o, lse)` of one row into `(acc, acc_lse)`, both over disjoint keys:
/// weights e^{lse − max}, natural log. A part with lse = −∞ saw no key and adds nothing.
pub fn merge_row(acc: &mut [f32], acc_lse: &mut f32, o: &[f32], lse: f32) {
    if lse == f32::NEG_INFINITY {
        return;
    }
    if *acc_lse == f32::NEG_INFINITY {
        acc.copy_from_slice(o);
        *acc_lse = lse;
        return;
    }
    let top = acc_lse.max(lse);
    let (wa, wb) = ((*acc_lse - top).exp(), (lse - top).exp());
    let sum = wa + wb;
    let (wa, wb) = (wa / sum, wb / sum);
    for (a, b) in acc.iter_mut().zip(o) {
        *a = *a * wa + *b * wb;
    }
    *acc_lse = top + sum.ln();
}
