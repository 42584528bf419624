//! The page of `bench ops --report`: the roofline picture and the table, self-contained.

use super::html::{SCRIPT, STYLE, figure};
use super::num;
use super::svg::{self, esc};
use crate::roofline::{COLUMNS, Roofline, cells};
use std::fmt::Write;

/// The page.
pub fn roofline(r: &Roofline) -> String {
    let mut s = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>Foveal: operations on {0}</title>\n<style>{STYLE}</style></head><body><main>\n<h1>How near the operations come to {0}</h1>\n",
        esc(&r.cpu)
    );
    let _ = writeln!(
        s,
        "<p class=\"mute\">{} operations, {} threads, {}, {}. Took {:.0} s.</p>",
        r.points.len(),
        r.threads,
        esc(&r.isa),
        esc(&r.date),
        r.seconds
    );
    s += "<section id=\"ceilings\"><h2>What the machine can do</h2>\n<div class=\"scroll\"><table><thead><tr><th scope=\"col\">ceiling</th><th scope=\"col\">threads</th><th scope=\"col\">rate</th></tr></thead><tbody>\n";
    for c in r.ceilings.list() {
        let _ = writeln!(
            s,
            "<tr><td>{}</td><td>{}</td><td>{} {}</td></tr>",
            esc(&c.what),
            c.threads,
            num(c.rate),
            esc(&c.unit)
        );
    }
    s += "</tbody></table></div>\n<p class=\"mute\">The fastest of repeated calls, measured before and after the operations, for other programs can only lower a rate. Arithmetic is in registers alone; products are of matrices, in f32 by the library gemm, in bf16 by this one's own linear layer.</p></section>\n<section id=\"roofline\"><h2>Roofline</h2>\n";
    s += &figure(
        &svg::roofline(r),
        "Rate against arithmetic intensity, both from the operations and bytes that the kernels count. Slanted: what memory can feed, on one thread and on all. Level: arithmetic in registers in f32 and bf16, dashed the matrix products. Blue is f32, orange bf16, green integers. What stays in a cache between calls may lie above the slant.",
    );
    s += "</section>\n<section id=\"operations\"><h2>Operations</h2><p class=\"mute\">Click a header to sort; hover over it for its meaning.</p>\n<div class=\"scroll\"><table class=\"sort\"><thead><tr>";
    for (i, (name, hint)) in COLUMNS.iter().enumerate() {
        let l = if i < 4 { " class=\"l\"" } else { "" };
        let _ = write!(s, "<th scope=\"col\"{l} title=\"{}\"><button>{}</button></th>", esc(hint), esc(name));
    }
    s += "</tr></thead><tbody>\n";
    for (i, p) in r.points.iter().enumerate() {
        s += "<tr>";
        for (j, (text, value)) in cells(i + 1, p).iter().enumerate() {
            let l = if j < 4 { " class=\"l\"" } else { "" };
            let v = value.map_or_else(String::new, |v| format!(" data-v=\"{v}\""));
            let _ = write!(s, "<td{l}{v}>{}</td>", esc(text));
        }
        s += "</tr>\n";
    }
    let _ = writeln!(
        s,
        "</tbody></table></div></section>\n<section id=\"facts\"><h2>To repeat it</h2><pre>{}</pre><p class=\"mute\">foveal {}</p></section>\n<script>{SCRIPT}</script></main></body></html>",
        esc(&r.command),
        esc(&r.version)
    );
    s
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roofline::tests::sample;

    #[test]
    fn the_page_is_whole_and_needs_nothing_else() {
        let page = roofline(&sample());
        for outside in ["http:", "https:", "//cdn", "<link", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "the page refers to {outside}");
        }
        for id in ["ceilings", "roofline", "operations", "facts"] {
            assert!(page.contains(&format!("<section id=\"{id}\">")), "{id}");
        }
        for tag in ["section", "table", "tr", "td", "figure", "svg", "div", "g", "main"] {
            let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        assert!(page.contains("attend &lt;full&gt;") && page.contains("a &lt;processor&gt;"));
        assert!(!page.replace(SCRIPT, "").contains("NaN") && !page.contains("<full>"));
        // A dot and its hint for each operation.
        assert_eq!(page.matches("class=\"dot\"").count(), 3);
    }

    #[test]
    fn no_operations_no_trouble() {
        let mut r = sample();
        r.points.clear();
        assert!(roofline(&r).contains("0 operations"));
    }
}
