//! Promises of the sparse prefill systems, on problems of awkward shapes.

use candle_core::{Device, Tensor};
use foveal::prim::{AttendOptions, attend, attend_selected};
use foveal::sparse::mask::{dense_mask, density, is_disjoint};
use foveal::sparse::run::NO_LAYER;
use foveal::sparse::{HeadProblem, HeadSelection, Mat, Precision, minference};
use foveal::{Slot, Spec, System, Work, registry};

/// Rows (n, d) with a sink, a few loud keys and slow drift; the same for every prefix.
fn rows(n: usize, d: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let mut out = Vec::with_capacity(n * d);
    for i in 0..n {
        let loud = if i < 3 || i % 97 == 41 { 2.0 } else { 0.0 };
        for c in 0..d {
            out.push(1.5 * noise() + loud + 0.7 * ((i / 19 + 3 * c) as f32).sin());
        }
    }
    out
}

struct Case {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    tq: usize,
    tk: usize,
    d: usize,
}

impl Case {
    fn new(tq: usize, tk: usize, d: usize) -> Self {
        Self { q: rows(tq, d, 7), k: rows(tk, d, 8), v: rows(tk, d, 9), tq, tk, d }
    }
    fn problem(&self) -> HeadProblem<'_> {
        let (q, k) = (Mat::new(&self.q, self.tq, self.d, self.d), Mat::new(&self.k, self.tk, self.d, self.d));
        HeadProblem::new(q, k, 1.0 / (self.d as f32).sqrt())
    }
    fn select(&self, spec: &str) -> (HeadSelection, Work) {
        let spec: Spec = spec.parse().expect("a spec");
        match registry::build(&spec, Slot::Prefill) {
            Ok(System::Selector(s)) => s.select(&self.problem()).expect("a selection"),
            Ok(_) => panic!("{spec} is no selector"),
            Err(e) => panic!("{spec}: {e}"),
        }
    }
    fn tensors(&self) -> (Tensor, Tensor, Tensor) {
        let t = |x: &[f32], n| Tensor::from_slice(x, (1, 1, n, self.d), &Device::Cpu).expect("a tensor");
        (t(&self.q, self.tq), t(&self.k, self.tk), t(&self.v, self.tk))
    }
    fn output(&self, selection: Option<HeadSelection>) -> Vec<f32> {
        let (q, k, v) = self.tensors();
        let o = AttendOptions::causal();
        let a = match selection {
            Some(s) => attend_selected(&q, &k, &v, &o, vec![s]),
            None => attend(&q, &k, &v, &o, None),
        };
        a.and_then(|a| Ok(a.out.flatten_all()?.to_vec1()?)).expect("attention")
    }
}

/// Every system at sizes small enough to leave something out of a few hundred keys.
const SMALL: [&str; 20] = [
    "minference:max_share=0.2,sinks=3,recent=9,last_q=20,block_size=16",
    "minference:pattern=a-shape,init=9,local=30,block_size=16",
    "minference:pattern=block-sparse,max_share=0.2,block_size=16",
    "xattention:block_size=32,threshold=0.7",
    "hip-attention:k=32,block_size_q=16,window=20,sinks=5",
    "moba:block_size=32,topk=2",
    "anchorattention:block_size=16,step=3,theta=1",
    "anchorattention:block_size=16,step=1,theta=1,init_blocks=0",
    "s2-attention:block_size=16,local_blocks=2,vert_stride=3",
    "dhsa:topk=48,block_size=16,local=24,global=8,dense_last=0,min_chunk=3,max_chunk=9,window=4",
    "routing-transformer:clusters=9,iterations=3,local=20",
    "sale:threshold=0.3,block_q=16,block_k=8,sinks=8,local=20",
    "superlinear:spans=2,window_index=3,backward=2,forward=1,block_k=4",
    "fused-neighborhood-attention:window=15,dilation=3",
    "generalized-neighborhood-attention:window=40",
    "generalized-neighborhood-attention:window=30,stride=8",
    "moa-sparse:alpha=32,beta=0.1,block_size=16,sinks=5",
    "pixelfly:block_size=16",
    "seerattention:block_size=16,topk=4",
    "seerattention:block_size=16,threshold=0.05",
];

