//! The kernels as they are usually compiled: what `resources.txt` keeps the registers, spills and shared memory of.

use crate::attend::{Path, Shape, hopper_tile};
use crate::compile::Spec;
use crate::tensor::Dtype;

/// Each with the architectures it is for.
pub fn shipped() -> Vec<(Spec, Vec<&'static str>)> {
    let both = || vec!["sm_80", "sm_90a"];
    let mut all = vec![(Spec::ceiling(), both())];
    let shape = |[d, dv]: [usize; 2]| Shape { batch: 1, heads: 1, kv_heads: 1, tq: 1, tk: 1, d, dv };
    let mut add = |path: Path, width, [masked, table, cap]: [bool; 3], dtype| {
        let spec = path.spec(&shape(width), dtype, masked, table, cap, true);
        all.push((spec, if matches!(path, Path::Hopper { .. }) { vec!["sm_90a"] } else { both() }));
    };
    let (dense, masked, table, cap) = ([false; 3], [true, false, false], [true, true, false], [true, false, true]);
    for width in [[64, 64], [96, 96], [128, 128], [192, 128], [256, 256]] {
        for what in [dense, masked] {
            if let Some(path) = hopper_tile(&shape(width), what[0], None) {
                add(path, width, what, Dtype::Bf16);
            }
        }
    }
    let tile = |keys| Path::Hopper { keys, turns: false };
    add(tile(128), [128, 128], table, Dtype::Bf16);
    add(tile(64), [128, 128], table, Dtype::Bf16);
    add(tile(128), [128, 128], cap, Dtype::Bf16);
    add(tile(176), [128, 128], dense, Dtype::F16);
    for d in [64, 128, 256] {
        add(Path::Warps, [d, d], masked, Dtype::Bf16);
    }
    add(Path::Warps, [128, 128], table, Dtype::F16);
    add(Path::Rows, [128, 128], dense, Dtype::Bf16);
    for d in [64, 128] {
        let backward = Spec::attend_backward_sm90().with("D", d);
        all.push((backward.clone(), vec!["sm_90a"]));
        all.push((backward.flag("MASK", true), vec!["sm_90a"]));
    }
    let decode = |d| Spec::decode().with("D", d).with("DV", d);
    for d in [64, 128] {
        all.push((decode(d), both()));
        all.push((decode(d).flag("INT8", true), both()));
    }
    all.push((decode(128).flag("INT8", true).flag("F16", true), both()));
    for (d, cluster) in [(64, 1), (128, 1), (128, 4)] {
        let recur = Spec::recur_sm90().with("D", d).with("CLUSTER", cluster);
        all.push((recur.clone(), vec!["sm_90a"]));
        all.push((recur.clone().flag("DECAY", true), vec!["sm_90a"]));
        if cluster == 1 {
            all.push((recur.flag("DECAY", true).flag("DELTA", true), vec!["sm_90a"]));
            all.push((Spec::recur_delta().with("D", d).flag("DECAY", true), both()));
        }
    }
    all
}
