//! The offline search of static patterns on heads whose attention is known by construction: a video of 3 frames of 16 × 16.

use foveal::Spec;
use foveal::sparse::search::{Judged, cheapest, table};
use foveal::sparse::{Grid, HeadProblem, Mat, paroattention, sparse_vdit};

const GRID: Grid = Grid { first: 0, t: 3, h: 16, w: 16 };
const D: usize = 64;

/// Queries and keys of a head in which token i attends to those j with key(j) = query(i), of D classes.
struct Head {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Head {
    fn new(query: impl Fn(usize) -> usize, key: impl Fn(usize) -> usize) -> Self {
        let n = GRID.tokens();
        let marked = |of: &dyn Fn(usize) -> usize, gain: f32| -> Vec<f32> {
            (0..n * D).map(|x| if of(x / D) == x % D { gain } else { 0.0 }).collect()
        };
        let v = (0..n * D).map(|x| ((x * 2_654_435_761) % 1009) as f32 / 504.5 - 1.0).collect();
        Self { q: marked(&query, 30.0), k: marked(&key, 1.0), v }
    }

    fn judge(&self, specs: impl Fn(&HeadProblem) -> Vec<Spec>) -> (Vec<Spec>, Vec<Judged>) {
        let n = GRID.tokens();
        let m = |x| Mat::new(x, n, D, D);
        let p = HeadProblem { causal: false, grid: Some(GRID), ..HeadProblem::new(m(&self.q), m(&self.k), 1.0) };
        let specs = specs(&p);
        let judged = table(&p, &m(&self.v), &specs).expect("a search");
        (specs, judged)
    }
}

#[test]
fn each_head_gets_the_pattern_that_it_was_made_with() {
    let frame = GRID.frame();
    let heads = [
        ("diagonal", Head::new(|i| i / 12, |j| j / 12)),
        ("multi-diagonal", Head::new(|i| i % frame / 4, |j| j % frame / 4)),
        ("stripe", Head::new(|_| 0, |j| usize::from(j >= frame))),
        ("full", Head::new(|_| 0, |_| 0)),
    ];
    for (pattern, head) in heads {
        let (specs, judged) = head.judge(|_| sparse_vdit::candidates());
        let best = cheapest(&judged, 0.05).expect("full is exact");
        assert_eq!(specs[best].params["pattern"], pattern, "{judged:?}");
        assert!(judged[best].error <= 0.05 && (pattern == "full" || judged[best].cost < 0.7), "{pattern}: {judged:?}");
        // A head that may be wrong altogether is left out.
        let skipped = cheapest(&judged, 1.1).expect("some pattern");
        assert_eq!((specs[skipped].params["pattern"].as_str(), judged[skipped].cost), (Some("skip"), 0.0));
    }
}

#[test]
fn the_order_that_makes_attention_block_shaped_is_found() {
    // Four places in a row attend to one another in all frames: in token order that is a block of every frame, with time last
    // they are neighbours.
    let frame = GRID.frame();
    let head = Head::new(|i| i % frame / 4, |j| j % frame / 4);
    let (specs, judged) = head.judge(|p| paroattention::candidates(p, 0.1, 64).expect("candidates"));
    let of = |order: &str| {
        let at = specs.iter().position(|s| s.params["order"] == order).expect("an order");
        judged[at]
    };
    assert!(of("hwt").error < 0.6 && of("thw").error > 0.8, "{judged:?}");
    assert!(judged.iter().all(|j| j.error >= of("hwt").error && j.cost < 0.15), "{judged:?}");
}
