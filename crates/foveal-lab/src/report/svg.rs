//! Charts as inline SVG. Colours come from the page's style sheet (classes), so that they follow
//! its light or dark scheme; series differ by colour, by number and by dash.

use super::num;
use crate::results::{Results, Role, Row};
use crate::roofline::{Point, Roofline};
use crate::verdict::{Crossover, Curve, Verdict, decode_curve, prefill_curve, thousands};
use std::fmt::Write;

/// Text for element content and attributes.
pub(crate) fn esc(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// One axis: from data to pixels.
pub(super) struct Axis {
    lo: f64,
    hi: f64,
    from: f64,
    to: f64,
    log: bool,
}

impl Axis {
    pub(super) fn new(values: impl Iterator<Item = f64>, from: f64, to: f64, log: bool, pad: f64) -> Axis {
        let v: Vec<f64> = values.filter(|x| x.is_finite() && (!log || *x > 0.0)).collect();
        let (mut lo, mut hi) =
            (v.iter().copied().fold(f64::INFINITY, f64::min), v.iter().copied().fold(f64::NEG_INFINITY, f64::max));
        if v.is_empty() {
            (lo, hi) = if log { (1.0, 10.0) } else { (0.0, 1.0) };
        }
        if log {
            (lo, hi) = (lo / (1.0 + pad), hi * (1.0 + pad));
        } else {
            let span = if hi > lo { hi - lo } else { hi.abs().max(1.0) };
            (lo, hi) = (lo - span * pad, hi + span * pad);
        }
        Axis { lo, hi, from, to, log }
    }

    pub(super) fn px(&self, x: f64) -> f64 {
        let f = if self.log {
            (x.max(1e-300) / self.lo).ln() / (self.hi / self.lo).ln()
        } else {
            (x - self.lo) / (self.hi - self.lo)
        };
        self.from + f * (self.to - self.from)
    }

    pub(super) fn ticks(&self) -> Vec<f64> {
        if self.log {
            let decade = |e: i32, m: f64| m * 10f64.powi(e);
            let steps: &[f64] = if self.hi / self.lo > 300.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
            return (-12..13)
                .flat_map(|e| steps.iter().map(move |&m| decade(e, m)))
                .filter(|x| *x >= self.lo && *x <= self.hi)
                .collect();
        }
        let raw = (self.hi - self.lo) / 5.0;
        let mag = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * mag).find(|s| *s >= raw).unwrap_or(raw);
        let first = (self.lo / step).ceil() as i64;
        (0..12).map(|i| (first + i) as f64 * step).filter(|x| *x <= self.hi).collect()
    }
}

const W: f64 = 640.0;
const H: f64 = 380.0;
const LEFT: f64 = 64.0;
const BOTTOM: f64 = 48.0;

/// A tick's number: three digits as [`num`], without zeros that say nothing.
fn tick(x: f64) -> String {
    let s = num(x);
    if s.contains('.') && !s.contains('e') { s.trim_end_matches('0').trim_end_matches('.').into() } else { s }
}

fn open(title: &str, w: f64, h: f64) -> String {
    format!("<svg viewBox=\"0 0 {w} {h}\" role=\"img\" aria-label=\"{0}\"><title>{0}</title>\n", esc(title))
}

fn frame(s: &mut String, x: &Axis, y: &Axis, xl: &str, yl: &str, tick_x: &dyn Fn(f64) -> String) {
    for t in x.ticks() {
        let p = x.px(t);
        let _ = writeln!(
            s,
            "<line class=\"grid\" x1=\"{p:.1}\" x2=\"{p:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/><text class=\"tick\" x=\"{p:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            y.from,
            y.to,
            y.from + 16.0,
            tick_x(t)
        );
    }
    for t in y.ticks() {
        let p = y.px(t);
        let _ = writeln!(
            s,
            "<line class=\"grid\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{p:.1}\" y2=\"{p:.1}\"/><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            x.from,
            x.to,
            x.from - 6.0,
            p + 4.0,
            tick(t)
        );
    }
    let _ = writeln!(
        s,
        "<text class=\"label\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text><text class=\"label\" transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        (x.from + x.to) / 2.0,
        y.from + 38.0,
        esc(xl),
        (y.from + y.to) / 2.0,
        esc(yl)
    );
}

