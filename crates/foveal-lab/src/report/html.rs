//! The report as one page that needs nothing else: style, script, charts and pictures inside.

use super::svg::{self, esc};
use super::{num, png};
use crate::results::{Place, Results, Role, Row};
use crate::verdict::{FASTER, NEEDLE_LOSS, PPL_LOSS_PERCENT, SMALLER, thousands};
use std::fmt::Write;

pub(super) const STYLE: &str = r#"
:root{color-scheme:light dark;--bg:#fdfdfb;--fg:#1c1d20;--mute:#5d626b;--line:#d9dade;--card:#fff;--good:#17663a;--bad:#a11d2b;--warn:#7a5200;--hit:#2b8a57;--miss:#d9dade}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--fg:#e8e8e4;--mute:#a2a8b3;--line:#363a42;--card:#1c1f24;--good:#6fd49a;--bad:#ff8b96;--warn:#f0c060;--hit:#3fae74;--miss:#363a42}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
main{max-width:1280px;margin:0 auto;padding:1.2rem}h1{margin:.2rem 0}h2{margin:2.2rem 0 .6rem}h3{margin:1.4rem 0 .4rem}
p{max-width:75ch}.mute,figcaption,.note{color:var(--mute)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13.5px;width:100%}
th,td{padding:.28rem .55rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child,td.l,th.l{text-align:left}thead th{vertical-align:bottom}
table.sort{font-size:13px}table.sort th,table.sort td{padding:.28rem .32rem}table.sort th{white-space:normal}
table.sort th:first-child,table.sort td:first-child{position:sticky;left:0;background:var(--bg)}
th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid currentColor}th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
.pays{color:var(--good);font-weight:600}.loses{color:var(--bad);font-weight:600}.nogain{color:var(--warn);font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:1rem}figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.6rem}
svg{width:100%;height:auto;display:block}svg text{fill:var(--fg);font:11px system-ui,sans-serif}svg .label{font-size:12px}svg .tick{fill:var(--mute)}
.grid{stroke:var(--line);stroke-width:1}.limit{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:5 4}.line{fill:none;stroke:currentColor;stroke-width:2}.fit{stroke-dasharray:3 4;opacity:.7;stroke-width:1.3}
.front{fill:none;stroke:var(--mute);stroke-width:1.3;stroke-dasharray:2 3}.dot{fill:var(--card);stroke:currentColor;stroke-width:2}svg .dotnum{font-size:9.5px}.cross{fill:none;stroke:currentColor;stroke-width:2}
.hit{fill:var(--hit)}.miss{fill:var(--miss)}.x{stroke:var(--bad);stroke-width:1.6;fill:none}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1rem;list-style:none;padding:0;font-size:13.5px}.legend b{display:inline-block;min-width:1.5em;text-align:center;border:2px solid currentColor;border-radius:1em;font-size:11px;margin-right:.3em}.legend span{color:var(--fg)}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:1rem}.maps img{width:100%;image-rendering:pixelated;border:1px solid var(--line);display:block;background:#fafaf8}.maps .wide{aspect-ratio:4/1}
.s0{color:#7b818c}.s1{color:#2f7fd6}.s2{color:#e06c1c}.s3{color:#2b9d63}.s4{color:#c8324a}.s5{color:#8a5cd0}.s6{color:#b1872a}.s7{color:#1a9aa8}.s8{color:#d0559f}.s9{color:#6f8f1f}.s10{color:#5468d8}.s11{color:#a0603a}
code,pre{font:13px/1.45 ui-monospace,monospace}pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.7rem}dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem}dt{color:var(--mute)}dd{margin:0;overflow-wrap:anywhere}
"#;

/// Click on a header sorts by the column's `data-v`.
pub(super) const SCRIPT: &str = r#"
for(const t of document.querySelectorAll("table.sort"))t.querySelectorAll("thead th").forEach((h,i)=>{h.querySelector("button").addEventListener("click",()=>{
const up=h.getAttribute("aria-sort")!=="ascending";t.querySelectorAll("thead th").forEach(x=>x.removeAttribute("aria-sort"));h.setAttribute("aria-sort",up?"ascending":"descending");
const b=t.tBodies[0],key=r=>r.cells[i].dataset.v??r.cells[i].textContent;
[...b.rows].sort((p,q)=>{const x=key(p),y=key(q),d=parseFloat(x)-parseFloat(y);return(Number.isNaN(d)?x.localeCompare(y):d)*(up?1:-1)}).forEach(r=>b.append(r))})});
"#;

