//! The judgement on a system at a length, and where it would begin to pay.
//!
//! A prefill system is judged on the prompt's time; a cache policy on decoding speed and bytes;
//! a combination on all three. Quality comes first: a system that loses more than
//! [`PPL_LOSS_PERCENT`] or [`NEEDLE_LOSS`] is never said to pay.

use crate::results::{Role, Row, SystemInfo};
use serde::{Deserialize, Serialize};

/// A ratio of times below this counts as faster: 5% is beyond the noise of repeats on a quiet machine.
pub const FASTER: f64 = 0.95;
/// A prompt density above this is dense attention over again, whatever the clock says.
pub const FEWER: f64 = 0.98;
/// A ratio of bytes below this counts as smaller.
pub const SMALLER: f64 = 0.95;
/// Perplexity may rise by this much, in percent of dense's.
pub const PPL_LOSS_PERCENT: f64 = 2.0;
/// Passkeys that may be lost of those that dense finds: one trial is within what a changed
/// rounding can do.
pub const NEEDLE_LOSS: usize = 1;
/// Crossovers beyond this many tokens are "none in sight".
pub const CROSSOVER_LIMIT: f64 = (1u64 << 20) as f64;

/// The judgement on one system at one length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Verdict {
    /// Dense itself.
    Reference,
    /// Faster or smaller within the stated loss.
    Pays {
        /// What was gained.
        gains: Vec<String>,
    },
    /// Neither faster nor smaller here.
    NoGain {
        /// Where it would begin to be faster.
        crossover: Crossover,
    },
    /// More than the stated loss.
    LosesQuality {
        /// What was lost.
        lost: Vec<String>,
        /// What was gained for it; may be empty.
        gains: Vec<String>,
    },
    /// It could not be run.
    Failed {
        /// Why.
        reason: String,
    },
}

impl Verdict {
    /// One or two words for tables.
    pub fn short(&self) -> &'static str {
        match self {
            Verdict::Reference => "reference",
            Verdict::Pays { .. } => "pays",
            Verdict::NoGain { .. } => "no gain",
            Verdict::LosesQuality { .. } => "loses quality",
            Verdict::Failed { .. } => "failed",
        }
    }

    /// A sentence without a full stop.
    pub fn long(&self) -> String {
        match self {
            Verdict::Reference => "the reference".into(),
            Verdict::Pays { gains } => format!("pays: {}", gains.join(", ")),
            Verdict::NoGain { crossover } => format!("no gain at this length ({crossover})"),
            Verdict::LosesQuality { lost, gains } if gains.is_empty() => {
                format!("loses quality ({}) and gains nothing here", lost.join(", "))
            }
            Verdict::LosesQuality { lost, gains } => {
                format!("loses quality ({}) for {}", lost.join(", "), gains.join(", "))
            }
            Verdict::Failed { reason } => format!("failed: {reason}"),
        }
    }
}

/// Where the fitted times of a system fall below dense's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "tokens", rename_all = "kebab-case")]
pub enum Crossover {
    /// At about this many tokens.
    At(u64),
    /// The times are within noise of each other at this length.
    Here,
    /// Not below [`CROSSOVER_LIMIT`].
    NoneInSight,
    /// Too few lengths to fit.
    Unknown,
}

impl std::fmt::Display for Crossover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Crossover::At(t) => write!(f, "crossover estimated near {} tokens", thousands(*t)),
            Crossover::Here => f.write_str("about break-even here"),
            Crossover::NoneInSight => f.write_str("no crossover in sight below 1M tokens"),
            Crossover::Unknown => f.write_str("crossover unknown: measure at two lengths or more"),
        }
    }
}