pub(super) fn color(system: usize) -> String {
    format!("s{}", system % 12)
}

/// A system's dot with its number.
fn dot(s: &mut String, system: usize, x: f64, y: f64, hint: &str) {
    numbered(s, system, system, x, y, hint);
}

/// A dot in the colour of `class`.
pub(super) fn numbered(s: &mut String, class: usize, number: usize, x: f64, y: f64, hint: &str) {
    let _ = writeln!(
        s,
        "<g class=\"{}\"><title>{}</title><circle class=\"dot\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"8\"/><text class=\"dotnum\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{number}</text></g>",
        color(class),
        esc(hint),
        y + 3.5
    );
}

fn ok(r: &Row) -> bool {
    !matches!(r.verdict, Verdict::Failed { .. })
}

fn on_prompt(role: Role) -> bool {
    role != Role::Cache
}

fn on_store(role: Role) -> bool {
    role != Role::Prefill
}

/// One system's line: its number, points (tokens, seconds) and fitted curve.
type Series = (usize, Vec<(f64, f64)>, Option<Curve>);

/// Time against length, log-log, fits dashed beyond the last length, crossovers marked.
pub(super) fn times(r: &Results, prompt: bool) -> String {
    let point = |row: &Row| {
        if prompt {
            (row.length as f64, row.prefill.seconds)
        } else {
            (row.decode.depth as f64, row.decode.step_seconds)
        }
    };
    let fit = if prompt { prefill_curve } else { decode_curve };
    let series: Vec<Series> = r
        .systems
        .iter()
        .enumerate()
        .filter(|(_, i)| if prompt { on_prompt(i.role) } else { on_store(i.role) })
        .map(|(s, _)| {
            let p: Vec<(f64, f64)> = r.of(s).filter(|x| ok(x)).map(point).collect();
            let c = fit(&p);
            (s, p, c)
        })
        .filter(|x| !x.1.is_empty())
        .collect();
    let longest = series.iter().flat_map(|s| &s.1).map(|p| p.0).fold(1.0, f64::max);
    let first = series.iter().flat_map(|s| &s.1).map(|p| p.0).fold(longest, f64::min);
    let end = longest * 4.0;
    let dense = series.iter().find(|s| s.0 == 0).and_then(|s| s.2);
    let ends = series.iter().filter_map(|s| s.2.map(|c| c.at(end)));
    let x = Axis::new([first, end].into_iter(), LEFT, W - 16.0, true, 0.1);
    let y = Axis::new(series.iter().flat_map(|s| &s.1).map(|p| p.1).chain(ends), H - BOTTOM, 14.0, true, 0.25);
    let what = if prompt { "Prompt time against length" } else { "Time of one decoded token against depth" };
    let mut s = open(what, W, H);
    let (xl, yl) = if prompt {
        ("prompt length, tokens", "whole prompt, seconds")
    } else {
        ("tokens stored", "one step, seconds")
    };
    frame(&mut s, &x, &y, xl, yl, &|t| thousands(t as u64));
    for (i, points, curve) in &series {
        let c = color(*i);
        let path: Vec<String> = points.iter().map(|p| format!("{:.1},{:.1}", x.px(p.0), y.px(p.1))).collect();
        let _ = writeln!(s, "<polyline class=\"line {c}\" points=\"{}\"/>", path.join(" "));
        if let Some(k) = curve {
            let fit: Vec<String> = (0..=24)
                .map(|j| longest * (end / longest).powf(f64::from(j) / 24.0))
                .map(|t| format!("{:.1},{:.1}", x.px(t), y.px(k.at(t))))
                .collect();
            let _ = writeln!(s, "<polyline class=\"line fit {c}\" points=\"{}\"/>", fit.join(" "));
            if let (Some(d), true) = (dense, *i > 0)
                && let Crossover::At(t) = k.crossover(&d, first)
                && (t as f64) <= end
            {
                let (px, py) = (x.px(t as f64), y.px(d.at(t as f64)));
                let name = esc(&r.systems[*i].name);
                let _ = writeln!(
                    s,
                    "<path class=\"cross {c}\" d=\"M{:.1} {py:.1}L{px:.1} {:.1}L{:.1} {py:.1}L{px:.1} {:.1}Z\"><title>{name} crosses dense near {} tokens (fit)</title></path>",
                    px - 7.0,
                    py - 7.0,
                    px + 7.0,
                    py + 7.0,
                    thousands(t)
                );
            }
        }
        for p in points {
            let hint = format!("{}: {} tokens, {} s", r.systems[*i].name, thousands(p.0 as u64), num(p.1));
            dot(&mut s, *i, x.px(p.0), y.px(p.1), &hint);
        }
    }
    s + "</svg>\n"
}

