//! Text tables for terminals: one per length, units in the headers, about 140 columns.

use super::num;
use crate::results::{Results, Row};
use crate::verdict::thousands;
use std::fmt::Write;

/// Header lines and whether the column is aligned to the right.
const COLUMNS: &[(&str, &str, bool)] = &[
    ("", "system", false),
    ("prompt", "s", true),
    ("", "ratio", true),
    ("attn", "s", true),
    ("", "ratio", true),
    ("seen", "%", true),
    ("decode", "tok/s", true),
    ("", "ratio", true),
    ("read", "%", true),
    ("KV", "MiB", true),
    ("", "ratio", true),
    ("rel. error", "mean/worst", true),
    ("ppl", "last 1/4", true),
    ("ppl", "+-%", true),
    ("needles", "found", true),
    ("", "verdict", false),
];

/// Longest system name shown whole.
const NAME: usize = 30;

fn cells(r: &Results, row: &Row) -> Vec<String> {
    let name = &r.systems[row.system].name;
    let mut shown: String = name.chars().take(NAME).collect();
    if name.chars().count() > NAME {
        shown.pop();
        shown.push('…');
    }
    let mut c = vec![shown];
    if row.verdict.short() == "failed" {
        c.extend(std::iter::repeat_n("-".to_string(), COLUMNS.len() - 2));
        c.push("failed".into());
        return c;
    }
    let ratio = |x: f64, same: bool| if same { "=".to_string() } else { format!("{x:.2}") };
    let (p, d, b) = (&row.prefill, &row.decode, &row.bytes);
    let dense = row.system == 0;
    c.push(num(p.seconds));
    c.push(ratio(p.ratio, p.shared && !dense));
    c.push(num(p.attention_seconds));
    c.push(ratio(p.attention_ratio, p.shared && !dense));
    c.push(format!("{:.0}", p.density * 100.0));
    c.push(num(d.tokens_per_second));
    c.push(ratio(d.ratio, d.shared && !dense));
    c.push(format!("{:.0}", d.density * 100.0));
    c.push(num(b.total() as f64 / f64::from(1 << 20)));
    c.push(format!("{:.2}", b.ratio));
    c.push(row.error.as_ref().map_or("-".into(), |e| format!("{}/{}", num3(e.mean), num3(e.worst))));
    c.push(row.ppl.map_or("-".into(), |p| num(p.ppl)));
    c.push(row.ppl.map_or("-".into(), |p| if dense { String::new() } else { format!("{:+.1}", p.percent) }));
    c.push(row.needle.as_ref().map_or("-".into(), |n| format!("{}/{}", n.hits(), n.trials.len())));
    c.push(row.verdict.short().into());
    c
}

fn num3(x: f64) -> String {
    if x == 0.0 {
        "0".into()
    } else if x < 0.0005 {
        format!("{x:.0e}")
    } else {
        format!("{x:.3}")
    }
}

/// The table of one length.
pub fn table(r: &Results, length: usize) -> String {
    let rows: Vec<Vec<String>> = r.at(length).map(|row| cells(r, row)).collect();
    let width: Vec<usize> = (0..COLUMNS.len())
        .map(|i| {
            let head = COLUMNS[i].0.chars().count().max(COLUMNS[i].1.chars().count());
            rows.iter().map(|c| c[i].chars().count()).chain([head]).max().unwrap_or(head)
        })
        .collect();
    let line = |cells: &[&str]| {
        let mut s = String::new();
        for (i, c) in cells.iter().enumerate() {
            let pad = " ".repeat(width[i] - c.chars().count().min(width[i]));
            if i > 0 {
                s.push(' ');
            }
            if COLUMNS[i].2 {
                s.push_str(&pad);
                s.push_str(c);
            } else {
                s.push_str(c);
                s.push_str(&pad);
            }
        }
        s.trim_end().to_string() + "\n"
    };
    let mut out = format!("{} tokens\n", thousands(length as u64));
    out += &line(&COLUMNS.iter().map(|c| c.0).collect::<Vec<_>>());
    out += &line(&COLUMNS.iter().map(|c| c.1).collect::<Vec<_>>());
    let total = width.iter().sum::<usize>() + width.len() - 1;
    out += &"─".repeat(total);
    out.push('\n');
    for c in &rows {
        out += &line(&c.iter().map(String::as_str).collect::<Vec<_>>());
    }
    out
}

/// All tables with a line that says how to read them.
pub fn tables(r: &Results) -> String {
    let mut out = String::new();
    for &l in &r.lengths {
        out += &table(r, l);
        out.push('\n');
    }
    out += "Ratios are to dense in the same run: prompt, attn and KV below 1 are better, decode above 1 is better; = is dense's own\n\
            measurement. seen/read: query-key pairs really computed for the prompt/per decoded token, % of dense. rel. error: attention\n\
            output against exact attention, mean over layers and worst layer. ppl: perplexity of the last quarter given the rest.\n";
    out
}

/// One verdict line per system.
pub fn verdicts(r: &Results) -> String {
    let mut out = String::from("Verdicts\n");
    for s in &r.summaries {
        if s.system > 0 {
            let _ = writeln!(out, "  {}: {}", r.systems[s.system].name, s.text);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::results;

    #[test]
    fn the_table_of_a_length() {
        let r = results();
        let expected = "\
2,048 tokens
                         prompt       attn       seen decode       read   KV        rel. error      ppl  ppl needles
system                        s ratio    s ratio    %  tok/s ratio    %  MiB ratio  mean/worst last 1/4  +-%   found verdict
──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
dense                      4.50  1.00 2.25  1.00  100   50.0  1.00  100 2.00  1.00           -     20.0         9/10 reference
xattention:threshold=0.9   2.70  0.60 1.35  0.60   40   50.0  1.00  100 2.00  1.00 0.150/0.300     20.3 +1.5    5/10 loses quality
think                      4.50     = 2.25     =  100   50.0  1.00  100 1.50  0.75 0.150/0.300     20.6 +3.0    9/10 loses quality
";
        assert_eq!(table(&r, 2048), expected, "\n{}", table(&r, 2048));
    }

    #[test]
    fn verdict_lines_name_every_system_but_dense() {
        let v = verdicts(&results());
        assert_eq!(v.lines().count(), 3);
        assert!(v.contains("xattention:threshold=0.9: loses quality at 512, 2,048"), "{v}");
    }

    #[test]
    fn long_names_are_cut_and_failures_shown() {
        let mut r = results();
        r.systems[1].name = "a".repeat(50);
        r.rows[1].verdict = crate::verdict::Verdict::Failed { reason: "no".into() };
        let t = table(&r, 512);
        assert!(t.contains(&("a".repeat(29) + "…")) && t.contains("failed"), "{t}");
        assert!(t.lines().all(|l| l.chars().count() <= 142), "{t}");
    }
}