/// 12345 as 12,345.
pub fn thousands(n: u64) -> String {
    let s = n.to_string();
    let mut out = String::new();
    for (i, c) in s.chars().enumerate() {
        if i > 0 && (s.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// t(T) = a + b·T + c·T², each at least 0.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Curve {
    /// Seconds at no tokens.
    pub a: f64,
    /// Seconds a token.
    pub b: f64,
    /// Seconds a token squared.
    pub c: f64,
}

impl Curve {
    /// Seconds at `t` tokens.
    pub fn at(&self, t: f64) -> f64 {
        self.a + t * (self.b + t * self.c)
    }

    /// The curve through measured (tokens, seconds) with the least squared relative error among
    /// those without negative coefficients; `terms` names the powers allowed. Every subset of
    /// the powers is solved exactly, so the answer is the constrained optimum.
    pub fn fit(points: &[(f64, f64)], terms: [bool; 3]) -> Option<Curve> {
        let points: Vec<(f64, f64)> = points.iter().copied().filter(|p| p.0 > 0.0 && p.1 > 0.0).collect();
        let mut best: Option<(f64, [f64; 3])> = None;
        for mask in 1..8usize {
            let powers: Vec<usize> = (0..3).filter(|p| mask >> p & 1 == 1).collect();
            if powers.len() > points.len() || powers.iter().any(|&p| !terms[p]) {
                continue;
            }
            // Rows are divided by the measured time, so each point counts by its relative error.
            let n = powers.len();
            let mut m = vec![vec![0f64; n + 1]; n];
            for &(t, s) in &points {
                let row: Vec<f64> = powers.iter().map(|&p| t.powi(p as i32) / s).collect();
                for i in 0..n {
                    for j in 0..n {
                        m[i][j] += row[i] * row[j];
                    }
                    m[i][n] += row[i];
                }
            }
            let Some(x) = solve(m) else { continue };
            if x.iter().any(|&v| v < 0.0) {
                continue;
            }
            let mut k = [0f64; 3];
            for (&p, v) in powers.iter().zip(x) {
                k[p] = v;
            }
            let curve = Curve { a: k[0], b: k[1], c: k[2] };
            let cost: f64 = points.iter().map(|&(t, s)| (curve.at(t) / s - 1.0).powi(2)).sum();
            if best.is_none_or(|(c, _)| cost < c - 1e-15) {
                best = Some((cost, k));
            }
        }
        best.map(|(_, [a, b, c])| Curve { a, b, c })
    }

    /// The shortest length above `from` from which this curve lies below `dense`.
    pub fn crossover(&self, dense: &Curve, from: f64) -> Crossover {
        // d(T) = dense − this; the first T > from where d turns positive.
        let (a, b, c) = (dense.a - self.a, dense.b - self.b, dense.c - self.c);
        let d = |t: f64| a + t * (b + t * c);
        let mut roots = Vec::new();
        if c != 0.0 {
            let disc = b * b - 4.0 * a * c;
            if disc >= 0.0 {
                // The form that does not cancel.
                let q = -0.5 * (b + b.signum() * disc.sqrt());
                roots.push(q / c);
                if q != 0.0 {
                    roots.push(a / q);
                }
            }
        } else if b != 0.0 {
            roots.push(-a / b);
        }
        roots.sort_by(f64::total_cmp);
        if d(from) > 0.0 {
            return Crossover::Here;
        }
        match roots.into_iter().find(|&r| r > from && d(r * 1.001 + 1.0) > 0.0) {
            Some(r) if r <= CROSSOVER_LIMIT => Crossover::At(round2(r)),
            _ => Crossover::NoneInSight,
        }
    }
}

/// Two significant digits: an estimate should not look sharper than it is.
fn round2(x: f64) -> u64 {
    let step = 10f64.powf(x.log10().floor() - 1.0).max(1.0);
    ((x / step).round() * step) as u64
}

/// Gauss with pivoting on an augmented matrix; `None` if it is singular.
fn solve(mut m: Vec<Vec<f64>>) -> Option<Vec<f64>> {
    let n = m.len();
    // Columns differ by many orders of magnitude (1, T, T²): scale them first.
    let scale: Vec<f64> = (0..n).map(|j| m[j][j].sqrt()).collect();
    if scale.contains(&0.0) {
        return None;
    }
    for i in 0..n {
        for j in 0..n {
            m[i][j] /= scale[i] * scale[j];
        }
        m[i][n] /= scale[i];
    }
    for col in 0..n {
        let p = (col..n).max_by(|&x, &y| m[x][col].abs().total_cmp(&m[y][col].abs()))?;
        if m[p][col].abs() < 1e-12 {
            return None;
        }
        m.swap(col, p);
        for r in 0..n {
            if r != col {
                let f = m[r][col] / m[col][col];
                for j in col..=n {
                    m[r][j] -= f * m[col][j];
                }
            }
        }
    }
    Some((0..n).map(|i| m[i][n] / m[i][i] / scale[i]).collect())
}

/// Fitted whole-prompt times.
pub fn prefill_curve(points: &[(f64, f64)]) -> Option<Curve> {
    // With two lengths a constant cannot be told from a slope.
    (points.len() >= 2).then(|| Curve::fit(points, [points.len() > 2, true, true])).flatten()
}

/// Fitted times of one decode step: linear in the depth.
pub fn decode_curve(points: &[(f64, f64)]) -> Option<Curve> {
    (points.len() >= 2).then(|| Curve::fit(points, [true, true, false])).flatten()
}

/// The judgement on `row` given dense's row at the same length, all rows of the system and of
/// dense over the lengths.
pub fn judge(info: &SystemInfo, row: &Row, dense: &Row, own: &[&Row], dense_rows: &[&Row]) -> Verdict {
    if info.role == Role::Dense {
        return Verdict::Reference;
    }
    if let Verdict::Failed { .. } = row.verdict {
        return row.verdict.clone();
    }
    let on_prompt = matches!(info.role, Role::Prefill | Role::Both);
    let on_store = matches!(info.role, Role::Cache | Role::Both);
    let mut gains = Vec::new();
    // Who visits all that dense visits runs the same kernel: a better time is noise.
    if on_prompt && row.prefill.ratio <= FASTER && row.prefill.density <= FEWER {
        gains.push(format!("prompt {:.2} times as fast", 1.0 / row.prefill.ratio));
    }
    if on_store && row.decode.ratio >= 1.0 / FASTER {
        gains.push(format!("decode {:.2} times as fast", row.decode.ratio));
    }
    if on_store && row.bytes.ratio <= SMALLER {
        gains.push(format!("{:.0}% of the bytes", row.bytes.ratio * 100.0));
    }
    let mut lost = Vec::new();
    match &row.ppl {
        Some(p) if p.percent > PPL_LOSS_PERCENT => lost.push(format!("perplexity +{:.1}%", p.percent)),
        _ => {}
    }
    if let (Some(n), Some(d)) = (&row.needle, &dense.needle)
        && n.hits() + NEEDLE_LOSS < d.hits()
    {
        lost.push(format!("needles {}/{} where dense finds {}", n.hits(), n.trials.len(), d.hits()));
    }
    if !lost.is_empty() {
        return Verdict::LosesQuality { lost, gains };
    }
    if !gains.is_empty() {
        return Verdict::Pays { gains };
    }
    let times = |rows: &[&Row], prompt: bool| -> Vec<(f64, f64)> {
        rows.iter()
            .filter(|r| !matches!(r.verdict, Verdict::Failed { .. }))
            .map(|r| {
                if prompt {
                    (r.length as f64, r.prefill.seconds)
                } else {
                    (r.decode.depth as f64, r.decode.step_seconds)
                }
            })
            .collect()
    };
    let cross = |prompt: bool| {
        let fit = if prompt { prefill_curve } else { decode_curve };
        let from = if prompt { row.length } else { row.decode.depth };
        match (fit(&times(own, prompt)), fit(&times(dense_rows, prompt))) {
            (Some(s), Some(d)) => s.crossover(&d, from as f64),
            _ => Crossover::Unknown,
        }
    };
    let mut found: Vec<Crossover> = Vec::new();
    if on_prompt {
        found.push(cross(true));
    }
    if on_store {
        found.push(cross(false));
    }
    let rank = |c: &Crossover| match c {
        Crossover::Here => (0, 0),
        Crossover::At(t) => (1, *t),
        Crossover::Unknown => (2, 0),
        Crossover::NoneInSight => (3, 0),
    };
    let crossover = found.into_iter().min_by_key(rank).unwrap_or(Crossover::Unknown);
    Verdict::NoGain { crossover }
}

/// The judgement over all lengths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Index of the system.
    pub system: usize,
    /// One or two sentences.
    pub text: String,
}

/// Group a system's verdicts: "pays at 8,192: …; no gain at 512, 2,048 (…)".
pub fn summarise(system: usize, rows: &[&Row]) -> Summary {
    let mut parts: Vec<(&'static str, Vec<&Row>)> = Vec::new();
    for r in rows {
        let k = r.verdict.short();
        match parts.iter_mut().find(|p| p.0 == k) {
            Some(p) => p.1.push(r),
            None => parts.push((k, vec![r])),
        }
    }
    let order = ["reference", "pays", "no gain", "loses quality", "failed"];
    parts.sort_by_key(|p| order.iter().position(|o| *o == p.0));
    let text = parts
        .iter()
        .map(|(kind, rows)| {
            if *kind == "reference" {
                return "the reference".to_string();
            }
            let at: Vec<String> = rows.iter().map(|r| thousands(r.length as u64)).collect();
            // The longest length speaks for the group: it is the least noisy.
            let last = rows[rows.len() - 1];
            let why = match &last.verdict {
                Verdict::Pays { gains } => gains.join(", "),
                Verdict::NoGain { crossover } => crossover.to_string(),
                Verdict::LosesQuality { lost, gains } if gains.is_empty() => lost.join(", "),
                Verdict::LosesQuality { lost, gains } => format!("{}; for {}", lost.join(", "), gains.join(", ")),
                Verdict::Failed { reason } => reason.clone(),
                Verdict::Reference => String::new(),
            };
            let whose = if rows.len() > 1 { format!(" [{}]", thousands(last.length as u64)) } else { String::new() };
            format!("{kind} at {}{whose}: {why}", at.join(", "))
        })
        .collect::<Vec<_>>()
        .join(" · ");
    Summary { system, text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Needle, Ppl, Trial};
    use crate::testing::{dense_info, info, row};

    fn needle(hits: usize) -> Option<Needle> {
        let trials = (0..10)
            .map(|i| Trial {
                name: format!("n{i}"),
                depth: (i as f64 + 0.5) / 10.0,
                hit: i < hits,
                right: f64::from(u8::from(i < hits)),
            })
            .collect();
        Some(Needle { trials, tokens: 100 })
    }

    fn ppl(percent: f64) -> Option<Ppl> {
        Some(Ppl { ppl: 20.0 * (1.0 + percent / 100.0), tokens: 128, difference: 0.2 * percent, percent })
    }

    #[test]
    fn fit_recovers_a_curve_and_keeps_coefficients_non_negative() {
        // 0.1 + 2e-4 T + 3e-8 T² at 512, 2048, 8192.
        let f = |t: f64| 0.1 + 2e-4 * t + 3e-8 * t * t;
        let c = Curve::fit(&[(512.0, f(512.0)), (2048.0, f(2048.0)), (8192.0, f(8192.0))], [true; 3]).unwrap();
        assert!((c.a - 0.1).abs() < 1e-6 && (c.b - 2e-4).abs() < 1e-9 && (c.c - 3e-8).abs() < 1e-13, "{c:?}");
        // Concave points: exact interpolation would need c < 0; the best allowed is a line.
        let c = Curve::fit(&[(1.0, 1.0), (2.0, 2.0), (3.0, 2.5)], [true; 3]).unwrap();
        assert!(c.c == 0.0 && c.b > 0.0 && c.a >= 0.0, "{c:?}");
    }

    #[test]
    fn crossover_worked_by_hand() {
        // Dense 1e-8 T² + 1e-4 T; system 2e-4 T: equal at T = 1e-4 / 1e-8 = 10,000.
        let dense = Curve { a: 0.0, b: 1e-4, c: 1e-8 };
        let sys = Curve { a: 0.0, b: 2e-4, c: 0.0 };
        assert_eq!(sys.crossover(&dense, 2048.0), Crossover::At(10_000));
        // Beyond it the system is already below.
        assert_eq!(sys.crossover(&dense, 12_000.0), Crossover::Here);
        // A system that grows as fast and starts higher never crosses.
        let worse = Curve { a: 0.5, b: 1e-4, c: 1e-8 };
        assert_eq!(worse.crossover(&dense, 2048.0), Crossover::NoneInSight);
        // A crossover in the far distance is not claimed: 1e-8 T² against 10 T meets at 1e9.
        let far = Curve { a: 0.0, b: 10.0, c: 0.0 };
        assert_eq!(far.crossover(&Curve { a: 0.0, b: 0.0, c: 1e-8 }, 100.0), Crossover::NoneInSight);
        // A constant overhead on a lower slope: 0.3 + 1e-4 T against 2e-4 T meet at 3,000.
        let s = Curve { a: 0.3, b: 1e-4, c: 0.0 };
        assert_eq!(s.crossover(&Curve { a: 0.0, b: 2e-4, c: 0.0 }, 512.0), Crossover::At(3000));
    }

    #[test]
    fn quality_comes_before_gain() {
        let d = [row(0, 512, 1.0, 1.0), row(0, 2048, 4.5, 1.0), row(0, 8192, 24.0, 1.0)];
        let s = [row(1, 512, 1.1, 1.0), row(1, 2048, 4.4, 1.0), row(1, 8192, 12.0, 1.0)];
        let (dr, sr): (Vec<&Row>, Vec<&Row>) = (d.iter().collect(), s.iter().collect());
        let p = info("xattention", Role::Prefill);
        assert_eq!(judge(&dense_info(), &d[0], &d[0], &dr, &dr), Verdict::Reference);
        let v = judge(&p, &s[2], &d[2], &sr, &dr);
        assert_eq!(v, Verdict::Pays { gains: vec!["prompt 2.00 times as fast".into()] });
        // 4.4 / 4.5 = 0.978: not beyond noise, though the fitted curves say break-even.
        let Verdict::NoGain { crossover } = judge(&p, &s[1], &d[1], &sr, &dr) else { panic!("no gain expected") };
        assert!(matches!(crossover, Crossover::Here | Crossover::At(_)), "{crossover:?}");
        // The same gain with perplexity +2.1%.
        let mut lossy = s[2].clone();
        lossy.ppl = ppl(2.1);
        let v = judge(&p, &lossy, &d[2], &sr, &dr);
        assert_eq!(v.short(), "loses quality");
        assert_eq!(v.long(), "loses quality (perplexity +2.1%) for prompt 2.00 times as fast");
        lossy.ppl = ppl(1.9);
        assert_eq!(judge(&p, &lossy, &d[2], &sr, &dr).short(), "pays");
    }

    #[test]
    fn one_needle_may_be_lost_but_not_two() {
        let mut d = row(0, 2048, 4.0, 1.0);
        d.needle = needle(9);
        let mut s = row(1, 2048, 2.0, 1.0);
        let p = info("moba", Role::Prefill);
        for (hits, kind) in [(10, "pays"), (9, "pays"), (8, "pays"), (7, "loses quality"), (0, "loses quality")] {
            s.needle = needle(hits);
            assert_eq!(judge(&p, &s, &d, &[&s], &[&d]).short(), kind, "{hits} hits");
        }
    }

    #[test]
    fn cache_systems_are_judged_on_the_store_only() {
        let d = row(0, 2048, 4.0, 1.0);
        let mut s = row(1, 2048, 4.0, 1.0);
        let c = info("think", Role::Cache);
        assert_eq!(judge(&c, &s, &d, &[&s], &[&d]), Verdict::NoGain { crossover: Crossover::Unknown });
        s.bytes.ratio = 0.75;
        assert_eq!(judge(&c, &s, &d, &[&s], &[&d]).long(), "pays: 75% of the bytes");
        s.bytes.ratio = 1.2;
        s.decode.ratio = 1.3;
        assert_eq!(judge(&c, &s, &d, &[&s], &[&d]).long(), "pays: decode 1.30 times as fast");
        // A faster prompt is no merit of a cache policy.
        s.decode.ratio = 1.0;
        s.prefill.ratio = 0.5;
        assert_eq!(judge(&c, &s, &d, &[&s], &[&d]).short(), "no gain");
    }

    #[test]
    fn decode_crossover_is_linear_in_depth() {
        // Dense 0.010 + 1e-6 depth; system 0.012 + 5e-7 depth: equal at 4,000.
        let mk = |sys, t: usize, s: f64| {
            let mut r = row(sys, t, 1.0, 1.0);
            r.decode.step_seconds = s;
            r.decode.depth = t;
            r.decode.ratio = 1.0;
            r
        };
        let d: Vec<Row> = [512, 2048, 8192].iter().map(|&t| mk(0, t, 0.010 + 1e-6 * t as f64)).collect();
        let s: Vec<Row> = [512, 2048, 8192].iter().map(|&t| mk(1, t, 0.012 + 5e-7 * t as f64)).collect();
        let (dr, sr): (Vec<&Row>, Vec<&Row>) = (d.iter().collect(), s.iter().collect());
        let v = judge(&info("loki", Role::Cache), &s[1], &d[1], &sr, &dr);
        assert_eq!(v, Verdict::NoGain { crossover: Crossover::At(4000) });
    }

    #[test]
    fn a_summary_groups_lengths() {
        let mut a = row(1, 512, 1.0, 1.0);
        a.verdict = Verdict::NoGain { crossover: Crossover::At(4000) };
        let mut b = row(1, 2048, 1.0, 1.0);
        b.verdict = Verdict::NoGain { crossover: Crossover::At(4100) };
        let mut c = row(1, 8192, 1.0, 1.0);
        c.verdict = Verdict::Pays { gains: vec!["prompt 1.50 times as fast".into()] };
        assert_eq!(
            summarise(1, &[&a, &b, &c]).text,
            "pays at 8,192: prompt 1.50 times as fast · no gain at 512, 2,048 [2,048]: crossover estimated near 4,100 tokens"
        );
    }
}