const SHAPES: [(usize, usize); 10] =
    [(1, 1), (5, 5), (63, 63), (64, 64), (129, 129), (300, 300), (1, 300), (37, 300), (64, 192), (130, 257)];

#[test]
fn selections_fit_the_problem_see_their_own_key_and_are_disjoint() {
    for (tq, tk) in SHAPES {
        let case = Case::new(tq, tk, 12);
        for spec in SMALL.iter().chain(&[
            "minference",
            "xattention",
            "hip-attention",
            "moba",
            "anchorattention",
            "s2-attention",
            "dhsa",
            "routing-transformer",
            "sale",
            "superlinear",
            "superlinear:window_index=0,spans=0,block_q=64,block_k=1",
            "dhsa:topk=0,block_size=5,local=5,global=0,min_chunk=1,max_chunk=1",
            "seerattention",
        ]) {
            let (s, work) = case.select(spec);
            s.check(tq, tk).unwrap_or_else(|e| panic!("{spec} ({tq}, {tk}): {e}"));
            assert!(is_disjoint(&s, tq, tk, true), "{spec} ({tq}, {tk})");
            assert_eq!((work.pairs, work.tiles), (0, 0), "{spec}: an estimate is not attention");
            let mask = dense_mask(&s, tq, tk, true);
            for i in 0..tq {
                assert_eq!(mask[i * tk + tk - tq + i], 1, "{spec} ({tq}, {tk}): query {i} misses its own key");
            }
            assert_eq!(case.select(spec), (s, work), "{spec}: not repeatable");
        }
    }
}

#[test]
fn small_settings_leave_something_out() {
    let case = Case::new(300, 300, 12);
    for spec in SMALL {
        let share = density(&case.select(spec).0, 300, 300, true);
        assert!((0.05..0.9).contains(&share), "{spec}: density {share}");
    }
}

#[test]
fn full_budgets_are_exact() {
    let full = [
        "minference:vertical_size=1000000000,max_share=1",
        "minference:slash_size=0.9999999,block_size=16",
        "minference:pattern=dense",
        "minference:pattern=a-shape,local=1000000",
        "minference:pattern=block-sparse,blocks=1000000,max_share=1",
        "xattention:threshold=1",
        "hip-attention:k=1000000",
        "moba:topk=1000000",
        "anchorattention:theta=1000000",
        "anchorattention:theta=1000000,block_size=16,step=2",
        "s2-attention:vert_stride=1",
        "s2-attention:block_size=16,local_blocks=1000000",
        "dhsa:topk=1000000",
        "dhsa:topk=0,local=64,dense_last=1000000",
        "routing-transformer:clusters=1",
        "routing-transformer:clusters=5,local=1000000",
        "sale:threshold=0",
        "superlinear:spans=1000000,window_index=1",
        "superlinear:spans=1000000,window_index=2,backward=2,forward=0,block_k=1,block_q=33",
        "fused-neighborhood-attention:window=0",
        "generalized-neighborhood-attention:window=100000,stride=7",
        "moa-sparse:beta=1",
        "moa-sparse:alpha=100000,beta=0,block_size=16",
        "pixelfly:block_size=16,global_blocks=100000",
        "seerattention:threshold=0",
        "seerattention:block_size=16,topk=1000000",
    ];
    for (tq, tk) in SHAPES {
        let case = Case::new(tq, tk, 12);
        let exact = case.output(None);
        for spec in full {
            let (s, _) = case.select(spec);
            assert_eq!(density(&s, tq, tk, true), 1.0, "{spec} ({tq}, {tk})");
            for (a, b) in case.output(Some(s)).iter().zip(&exact) {
                assert!((a - b).abs() < 1e-5, "{spec} ({tq}, {tk}): {a} for {b}");
            }
        }
    }
}