const COLUMNS: &[(&str, &str)] = &[
    ("system", "prefill system and cache policy with their parameters"),
    ("prompt s", "whole model, median of the repeats"),
    ("/ dense", "below 1 is faster"),
    ("attention s", "attention alone, the choice of what to visit included"),
    ("/ dense", "below 1 is faster"),
    ("seen %", "query-key pairs computed for the prompt, share of dense"),
    ("decode tok/s", "one token at a time at this depth"),
    ("/ dense", "above 1 is faster"),
    ("read %", "query-key pairs per decoded token, share of dense"),
    ("KV MiB", "bytes held by the store after the prompt, measured"),
    ("/ dense", "below 1 is smaller"),
    ("error mean", "relative error of the attention output, mean over layers"),
    ("error worst", "worst layer"),
    ("perplexity", "last quarter of the text given the rest"),
    ("+- %", "against dense"),
    ("needles", "passkeys found"),
    ("verdict", "see below for the thresholds"),
];

fn class(row: &Row) -> &'static str {
    match row.verdict.short() {
        "pays" => "pays",
        "loses quality" | "failed" => "loses",
        "no gain" => "nogain",
        _ => "mute",
    }
}

fn table(r: &Results, length: usize) -> String {
    let mut s = String::from("<div class=\"scroll\"><table class=\"sort\"><thead><tr>");
    for (i, (name, hint)) in COLUMNS.iter().enumerate() {
        let l = if i == 0 || i + 1 == COLUMNS.len() { " class=\"l\"" } else { "" };
        let _ = write!(s, "<th scope=\"col\"{l} title=\"{}\"><button>{}</button></th>", esc(hint), esc(name));
    }
    s += "</tr></thead><tbody>\n";
    for row in r.at(length) {
        let i = &r.systems[row.system];
        let _ = write!(s, "<tr><td>{} {}</td>", row.system, esc(&i.name));
        if row.verdict.short() == "failed" {
            for _ in 2..COLUMNS.len() {
                s += "<td data-v=\"-1\">–</td>";
            }
        } else {
            let mut cell = |x: f64, shown: String| {
                let _ = write!(s, "<td data-v=\"{x}\">{shown}</td>");
            };
            let (p, d, b) = (&row.prefill, &row.decode, &row.bytes);
            let same = |shared: bool, x: f64| if shared && row.system > 0 { "=".into() } else { format!("{x:.2}") };
            cell(p.seconds, num(p.seconds));
            cell(p.ratio, same(p.shared, p.ratio));
            cell(p.attention_seconds, num(p.attention_seconds));
            cell(p.attention_ratio, same(p.shared, p.attention_ratio));
            cell(p.density, format!("{:.1}", p.density * 100.0));
            cell(d.tokens_per_second, num(d.tokens_per_second));
            cell(d.ratio, same(d.shared, d.ratio));
            cell(d.density, format!("{:.1}", d.density * 100.0));
            let mib = b.total() as f64 / f64::from(1 << 20);
            cell(mib, num(mib));
            cell(b.ratio, format!("{:.2}", b.ratio));
            match &row.error {
                Some(e) => {
                    let place = if e.place == Place::Prompt { "prompt rows" } else { "decoded rows" };
                    let _ = write!(
                        s,
                        "<td data-v=\"{0}\" title=\"{place}\">{1}</td><td data-v=\"{2}\" title=\"layer {3}\">{4}</td>",
                        e.mean,
                        num(e.mean),
                        e.worst,
                        e.worst_layer,
                        num(e.worst)
                    );
                }
                None => s += "<td data-v=\"-1\">–</td><td data-v=\"-1\">–</td>",
            }
            match &row.ppl {
                Some(p) => {
                    let _ = write!(
                        s,
                        "<td data-v=\"{}\">{}</td><td data-v=\"{}\">{:+.2}</td>",
                        p.ppl,
                        num(p.ppl),
                        p.percent,
                        p.percent
                    );
                }
                None => s += "<td data-v=\"-1\">–</td><td data-v=\"-1\">–</td>",
            }
            match &row.needle {
                Some(n) => {
                    let _ = write!(s, "<td data-v=\"{0}\">{0}/{1}</td>", n.hits(), n.trials.len());
                }
                None => s += "<td data-v=\"-1\">–</td>",
            }
        }
        let _ = writeln!(
            s,
            "<td class=\"l {}\" title=\"{}\">{}</td></tr>",
            class(row),
            esc(&row.verdict.long()),
            row.verdict.short()
        );
    }
    s + "</tbody></table></div>\n"
}

