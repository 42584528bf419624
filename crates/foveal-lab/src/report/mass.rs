//! The picture of `bench selectors`: attention mass kept against density, as a file of its own.

use super::svg::{Axis, color, esc, numbered};
use crate::selectors::SelectorRow;
use std::fmt::Write;

const W: f64 = 760.0;
const H: f64 = 470.0;
/// Width of the chart; the legend stands beside it.
const CHART: f64 = 560.0;

const STYLE: &str = "svg{background:#fff}text{fill:#222;font:11px system-ui,sans-serif}.label{font-size:12px}.tick{fill:#6b7078}\
.grid{stroke:#dcdfe3;stroke-width:1}.limit{stroke:#c8324a;stroke-width:1.5;stroke-dasharray:5 4}\
.line{fill:none;stroke:currentColor;stroke-width:1.6}.front{fill:none;stroke:#6b7078;stroke-width:1.3;stroke-dasharray:2 3}\
.dot{fill:#fff;stroke:currentColor;stroke-width:2}.dotnum{font-size:9.5px}\
.s0{color:#7b818c}.s1{color:#2f7fd6}.s2{color:#e06c1c}.s3{color:#2b9d63}.s4{color:#c8324a}.s5{color:#8a5cd0}\
.s6{color:#b1872a}.s7{color:#1a9aa8}.s8{color:#d0559f}.s9{color:#6f8f1f}.s10{color:#5468d8}.s11{color:#a0603a}";

/// Id of a row's system.
fn id(r: &SelectorRow) -> &str {
    r.system.split(':').next().unwrap_or_default()
}

/// Lost mass, as far down as the scale goes.
fn lost(recall: f64) -> f64 {
    (1.0 - recall).clamp(LEAST, 1.0)
}

/// Least lost mass that is told apart.
const LEAST: f64 = 3e-4;

/// One chart for each source and length: a line per system through its budgets, the dotted line joins the settings that
/// no other beats in both mass and density.
pub fn mass(rows: &[SelectorRow]) -> String {
    let mut groups: Vec<(&str, usize)> = Vec::new();
    for r in rows.iter().filter(|r| r.recall.is_some()) {
        if !groups.contains(&(r.source.as_str(), r.tokens)) {
            groups.push((&r.source, r.tokens));
        }
    }
    let mut ids: Vec<&str> = rows.iter().filter(|r| r.recall.is_some()).map(id).collect();
    ids.sort_unstable();
    ids.dedup();
    let h = H * groups.len().max(1) as f64;
    let title = "Attention mass kept against density";
    let mut s = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {W} {h}\" role=\"img\" aria-label=\"{title}\"><title>{title}</title><style>{STYLE}</style>\n"
    );
    for (i, (source, tokens)) in groups.iter().enumerate() {
        let _ = writeln!(s, "<g transform=\"translate(0 {})\">", H * i as f64);
        let of: Vec<&SelectorRow> = rows.iter().filter(|r| r.source == *source && r.tokens == *tokens).collect();
        chart(&mut s, &of, &ids, &format!("{tokens} tokens, {source}"));
        s += "</g>\n";
    }
    s + "</svg>\n"
}

fn chart(s: &mut String, rows: &[&SelectorRow], ids: &[&str], title: &str) {
    let points: Vec<(usize, f64, f64, &SelectorRow)> = rows
        .iter()
        .filter_map(|r| Some((ids.iter().position(|x| *x == id(r))?, r.density?.max(1e-4), lost(r.recall?), *r)))
        .collect();
    let x = Axis::new(points.iter().map(|p| p.1).chain([1.0]), 64.0, CHART, true, 0.05);
    // Little lost is high up.
    let y = Axis::new([LEAST, 1.0].into_iter(), 34.0, H - 52.0, true, 0.0);
    let _ = writeln!(s, "<text class=\"label\" x=\"64\" y=\"20\">{}</text>", esc(title));
    for t in x.ticks() {
        let p = x.px(t);
        let _ = writeln!(
            s,
            "<line class=\"grid\" x1=\"{p:.1}\" x2=\"{p:.1}\" y1=\"34\" y2=\"{:.1}\"/><text class=\"tick\" x=\"{p:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}%</text>",
            H - 52.0,
            H - 36.0,
            100.0 * t
        );
    }
    for kept in [0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999] {
        let p = y.px(lost(kept));
        let class = if kept == 0.95 { "limit" } else { "grid" };
        let _ = writeln!(
            s,
            "<line class=\"{class}\" x1=\"64\" x2=\"{CHART}\" y1=\"{p:.1}\" y2=\"{p:.1}\"/><text class=\"tick\" x=\"58\" y=\"{:.1}\" text-anchor=\"end\">{:.1}%</text>",
            p + 4.0,
            100.0 * kept
        );
    }
    let _ = writeln!(
        s,
        "<text class=\"label\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">density: pairs visited of all causal pairs</text><text class=\"label\" transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">attention mass kept</text>",
        (64.0 + CHART) / 2.0,
        H - 14.0,
        H / 2.0
    );
    let path = |points: &[(f64, f64)]| -> String {
        let all: Vec<String> = points.iter().map(|p| format!("{:.1},{:.1}", x.px(p.0), y.px(p.1))).collect();
        all.join(" ")
    };
    let mut front: Vec<(f64, f64)> = points
        .iter()
        .filter(|p| !points.iter().any(|q| q.1 <= p.1 && q.2 <= p.2 && (q.1, q.2) != (p.1, p.2)))
        .map(|p| (p.1, p.2))
        .collect();
    front.sort_by(|a, b| a.0.total_cmp(&b.0));
    let _ = writeln!(s, "<polyline class=\"front\" points=\"{}\"/>", path(&front));
    for (i, name) in ids.iter().enumerate() {
        let mut own: Vec<(f64, f64)> = points.iter().filter(|p| p.0 == i).map(|p| (p.1, p.2)).collect();
        own.sort_by(|a, b| a.0.total_cmp(&b.0));
        let _ = writeln!(s, "<polyline class=\"line {}\" points=\"{}\"/>", color(i), path(&own));
        let (lx, ly) = (CHART + 22.0, 44.0 + 19.0 * i as f64);
        numbered(s, i, i + 1, lx, ly, name);
        let _ = writeln!(s, "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>", lx + 14.0, ly + 4.0, esc(name));
    }
    for (i, density, lost, r) in &points {
        let hint = format!("{}: {:.1}% of the mass at {:.1}% density", r.system, 100.0 * (1.0 - lost), 100.0 * density);
        numbered(s, *i, i + 1, x.px(*density), y.px(*lost), &hint);
    }
}