#[test]
fn the_first_layers_of_hip_attention_stay_dense() {
    let case = Case::new(300, 300, 12);
    let share = |layer: usize, spec: &str| {
        let Ok(System::Selector(s)) = registry::build(&spec.parse().expect("a spec"), Slot::Prefill) else {
            panic!("{spec} is no selector")
        };
        let (selection, _) = s.select(&HeadProblem { layer, ..case.problem() }).expect("a selection");
        density(&selection, 300, 300, true)
    };
    let small = "hip-attention:k=32,block_size_q=16,window=20,sinks=5";
    assert_eq!([share(0, small), share(2, small)], [1.0, 1.0]);
    assert!(share(3, small) < 0.9 && share(NO_LAYER, small) < 0.9);
    assert!(share(0, &format!("{small},dense_layers=0")) < 0.9);
}

#[test]
fn a_prefix_selects_the_prefix() {
    // (system, unit of queries in which it is causal)
    let units = [
        ("xattention:block_size=32,threshold=0.7", 32),
        ("hip-attention:k=32,block_size_q=16,window=20,sinks=5", 16),
        ("moba:block_size=32,topk=2", 1),
        ("moba:block_size=32,topk=3,block_q=64", 1),
        ("anchorattention:block_size=16,step=3,theta=1", 48),
        ("superlinear:spans=2,window_index=3", 1),
        ("fused-neighborhood-attention:window=15,dilation=3", 1),
        ("generalized-neighborhood-attention:window=40", 1),
        ("pixelfly:block_size=16", 1),
        ("seerattention:block_size=16,topk=4", 16),
    ];
    let whole = Case::new(300, 300, 12);
    for (spec, unit) in units {
        let mask = dense_mask(&whole.select(spec).0, 300, 300, true);
        for cut in [1, 31, 64, 77, 160, 299].map(|n: usize| n.next_multiple_of(unit)).into_iter().filter(|&n| n < 300) {
            let part = Case::new(cut, cut, 12);
            let got = dense_mask(&part.select(spec).0, cut, cut, true);
            for i in 0..cut {
                assert_eq!(got[i * cut..(i + 1) * cut], mask[i * 300..i * 300 + cut], "{spec} cut at {cut}, query {i}");
            }
        }
    }
}

#[test]
fn chunks_aligned_to_the_blocks_select_as_the_whole() {
    let systems = [
        ("xattention:block_size=32,threshold=0.7", 32),
        ("hip-attention:k=32,block_size_q=16,window=20,sinks=5", 16),
        ("moba:block_size=32,topk=2", 1),
        ("anchorattention:block_size=16,step=3,theta=1", 48),
        ("superlinear:spans=2,window_index=3,block_k=4", 1),
        ("generalized-neighborhood-attention:window=30,stride=8", 1),
        ("moa-sparse:alpha=32,beta=0.1,block_size=16,sinks=5", 1),
        ("pixelfly:block_size=16", 1),
        ("seerattention:block_size=16,topk=4", 16),
    ];
    let n = 300;
    let whole = Case::new(n, n, 12);
    for (spec, unit) in systems {
        let mask = dense_mask(&whole.select(spec).0, n, n, true);
        let at = 100usize.next_multiple_of(unit);
        let chunk = Case { q: whole.q[at * 12..].to_vec(), tq: n - at, ..Case::new(n, n, 12) };
        assert_eq!(dense_mask(&chunk.select(spec).0, n - at, n, true), mask[at * n..], "{spec} from query {at}");
    }
}

#[test]
fn strided_rows_select_as_contiguous_ones() {
    let (n, d, stride) = (200, 12, 40);
    let case = Case::new(n, n, d);
    let spread = |x: &[f32]| {
        let mut out = vec![f32::NAN; n * stride];
        for i in 0..n {
            out[i * stride..i * stride + d].copy_from_slice(&x[i * d..(i + 1) * d]);
        }
        out
    };
    let (q, k) = (spread(&case.q), spread(&case.k));
    for spec in SMALL {
        let Ok(System::Selector(s)) = registry::build(&spec.parse().expect("a spec"), Slot::Prefill) else {
            panic!("{spec} is no selector")
        };
        let (q, k) = (Mat::new(&q, n, d, stride), Mat::new(&k, n, d, stride));
        assert_eq!(
            s.select(&HeadProblem { q, k, ..case.problem() }).expect("a selection"),
            case.select(spec),
            "{spec}"
        );
    }
}

