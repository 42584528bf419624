//! Operations beside the ceilings of the machine (the roofline model: Williams, Waterman and Patterson 2009).
//!
//! An operation of I operations a byte can run no faster than the arithmetic of its type, nor than I times the bandwidth
//! of memory. Both its operations and its bytes are those that the kernels count themselves.

use crate::bench::OpRow;
use crate::ceilings::Ceilings;
use crate::report::markdown;
use serde::{Deserialize, Serialize};

/// What holds an operation back, by the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// The bandwidth of memory.
    Memory,
    /// Arithmetic.
    Compute,
}

/// One operation under its roof.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The measurement.
    #[serde(flatten)]
    pub row: OpRow,
    /// Operations a byte.
    pub intensity: f64,
    /// The most that the model allows, 10⁹ operations a second.
    pub roof: f64,
    /// Rate / roof. Above 1 where operands stay in a cache between the calls.
    pub share: f64,
    /// Which roof it is.
    pub bound: Bound,
}

/// A run of `bench ops` with the ceilings measured before it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Roofline {
    /// Version of Foveal.
    pub version: String,
    /// Date of the run.
    pub date: String,
    /// Processor name.
    pub cpu: String,
    /// Instruction set in force.
    pub isa: String,
    /// Threads.
    pub threads: usize,
    /// The command that repeats the run.
    pub command: String,
    /// Seconds of the whole run.
    pub seconds: f64,
    /// What the machine can do.
    pub ceilings: Ceilings,
    /// What the operations do.
    pub points: Vec<Point>,
}

/// The rows under their roofs. Exponentials and merges, which count one or three operations an element, are placed like all
/// others: their roof is memory.
pub fn place(ceilings: &Ceilings, rows: Vec<OpRow>) -> Vec<Point> {
    let point = |row: OpRow| {
        let intensity = row.flops as f64 / (row.bytes as f64).max(1.0);
        let memory = intensity * ceilings.read_all.rate;
        let compute = ceilings.compute(&row.dtype);
        let (roof, bound) = if memory < compute { (memory, Bound::Memory) } else { (compute, Bound::Compute) };
        let share = if roof > 0.0 { row.gflops / roof } else { 0.0 };
        Point { row, intensity, roof, share, bound }
    };
    rows.into_iter().map(point).collect()
}

/// Cells of one point: its number, what was run, rates, place.
pub(crate) const COLUMNS: [(&str, &str); 12] = [
    ("operation", "its number is that of the picture"),
    ("shape", "batch, heads (key/value heads), tokens, width; or rows and features; or batch, channels, samples"),
    ("type", "storage; sums are f32"),
    ("isa", "instruction set asked for"),
    ("ms", "median"),
    ("GFLOP/s", "operations counted by the kernel, from the median"),
    ("GB/s", "bytes counted by the kernel, from the median"),
    ("FLOP/byte", "arithmetic intensity"),
    ("roof GFLOP/s", "the lower of the arithmetic rate and the intensity times the bandwidth"),
    ("% of roof", "above 100 where operands stay in a cache"),
    ("bound", "which roof is the lower"),
    ("slower path %", "share of the operations that a slower path than the instruction set's did"),
];

/// Number, cells and their values (for sorting) in the order of [`COLUMNS`].
pub(crate) fn cells(number: usize, p: &Point) -> [(String, Option<f64>); 12] {
    let text = |s: &str| (s.to_string(), None);
    let value = |x: f64| (crate::report::num(x), Some(x));
    let slower = 100.0 * p.row.fallback as f64 / p.row.flops.max(1) as f64;
    [
        text(&format!("{number} {}", p.row.op)),
        text(&p.row.shape),
        text(&p.row.dtype),
        text(&p.row.isa),
        value(p.row.median_ms),
        value(p.row.gflops),
        value(p.row.gbytes),
        value(p.intensity),
        value(p.roof),
        (format!("{:.0}", 100.0 * p.share), Some(100.0 * p.share)),
        text(match p.bound {
            Bound::Memory => "memory",
            Bound::Compute => "compute",
        }),
        (if slower > 0.0 { format!("{slower:.0}") } else { String::new() }, Some(slower)),
    ]
}