/// A scatter of (x, perplexity change) at one length with its Pareto front (less of both is better).
fn scatter(r: &Results, length: usize, title: &str, xl: &str, pick: &dyn Fn(Role, &Row) -> Option<f64>) -> String {
    let points: Vec<(usize, f64, f64)> = r
        .at(length)
        .filter(|row| ok(row))
        .filter_map(|row| Some((row.system, pick(r.systems[row.system].role, row)?, row.ppl?.percent)))
        .collect();
    // One lossy system must not squeeze all others into a line: beyond 2% the scale is logarithmic.
    let bend = |p: f64| if p.abs() <= 2.0 { p } else { p.signum() * (2.0 + 2.0 * (p.abs() / 2.0).ln()) };
    let w = 420.0;
    let h = 320.0;
    let x = Axis::new(points.iter().map(|p| p.1).chain([1.0]), LEFT, w - 16.0, false, 0.1);
    let y = Axis::new(points.iter().map(|p| bend(p.2)).chain([-0.5, 2.5]), h - BOTTOM, 14.0, false, 0.08);
    let mut s = open(&format!("{title}, {} tokens", thousands(length as u64)), w, h);
    for t in x.ticks() {
        let p = x.px(t);
        let _ = writeln!(
            s,
            "<line class=\"grid\" x1=\"{p:.1}\" x2=\"{p:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/><text class=\"tick\" x=\"{p:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            y.from,
            y.to,
            y.from + 16.0,
            tick(t)
        );
    }
    for t in [-50.0, -10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 500.0, 1000.0, 10_000.0] {
        let b = bend(t);
        if b >= y.lo && b <= y.hi {
            let p = y.px(b);
            let class = if t == 2.0 { "limit" } else { "grid" };
            let _ = writeln!(
                s,
                "<line class=\"{class}\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{p:.1}\" y2=\"{p:.1}\"/><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                x.from,
                x.to,
                x.from - 6.0,
                p + 4.0,
                if t == 0.0 { "0%".into() } else { format!("{t:+}%") }
            );
        }
    }
    let _ = writeln!(
        s,
        "<text class=\"label\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text><text class=\"label\" transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">perplexity against dense</text>",
        (x.from + x.to) / 2.0,
        y.from + 38.0,
        esc(xl),
        (y.from + y.to) / 2.0
    );
    let mut front: Vec<(f64, f64)> = points
        .iter()
        .filter(|p| !points.iter().any(|q| q.1 <= p.1 && q.2 <= p.2 && (q.1, q.2) != (p.1, p.2)))
        .map(|p| (p.1, bend(p.2)))
        .collect();
    front.sort_by(|a, b| a.0.total_cmp(&b.0));
    let path: Vec<String> = front.iter().map(|p| format!("{:.1},{:.1}", x.px(p.0), y.px(p.1))).collect();
    let _ = writeln!(s, "<polyline class=\"front\" points=\"{}\"/>", path.join(" "));
    for (i, a, b) in &points {
        let hint = format!("{}: {} {xl}, perplexity {b:+.2}%", r.systems[*i].name, num(*a));
        dot(&mut s, *i, x.px(*a), y.px(bend(*b)), &hint);
    }
    s + "</svg>\n"
}