#[test]
fn bf16_estimates_choose_nearly_the_same() {
    // Rounding may turn decisions that are close; where it turns many, a product is wrong.
    for (tq, tk) in [(300, 300), (37, 300), (130, 257)] {
        let case = Case::new(tq, tk, 12);
        for spec in SMALL {
            let Ok(System::Selector(s)) = registry::build(&spec.parse().expect("a spec"), Slot::Prefill) else {
                panic!("{spec} is no selector")
            };
            let p = HeadProblem { precision: Precision::Bf16, ..case.problem() };
            let (rounded, work) = s.select(&p).expect("a selection");
            let (exact, plain) = case.select(spec);
            let (a, b) = (dense_mask(&rounded, tq, tk, true), dense_mask(&exact, tq, tk, true));
            let differ = a.iter().zip(&b).filter(|(a, b)| a != b).count();
            let seen = b.iter().filter(|&&x| x == 1).count();
            assert!(differ * 20 < seen, "{spec} ({tq}, {tk}): {differ} of {seen} pairs differ");
            assert!(is_disjoint(&rounded, tq, tk, true), "{spec} ({tq}, {tk})");
            // The search of a tree goes where its decisions lead; all other work is the same.
            if !spec.starts_with("hip") {
                assert_eq!(work, plain, "{spec} ({tq}, {tk})");
            }
        }
    }
}

#[test]
fn block_q_of_moba_changes_no_result() {
    let case = Case::new(300, 300, 12);
    let masks: Vec<Vec<u8>> = [1, 7, 16, 64]
        .map(|b| dense_mask(&case.select(&format!("moba:block_size=32,topk=3,block_q={b}")).0, 300, 300, true))
        .into();
    assert!(masks.windows(2).all(|w| w[0] == w[1]));
}

#[test]
fn work_of_the_estimates_is_what_their_formulas_say() {
    let (n, d) = (512usize, 16usize);
    let case = Case::new(n, n, d);
    let flops = |spec: &str| case.select(spec).1.flops as usize;
    // xattention: for the two blocks of queries that end at e, 2·(block/S) × (e/S) products over S·D,
    // and four flops for each causal tile: difference, exponential and two sums.
    let (b, s) = (2 * 128, 8);
    let products: usize = (1..=n / b).map(|i| 2 * (b / s) * (i * b / s) * (s * d)).sum();
    let tiles = (n / s) * (n / s + 1) / 2;
    assert_eq!(flops("xattention"), products + 4 * tiles);
    // moba: sums and scaling of the past blocks' means, then the gate of every query that has
    // more past blocks than it may choose, in products of 128 queries.
    let past = (n - 1) / 64;
    let gate: usize = (128..n).step_by(128).map(|r| 2 * 128 * ((r + 127) / 64) * d).sum();
    assert_eq!(flops("moba:block_size=64,topk=2"), past * 65 * d + gate);
    // minference a-shape and dense estimate nothing.
    assert_eq!(flops("minference:pattern=a-shape"), 0);
    // hip-attention: without a past longer than k there is no search.
    assert_eq!(flops("hip-attention"), 0);
}

#[test]
fn linear_claims_hold_on_counters() {
    let d = 8;
    let pairs = |spec: &str, n: usize| {
        let case = Case::new(n, n, d);
        let (s, w) = case.select(spec);
        (foveal::sparse::mask::pairs(&s, n, n, true) as f64, w.flops as f64)
    };
    for spec in ["hip-attention:k=32,window=32,sinks=4", "moba:block_size=32,topk=3"] {
        let (a, b) = (pairs(spec, 2048), pairs(spec, 4096));
        assert!(b.0 / a.0 < 2.1, "{spec}: pairs grow {}", b.0 / a.0);
    }
    let (a, b) =
        (pairs("hip-attention:k=32,window=32,sinks=4", 2048), pairs("hip-attention:k=32,window=32,sinks=4", 4096));
    // T log(T/k) grows by 2 · 7/6.
    assert!(b.1 / a.1 < 2.5, "search grows {}", b.1 / a.1);
}

