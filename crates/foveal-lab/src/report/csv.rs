//! One line per system and length.

use crate::results::{Place, Results};

const HEADER: &[&str] = &[
    "system",
    "prefill",
    "cache",
    "kv_dtype",
    "length_tokens",
    "prefill_s",
    "prefill_s_fastest",
    "prefill_s_slowest",
    "prefill_repeats",
    "prefill_ratio",
    "attention_s",
    "attention_ratio",
    "select_s",
    "prefill_pairs",
    "prefill_density",
    "attention_flops",
    "attention_flops_fallback",
    "decode_tokens_per_s",
    "decode_step_s",
    "decode_steps",
    "decode_depth_tokens",
    "decode_ratio",
    "decode_pairs",
    "decode_density",
    "kv_bytes",
    "kv_key_bytes",
    "kv_value_bytes",
    "kv_aux_bytes",
    "kv_tokens",
    "kv_ratio",
    "error_mean",
    "error_worst",
    "error_worst_layer",
    "error_place",
    "ppl",
    "ppl_tokens",
    "ppl_difference",
    "ppl_percent",
    "needle_hits",
    "needle_trials",
    "needle_by_depth",
    "verdict",
    "verdict_text",
];

fn quote(s: &str) -> String {
    if s.contains([',', '"', '\n', '\r']) { format!("\"{}\"", s.replace('"', "\"\"")) } else { s.into() }
}

/// The comparison as CSV (RFC 4180, header line, numbers in full precision, SI units).
pub fn csv(r: &Results) -> String {
    let mut out = HEADER.join(",") + "\r\n";
    for row in &r.rows {
        let i = &r.systems[row.system];
        let (p, d, b) = (&row.prefill, &row.decode, &row.bytes);
        let e = row.error.as_ref();
        let n = row.needle.as_ref();
        let or = |x: Option<String>| x.unwrap_or_default();
        let f: Vec<String> = vec![
            quote(&i.name),
            quote(&i.prefill),
            quote(&i.cache),
            i.kv_dtype.clone(),
            row.length.to_string(),
            p.seconds.to_string(),
            p.fastest.to_string(),
            p.slowest.to_string(),
            p.repeats.to_string(),
            p.ratio.to_string(),
            p.attention_seconds.to_string(),
            p.attention_ratio.to_string(),
            p.select_seconds.to_string(),
            p.pairs.to_string(),
            p.density.to_string(),
            p.flops.to_string(),
            p.fallback_flops.to_string(),
            d.tokens_per_second.to_string(),
            d.step_seconds.to_string(),
            d.steps.to_string(),
            d.depth.to_string(),
            d.ratio.to_string(),
            d.pairs.to_string(),
            d.density.to_string(),
            b.total().to_string(),
            b.keys.to_string(),
            b.values.to_string(),
            b.aux.to_string(),
            b.tokens.to_string(),
            b.ratio.to_string(),
            or(e.map(|e| e.mean.to_string())),
            or(e.map(|e| e.worst.to_string())),
            or(e.map(|e| e.worst_layer.to_string())),
            or(e.map(|e| if e.place == Place::Prompt { "prompt" } else { "decode" }.into())),
            or(row.ppl.map(|p| p.ppl.to_string())),
            or(row.ppl.map(|p| p.tokens.to_string())),
            or(row.ppl.map(|p| p.difference.to_string())),
            or(row.ppl.map(|p| p.percent.to_string())),
            or(n.map(|n| n.hits().to_string())),
            or(n.map(|n| n.trials.len().to_string())),
            or(n.map(|n| n.trials.iter().map(|t| if t.hit { '1' } else { '0' }).collect())),
            row.verdict.short().into(),
            quote(&row.verdict.long()),
        ];
        debug_assert_eq!(f.len(), HEADER.len());
        out += &f.join(",");
        out += "\r\n";
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::results;

    /// Fields of one CSV line.
    fn parse(line: &str) -> Vec<String> {
        let (mut out, mut cur, mut quoted) = (Vec::new(), String::new(), false);
        let mut it = line.chars().peekable();
        while let Some(c) = it.next() {
            match c {
                '"' if quoted && it.peek() == Some(&'"') => {
                    it.next();
                    cur.push('"');
                }
                '"' => quoted = !quoted,
                ',' if !quoted => out.push(std::mem::take(&mut cur)),
                c => cur.push(c),
            }
        }
        out.push(cur);
        out
    }

    #[test]
    fn every_number_survives() {
        let mut r = results();
        r.systems[1].name = "with, comma and \"quote\"".into();
        let text = csv(&r);
        let lines: Vec<Vec<String>> = text.lines().map(parse).collect();
        assert_eq!(lines.len(), 1 + r.rows.len());
        let col = |name: &str| lines[0].iter().position(|h| h == name).unwrap();
        for (l, row) in lines[1..].iter().zip(&r.rows) {
            assert_eq!(l.len(), HEADER.len());
            assert_eq!(l[col("system")], r.systems[row.system].name);
            assert_eq!(l[col("prefill_s")].parse::<f64>().unwrap(), row.prefill.seconds);
            assert_eq!(l[col("kv_bytes")].parse::<usize>().unwrap(), row.bytes.total());
            assert_eq!(l[col("ppl")].parse::<f64>().unwrap(), row.ppl.unwrap().ppl);
            assert_eq!(l[col("needle_hits")].parse::<usize>().unwrap(), row.needle.as_ref().unwrap().hits());
            assert_eq!(l[col("verdict_text")], row.verdict.long());
        }
    }
}