/// Tables for a terminal: ceilings, then operations.
pub fn tables(r: &Roofline) -> String {
    let mut s = format!("{}, {} threads, {}\n\n", r.cpu, r.threads, r.isa);
    let ceilings = r.ceilings.list().map(|c| {
        let threads = format!("{} thread{}", c.threads, if c.threads == 1 { "" } else { "s" });
        vec![c.what.clone(), threads, format!("{} {}", crate::report::num(c.rate), c.unit)]
    });
    s += &markdown(&["ceiling", "threads", "rate"], &ceilings, 2);
    s.push('\n');
    let rows: Vec<Vec<String>> =
        r.points.iter().enumerate().map(|(i, p)| cells(i + 1, p).map(|c| c.0).to_vec()).collect();
    s += &markdown(&COLUMNS.map(|c| c.0), &rows, 4);
    s
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ceilings::Ceiling;

    pub(crate) fn sample() -> Roofline {
        let ceiling = |what: &str, rate| Ceiling { what: what.into(), threads: 2, rate, unit: "GFLOP/s".into() };
        let row = |op: &str, dtype: &str, flops, bytes, gflops, fallback| OpRow {
            op: op.into(),
            shape: "1x2x3".into(),
            dtype: dtype.into(),
            isa: "avx2".into(),
            threads: 2,
            median_ms: 1.5,
            min_ms: 1.0,
            reps: 3,
            gflops,
            gbytes: 1.0,
            flops,
            bytes,
            tiles: 0,
            pairs: 0,
            fallback,
        };
        let ceilings = Ceilings {
            f32_arithmetic: ceiling("f32 arithmetic", 100.0),
            bf16_arithmetic: ceiling("bf16 arithmetic", 1000.0),
            f32_product: ceiling("f32 product", 80.0),
            bf16_product: ceiling("bf16 product", 600.0),
            read_one: ceiling("memory read", 10.0),
            read_all: ceiling("memory read", 20.0),
            exp: ceiling("exponentials <in cache>", 4.0),
        };
        let rows = vec![
            row("attend <full>", "f32", 5000, 100, 50.0, 0),
            row("decode", "bf16", 100, 100, 18.0, 50),
            row("attend", "bf16", 50_000, 100, 500.0, 0),
        ];
        Roofline {
            version: "0".into(),
            date: "2026-01-02".into(),
            cpu: "a <processor>".into(),
            isa: "amx".into(),
            threads: 2,
            command: "foveal bench ops --report x.html".into(),
            seconds: 3.0,
            points: place(&ceilings, rows),
            ceilings,
        }
    }

    #[test]
    fn each_operation_has_the_lower_roof() {
        let r = sample();
        let place = |i: usize| (r.points[i].roof, r.points[i].bound, r.points[i].share);
        assert_eq!(place(0), (100.0, Bound::Compute, 0.5));
        assert_eq!(place(1), (20.0, Bound::Memory, 0.9));
        assert_eq!(place(2), (1000.0, Bound::Compute, 0.5));
    }

    #[test]
    fn tables_have_a_line_each() {
        let t = tables(&sample());
        assert!(t.contains("| 2 decode ") && t.contains(" memory |"), "{t}");
        let width = |l: &&str| l.chars().count();
        let rows: Vec<&str> = t.lines().filter(|l| l.starts_with('|')).collect();
        assert_eq!(rows.len(), 2 + 7 + 2 + 3);
        assert!(rows[..9].iter().all(|l| width(l) == width(&rows[0])), "{t}");
        assert!(rows[9..].iter().all(|l| width(l) == width(&rows[9])), "{t}");
    }

    #[test]
    fn json_round_trip() {
        let r = sample();
        let text = serde_json::to_string(&r).unwrap();
        assert_eq!(serde_json::from_str::<Roofline>(&text).unwrap(), r);
    }
}