#[test]
fn parameters_are_checked() {
    for bad in [
        "xattention:block_size=100",
        "xattention:threshold=1.5",
        "hip-attention:k=7",
        "hip-attention:block_stride_q=0",
        "moba:block_q=65",
        "moba:topk=0",
        "anchorattention:step=0",
        "minference:pattern=diagonal",
        "minference:max_share=2",
        "minference:slash_size=-1",
        "dhsa:local=3",
        "dhsa:min_chunk=0",
        "routing-transformer:local=0",
        "sale:threshold=-1",
        "superlinear:backward=-2",
        "dilated-neighborhood-attention:window=many",
        "fused-neighborhood-attention:dilation=0",
        "generalized-neighborhood-attention:stride=17",
        "generalized-neighborhood-attention:tile=9;9",
        "generalized-neighborhood-attention:causal_axes=x",
        "halonet:block_size=0",
        "lrgt:groups=0",
        "moa-sparse:beta=2",
        "paroattention:order=whw",
        "paroattention:mask=12",
        "pixelfly:block_size=0",
        "radial-attention:decay=0",
        "sparse-vdit:width=-1",
    ] {
        let spec: Spec = bad.parse().expect("a spec");
        let name = bad.split([':', '=']).nth(1).expect("a name");
        match registry::build(&spec, Slot::Prefill) {
            Ok(_) => panic!("{bad} was taken"),
            Err(e) => assert!(e.to_string().contains(name), "{bad}: {e}"),
        }
    }
}

#[test]
fn search_keeps_the_budget_and_returns_the_nearest_candidate() {
    // A head whose queries look at the first keys and at what is near: a-shape by construction.
    let (n, d) = (1024, 16);
    let mut case = Case::new(n, n, d);
    for i in 0..n {
        let row = |x: &mut Vec<f32>, at: usize, f: &dyn Fn(usize) -> f32| {
            (0..d).for_each(|c| x[at * d + c] = f(c));
        };
        // Position on a circle that turns once in 2048 tokens: near keys score high.
        let angle = i as f32 * std::f32::consts::TAU / 2048.0;
        let place = move |c: usize| {
            if c == 0 {
                9.0 * angle.cos()
            } else if c == 1 {
                9.0 * angle.sin()
            } else {
                0.0
            }
        };
        row(&mut case.q, i, &move |c| place(c) + if c == 2 { 6.0 } else { 0.0 });
        row(&mut case.k, i, &move |c| place(c) + if c == 2 && i < 8 { 13.0 } else { 0.0 });
    }
    let v = Mat::new(&case.v, n, d, d);
    let options = minference::SearchOptions { budget: 0.4, ..Default::default() };
    let found = minference::search(&case.problem(), &v, &options).expect("a search");
    assert!(found.tried.len() >= 3);
    assert!(found.tried.iter().any(|c| c.config.pattern == minference::Pattern::BlockSparse));
    assert!(found.tried.iter().all(|c| c.error.is_finite() && c.cost > 0.0));
    let within = found.tried.iter().filter(|c| c.cost <= 0.42);
    assert!(within.clone().all(|c| c.error >= found.best.error), "{found:?}");
    assert!(found.best.cost <= 0.42, "{found:?}");
    // A limit that no pattern meets leaves the head dense; an infinite one takes the best of them.
    let limit = |max_error| {
        let options = minference::SearchOptions { max_error, ..options.clone() };
        minference::search(&case.problem(), &v, &options).expect("a search")
    };
    let dense = limit(found.best.error / 2.0);
    assert_eq!((dense.best.config.pattern, dense.best.cost), (minference::Pattern::Dense, 1.0));
    assert_eq!(dense.tried, found.tried);
    assert_eq!(limit(f64::INFINITY).best, found.tried[0]);
    // The plan's spelling builds the same system.
    let spec = found.best.config.spec().to_string();
    let (a, _) = case.select(&spec);
    let b = foveal::sparse::Selector::select(&found.best.config, &case.problem()).expect("a selection").0;
    assert_eq!(a, b, "{spec}");
    let error = {
        let (got, exact) = (case.output(Some(a)), case.output(None));
        let norm = |f: &dyn Fn(usize) -> f32| (0..got.len()).map(|i| f64::from(f(i)).powi(2)).sum::<f64>().sqrt();
        norm(&|i| got[i] - exact[i]) / norm(&|i| exact[i])
    };
    assert!((error - found.best.error).abs() < 1e-4, "{error} for {}", found.best.error);
}