/// Prompt time against quality.
pub(super) fn pareto_prompt(r: &Results, length: usize) -> String {
    scatter(r, length, "Quality against prompt time", "prompt time / dense", &|role, row| {
        on_prompt(role).then_some(row.prefill.ratio)
    })
}

/// Decode time against quality.
pub(super) fn pareto_decode(r: &Results, length: usize) -> String {
    scatter(r, length, "Quality against decode time", "time per token / dense", &|role, row| {
        (on_store(role) && row.decode.ratio > 0.0).then(|| 1.0 / row.decode.ratio)
    })
}

/// Bytes against quality.
pub(super) fn bytes(r: &Results, length: usize) -> String {
    scatter(r, length, "Quality against KV bytes", "KV bytes / dense", &|role, row| {
        on_store(role).then_some(row.bytes.ratio)
    })
}

/// Rate against arithmetic intensity, log-log, under the roofs of the machine.
pub(super) fn roofline(r: &Roofline) -> String {
    let c = &r.ceilings;
    let (w, h) = (900.0, 560.0);
    let seen = |pick: fn(&Point) -> f64| r.points.iter().map(pick).filter(|x| *x > 0.0);
    // The point where the lowest slant meets the highest roof is part of the picture.
    let top = c.compute("bf16").max(c.compute("f32"));
    let ridge = top / c.read_one.rate;
    let x = Axis::new(seen(|p| p.intensity).chain([0.1, ridge]), LEFT, w - 16.0, true, 0.6);
    let y = Axis::new(seen(|p| p.row.gflops).chain([1.0, top]), h - BOTTOM, 14.0, true, 0.6);
    let mut s = open("Rate against arithmetic intensity, under the roofs of the machine", w, h);
    frame(&mut s, &x, &y, "operations a byte", "10⁹ operations a second", &tick);
    // Solid what registers can do, dashed what matrix products do.
    let level = [
        (&c.f32_arithmetic, "line s1", -6.0),
        (&c.f32_product, "line fit s1", 14.0),
        (&c.bf16_arithmetic, "line s2", -6.0),
        (&c.bf16_product, "line fit s2", 14.0),
    ];
    for (roof, class, beside) in level {
        let from = x.lo.max(roof.rate / c.read_all.rate);
        let (px, py) = (x.px(from), y.px(roof.rate));
        let _ = writeln!(
            s,
            "<line class=\"{class}\" x1=\"{px:.1}\" x2=\"{:.1}\" y1=\"{py:.1}\" y2=\"{py:.1}\"/><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}, {} GFLOP/s</text>",
            x.to,
            x.to - 4.0,
            py + beside,
            esc(&roof.what),
            num(roof.rate)
        );
    }
    // One thread is dashed; both slants end at the highest roof.
    for (roof, class) in [(&c.read_one, "line fit s0"), (&c.read_all, "line s0")] {
        let end = (top / roof.rate).min(x.hi);
        let start = x.lo.max(y.lo / roof.rate);
        let _ = writeln!(
            s,
            "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"><title>{} on {} threads, {} GB/s</title></line>",
            x.px(start),
            y.px(start * roof.rate),
            x.px(end),
            y.px(end * roof.rate),
            esc(&roof.what),
            roof.threads,
            num(roof.rate)
        );
    }
    let _ = writeln!(
        s,
        "<text class=\"tick\" x=\"{:.1}\" y=\"26\">memory: {} GB/s on {} threads, {} on one (dashed)</text>",
        x.from + 6.0,
        num(c.read_all.rate),
        c.read_all.threads,
        num(c.read_one.rate)
    );
    for (i, p) in r.points.iter().enumerate().filter(|(_, p)| p.intensity > 0.0 && p.row.gflops > 0.0) {
        let hint = format!(
            "{} {}, {}: {} GFLOP/s at {} FLOP/byte, {:.0}% of its roof",
            p.row.op,
            p.row.shape,
            p.row.dtype,
            num(p.row.gflops),
            num(p.intensity),
            100.0 * p.share
        );
        let class = match p.row.dtype.as_str() {
            "f32" => 1,
            "bf16" => 2,
            _ => 3,
        };
        numbered(&mut s, class, i + 1, x.px(p.intensity), y.px(p.row.gflops), &hint);
    }
    s + "</svg>\n"
}