pub(super) fn figure(svg: &str, caption: &str) -> String {
    format!("<figure>{svg}<figcaption>{}</figcaption></figure>\n", esc(caption))
}

/// The page.
pub fn html(r: &Results) -> String {
    let f = &r.facts;
    // The description goes on after the name: "name: family, size, …".
    let name = f.model.split_once(": ").map_or(f.model.as_str(), |(name, _)| name);
    let mut s = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>Foveal: attention on {}</title>\n<style>{STYLE}</style></head><body><main>\n<h1>Which attention should {} use?</h1>\n",
        esc(name),
        esc(name)
    );
    let lengths: Vec<String> = r.lengths.iter().map(|&l| thousands(l as u64)).collect();
    let _ = writeln!(
        s,
        "<p class=\"mute\">{} systems at {} tokens on {} ({} threads, {}), {}. Took {:.0} s.</p>",
        r.systems.len(),
        lengths.join(", "),
        esc(&f.cpu),
        f.threads,
        esc(&f.isa),
        esc(&f.date),
        r.seconds
    );

    s += "<section id=\"verdicts\"><h2>Verdicts</h2>\n";
    let _ = writeln!(
        s,
        "<p>A system <b class=\"pays\">pays</b> when it makes the prompt faster (time below {FASTER} of dense), or decoding faster, or the store smaller (bytes below {SMALLER}), while perplexity rises by at most {PPL_LOSS_PERCENT}% and at most {NEEDLE_LOSS} needle is lost. It <b class=\"loses\">loses quality</b> beyond that, whatever it gains. Otherwise there is <b class=\"nogain\">no gain at this length</b>; the crossover is where times fitted with a + bT + cT² meet dense's. Prefill systems are judged on the prompt, cache policies on decoding and bytes.</p>"
    );
    s += "<div class=\"scroll\"><table><thead><tr><th scope=\"col\">system</th>";
    for l in &lengths {
        let _ = write!(s, "<th scope=\"col\" class=\"l\">{l} tokens</th>");
    }
    s += "</tr></thead><tbody>\n";
    for (i, info) in r.systems.iter().enumerate().skip(1) {
        let _ = write!(s, "<tr><td><b>{i}</b> {}</td>", esc(&info.name));
        for &l in &r.lengths {
            match r.row(i, l) {
                Some(row) => {
                    let long = row.verdict.long();
                    let rest = long.strip_prefix(row.verdict.short()).unwrap_or(&long);
                    let _ = write!(
                        s,
                        "<td class=\"l\" style=\"white-space:normal\"><span class=\"{}\">{}</span>{}</td>",
                        class(row),
                        row.verdict.short(),
                        esc(rest)
                    );
                }
                None => s += "<td class=\"l\">–</td>",
            }
        }
        s += "</tr>\n";
    }
    s += "</tbody></table></div></section>\n";

    s += "<section id=\"tables\"><h2>Measurements</h2><p class=\"mute\">Click a header to sort; hover over it for its meaning. “=” marks dense's own measurement, where a system leaves that part alone.</p>\n";
    for &l in &r.lengths {
        let _ = writeln!(s, "<h3>{} tokens</h3>\n{}", thousands(l as u64), table(r, l));
    }
    s += "</section>\n";

    s += "<section id=\"legend\"><h2>Pictures</h2><ul class=\"legend\">";
    for (i, info) in r.systems.iter().enumerate() {
        let _ = write!(s, "<li class=\"s{}\"><b>{i}</b><span>{}</span></li>", i % 12, esc(&info.name));
    }
    s += "</ul></section>\n";

    let any = |want: fn(Role) -> bool| r.systems.iter().skip(1).any(|i| want(i.role));
    let prompt = any(|x| x != Role::Cache);
    let store = any(|x| x != Role::Prefill);
    s += "<section id=\"time\"><h2>Time against length</h2><div class=\"charts\">\n";
    if prompt || !store {
        s += &figure(
            &svg::times(r, true),
            "Whole prompt. Dashed: the fit beyond the longest length measured. Diamonds: estimated crossovers with dense.",
        );
    }
    if store {
        s += &figure(
            &svg::times(r, false),
            "One decoded token. Dashed: the fit. Diamonds: estimated crossovers with dense.",
        );
    }
    s += "</div></section>\n<section id=\"pareto\"><h2>Quality against time</h2><p class=\"mute\">Lower left is better; the dotted line joins the systems that no other beats on both. The red line is the loss allowed. Beyond 2% the scale is logarithmic.</p><div class=\"charts\">\n";
    // All prompts, then all steps: a row of pictures shows one thing at every length.
    let at = |l: usize| format!("{} tokens", thousands(l as u64));
    for &l in r.lengths.iter().filter(|_| prompt) {
        s += &figure(&svg::pareto_prompt(r, l), &format!("Prompt time, {}", at(l)));
    }
    for &l in r.lengths.iter().filter(|_| store) {
        s += &figure(&svg::pareto_decode(r, l), &format!("Decode time, {}", at(l)));
    }
    s += "</div></section>\n<section id=\"bytes\"><h2>Quality against KV bytes</h2><div class=\"charts\">\n";
    if store {
        for &l in &r.lengths {
            s += &figure(&svg::bytes(r, l), &format!("{} tokens", thousands(l as u64)));
        }
    } else {
        s += "<p class=\"mute\">No cache policy was compared: every store is dense.</p>\n";
    }
    s += "</div></section>\n<section id=\"needles\"><h2>Needles</h2>\n";
    if r.rows.iter().any(|x| x.needle.is_some()) {
        s += &figure(
            &svg::needles(r),
            "Passkeys hidden in the text at even depths, asked for one by one after one reading of the prompt. Filled: given back exactly by greedy decoding. Cross: not.",
        );
    } else {
        s += "<p class=\"mute\">Not measured in this run.</p>\n";
    }
    s += "</section>\n<section id=\"maps\"><h2>What each system looked at</h2>\n";
    match &r.maps {
        Some(m) => {
            let _ = writeln!(
                s,
                "<p class=\"mute\">Layer {}, query head {}, {} tokens. Rows are queries from first (top) to last, columns are keys. The exact map is darker where more attention lies (each row scaled to its own peak); the others are darker where more of the keys were visited. Strips show the keys that the queries decoded last visited, one row each.</p><div class=\"maps\">",
                m.layer,
                m.head,
                thousands(m.length as u64)
            );
            for map in &m.maps {
                let name = &r.systems[map.system].name;
                let wide = if map.rows * 3 < map.cols { " class=\"wide\"" } else { "" };
                let _ = writeln!(
                    s,
                    "<figure><img{wide} alt=\"{0}: {1}\" src=\"{2}\"><figcaption><b>{3}</b> {0}: {1}</figcaption></figure>",
                    esc(name),
                    esc(&map.caption),
                    png::data_uri(map),
                    map.system
                );
            }
            s += "</div>\n";
        }
        None => s += "<p class=\"mute\">Not recorded in this run.</p>\n",
    }
    s += "</section>\n<section id=\"systems\"><h2>Systems</h2><div class=\"scroll\"><table><thead><tr><th scope=\"col\">system</th><th scope=\"col\" class=\"l\">prefill</th><th scope=\"col\" class=\"l\">cache</th><th scope=\"col\" class=\"l\">source</th></tr></thead><tbody>\n";
    for (i, info) in r.systems.iter().enumerate() {
        let _ = writeln!(
            s,
            "<tr><td><b>{i}</b> {}</td><td class=\"l\"><code>{}</code></td><td class=\"l\"><code>{}</code> {}</td><td class=\"l\" style=\"white-space:normal\">{}{}</td></tr>",
            esc(&info.name),
            esc(&info.prefill),
            esc(&info.cache),
            esc(&info.kv_dtype),
            esc(&info.title),
            if info.arxiv.is_empty() { String::new() } else { format!(" (arXiv {})", esc(&info.arxiv)) }
        );
    }
    s += "</tbody></table></div></section>\n<section id=\"facts\"><h2>How this was measured</h2><dl>\n";
    let mut fact = |k: &str, v: String| {
        if !v.is_empty() {
            let _ = writeln!(s, "<dt>{}</dt><dd>{}</dd>", esc(k), esc(&v));
        }
    };
    fact("model", f.model.clone());
    fact(
        "shape",
        format!(
            "{} layers, {} query heads, {} key/value heads of {}",
            f.num_layers, f.num_heads, f.num_kv_heads, f.head_dim
        ),
    );
    fact("weights in memory", format!("{}, {} MiB", f.weights, f.weight_bytes >> 20));
    fact("text", format!("{} ({} tokens)", f.text, thousands(f.text_tokens as u64)));
    fact("calibration", f.calibration.clone());
    fact("seed", f.seed.to_string());
    fact("processor", format!("{}, {} logical processors", f.cpu, f.cores));
    fact("threads", f.threads.to_string());
    fact("instruction set", f.isa.clone());
    fact("system", f.os.clone());
    fact("version", format!("foveal {}", f.version));
    fact("date", f.date.clone());
    fact("wall time", format!("{:.1} s", r.seconds));
    if let Some(p) = r.peak_bytes {
        fact("peak memory", format!("{} MiB", p >> 20));
    }
    s += "</dl>\n";
    if !r.notes.is_empty() {
        s += "<h3>Notes</h3><ul>\n";
        for n in &r.notes {
            let _ = writeln!(s, "<li>{}</li>", esc(n));
        }
        s += "</ul>\n";
    }
    let _ = writeln!(
        s,
        "<h3>To repeat it</h3><pre>{}</pre></section>\n<script>{SCRIPT}</script></main></body></html>",
        esc(&f.command)
    );
    s
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::results;

    #[test]
    fn the_page_needs_nothing_else() {
        let page = html(&results());
        for outside in ["http:", "https:", "//cdn", "<link", "src=\"/", "@import", "url("] {
            assert!(!page.contains(outside), "the page refers to {outside}");
        }
        for part in page.split("src=\"").skip(1) {
            assert!(part.starts_with("data:image/png;base64,"));
        }
    }

    #[test]
    fn all_sections_are_there_and_text_is_escaped() {
        let page = html(&results());
        for id in ["verdicts", "tables", "legend", "time", "pareto", "bytes", "needles", "maps", "systems", "facts"] {
            assert!(page.contains(&format!("<section id=\"{id}\">")), "{id}");
        }
        assert!(page.contains("A paper on think &lt;&amp;&gt;") && !page.contains("<&>"));
        assert!(page.contains("A note with &lt;angle&gt; &amp; &quot;quotes&quot;"));
        assert!(page.contains("foveal compare --seed 7"));
        let mut r = results();
        r.facts.model = "Some-1B.Q4_0: llama 1B parameters".into();
        let page = html(&r);
        assert!(page.contains("<h1>Which attention should Some-1B.Q4_0 use?</h1>"));
        assert!(page.contains("<dd>Some-1B.Q4_0: llama 1B parameters</dd>"));
        assert!(!page.replace(SCRIPT, "").contains("NaN"));
    }

    #[test]
    fn tags_balance() {
        let page = html(&results());
        for tag in ["section", "table", "tr", "td", "figure", "svg", "div", "g", "dl", "main"] {
            let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }

    #[test]
    fn a_page_without_pictures_or_needles_says_so() {
        let mut r = results();
        r.maps = None;
        r.rows.iter_mut().for_each(|x| x.needle = None);
        let page = html(&r);
        assert!(page.contains("Not recorded in this run") && page.contains("Not measured in this run"));
    }
}