/// Needles: one line per system, one cell per depth, one block per length.
pub(super) fn needles(r: &Results) -> String {
    let trials = r.rows.iter().filter_map(|x| x.needle.as_ref()).map(|n| n.trials.len()).max().unwrap_or(0);
    let (cell, gap, left, top) = (16.0, 18.0, 250.0, 40.0);
    let block = trials as f64 * cell + gap;
    let w = left + block * r.lengths.len() as f64;
    let h = top + r.systems.len() as f64 * (cell + 4.0) + 8.0;
    let mut s = open("Passkeys found, by system, length and depth", w, h);
    for (j, l) in r.lengths.iter().enumerate() {
        let x = left + j as f64 * block;
        let _ = writeln!(
            s,
            "<text class=\"label\" x=\"{x:.0}\" y=\"14\">{} tokens</text><text class=\"tick\" x=\"{x:.0}\" y=\"32\">start</text><text class=\"tick\" x=\"{:.0}\" y=\"32\" text-anchor=\"end\">end</text>",
            thousands(*l as u64),
            x + trials as f64 * cell
        );
    }
    for (i, info) in r.systems.iter().enumerate() {
        let y = top + i as f64 * (cell + 4.0);
        let short: String = info.name.chars().take(38).collect();
        let _ = writeln!(s, "<text class=\"tick\" x=\"0\" y=\"{:.0}\">{}</text>", y + 12.0, esc(&short));
        for (j, l) in r.lengths.iter().enumerate() {
            let Some(n) = r.row(i, *l).and_then(|row| row.needle.as_ref()) else { continue };
            for (t, trial) in n.trials.iter().enumerate() {
                let x = left + j as f64 * block + t as f64 * cell;
                let class = if trial.hit { "hit" } else { "miss" };
                let told = if trial.hit { "found" } else { "not found" };
                let _ = writeln!(
                    s,
                    "<g><title>{}, {} tokens, depth {:.0}%: {told}, {:.0}% of its tokens right</title><rect class=\"{class}\" x=\"{x:.0}\" y=\"{y:.0}\" width=\"14\" height=\"14\" rx=\"2\"/>{}</g>",
                    esc(&info.name),
                    thousands(*l as u64),
                    trial.depth * 100.0,
                    trial.right * 100.0,
                    if trial.hit {
                        String::new()
                    } else {
                        format!("<path class=\"x\" d=\"M{:.0} {:.0}l6 6m0 -6l-6 6\"/>", x + 4.0, y + 4.0)
                    }
                );
            }
        }
    }
    s + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_map_ends_and_ticks_lie_inside() {
        let a = Axis::new([10.0, 1000.0].into_iter(), 0.0, 100.0, true, 0.0);
        assert!((a.px(10.0)).abs() < 1e-9 && (a.px(1000.0) - 100.0).abs() < 1e-9 && (a.px(100.0) - 50.0).abs() < 1e-9);
        assert_eq!(a.ticks(), [10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]);
        let b = Axis::new([0.0, 1.0].into_iter(), 0.0, 100.0, false, 0.0);
        assert_eq!(b.ticks().len(), 6);
        // Degenerate data still gives a finite axis.
        let c = Axis::new(std::iter::once(3.0), 0.0, 100.0, false, 0.1);
        assert!(c.px(3.0).is_finite() && !c.ticks().is_empty());
    }

    #[test]
    fn charts_show_every_system_they_should() {
        let r = crate::testing::results();
        let t = times(&r, true);
        assert!(t.contains("xattention") && !t.contains("think:"), "cache policies have no line in the prompt chart");
        assert!(!t.contains("NaN") && !t.contains("inf"), "{t}");
        assert_eq!(needles(&r).matches("class=\"hit\"").count(), 2 * (9 + 5 + 9));
        for l in [512, 2048] {
            for s in [pareto_prompt(&r, l), pareto_decode(&r, l), bytes(&r, l)] {
                assert!(!s.contains("NaN") && s.contains("class=\"dot\""));
            }
        }
    }
}
