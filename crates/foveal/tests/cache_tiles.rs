//! Many rows at once over a store in bf16 or int8, where machines with bf16 tiles attend on them: the
//! same as one row at a time, and the same as vector code.
//!
//! What may differ. On tiles the queries, the keys that a policy rebuilds and the attention weights are
//! rounded to bf16, each by a factor within 1 ± u, u = 2⁻⁸. Rounded queries and keys move a logit by
//! scale·Σ q_c·k_c·ε_c with independent |ε_c| < 2u, here (logits to ±10, heads of 64) with a standard deviation
//! of about 2u; weights change by as much, and an output, being their mean of values, by less. So:
//!
//! - no element moves by more than 8u·max|v|, four standard deviations;
//! - a whole output moves by at most 4u of its norm.
//!
//! Which keys a bf16 store's rows read may not differ at all: choices are made with f32 queries on
//! the keys as stored. Keys in int8 are rounded to bf16 before tiles score them, which may decide between near
//! equals otherwise; then a weight goes elsewhere, and only the norm is held, within 8u.

mod cache_layer;

use cache_layer::{ACTIVE, H, Tokens, fill, layer, policy, run, step};
use foveal::cache::CacheCtx;
use foveal::prim::kv::KvDtype;
use foveal::{Slot, Spec, registry};
use foveal_kernels::Isa;
use std::process::Command;

const PROMPT: usize = 130;
const D: usize = 64;
const U: f32 = 1.0 / 256.0;
/// Set to a file's name in the process that computes the reference.
const OUTPUT: &str = "FOVEAL_TEST_OUTPUT";

/// [`ACTIVE`], each policy by its defaults too, and the dense store.
fn specs() -> Vec<String> {
    let caches = registry::cards().iter().filter(|c| c.has_slot(Slot::Cache));
    let ids: Vec<&str> = caches.map(|c| c.id).collect();
    for id in &ids {
        let dense = *id == "flashattention-2";
        assert!(dense || ACTIVE.iter().any(|s| s.starts_with(id)), "{id} has no setting among those tested");
    }
    ids.into_iter().chain(ACTIVE.iter().copied()).map(String::from).collect()
}

/// Every case: the spec, storage, rows at once, and the layer.
fn cases() -> Vec<(String, KvDtype, usize, CacheCtx, Tokens)> {
    let mut out = Vec::new();
    for spec in specs() {
        for (dtype, rows, window) in [
            (KvDtype::Bf16, 40, None),
            (KvDtype::Bf16, 100, None),
            (KvDtype::Int8, 100, None),
            (KvDtype::Bf16, 100, Some(70)),
        ] {
            let (mut ctx, t) = layer(D, PROMPT + rows, 23, false, false);
            (ctx.dtype, ctx.window) = (dtype, window);
            out.push((spec.clone(), dtype, rows, ctx, t));
        }
    }
    out
}

fn norm(x: &[f32]) -> f32 {
    x.iter().map(|x| x * x).sum::<f32>().sqrt()
}

/// What is wrong with `got`, if anything.
fn complaint(what: &str, got: &[f32], want: &[f32], ctx: &CacheCtx, t: &Tokens) -> Option<String> {
    assert_eq!(got.len(), want.len(), "{what}");
    let off: Vec<f32> = got.iter().zip(want).map(|(a, b)| a - b).collect();
    let top = |x: &[f32]| x.iter().fold(0f32, |m, x| m.max(x.abs()));
    let (relative, most) = (norm(&off) / norm(want), top(&off));
    let (whole, each) = match ctx.dtype {
        KvDtype::Int8 => (8.0 * U, f32::INFINITY),
        _ => (4.0 * U, 8.0 * U * top(&t.v)),
    };
    // NaN is not within either.
    let fine = relative <= whole && most <= each;
    (!fine).then(|| format!("{what}: relative error {relative:.2e} of {whole:.2e}, largest {most:.2e} of {each:.2e}"))
}

#[test]
fn many_rows_agree_with_one_at_a_time() {
    let mut complaints = Vec::new();
    for (spec, dtype, rows, ctx, t) in cases() {
        let what = format!("{spec}, {dtype}, {rows} rows, window {:?}", ctx.window);
        let p = policy(&spec);
        let one = run(&*p, &ctx, &t, PROMPT, &[1]);
        complaints.extend(complaint(&what, &run(&*p, &ctx, &t, PROMPT, &[rows]), &one, &ctx, &t));
        // What the last row read, key by key.
        let [mut a, mut b] = [(); 2].map(|_| policy(&spec).layer(&ctx).unwrap());
        fill(&mut *a, &t, PROMPT);
        fill(&mut *b, &t, PROMPT);
        step(&mut *a, &t, PROMPT, t.t);
        (PROMPT..t.t).for_each(|i| drop(step(&mut *b, &t, i, i + 1)));
        if dtype != KvDtype::Int8 && a.last_visited() != b.last_visited() {
            complaints.push(format!("{what}: the last row reads other keys"));
        }
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// Outputs of many rows at once under the instruction set in force, case after case.
fn outputs() -> Vec<f32> {
    cases().iter().flat_map(|(spec, _, rows, ctx, t)| run(&*policy(spec), ctx, t, PROMPT, &[*rows])).collect()
}

/// An instruction set is in force for a whole process, so the reference is computed in one of its own.
#[test]
fn tiles_agree_with_vector_code() {
    if let Some(file) = std::env::var_os(OUTPUT) {
        let bytes: Vec<u8> = outputs().iter().flat_map(|x| x.to_le_bytes()).collect();
        return std::fs::write(file, bytes).unwrap();
    }
    if Isa::active() != Isa::Amx {
        return eprintln!("no bf16 tiles on this machine: nothing to compare");
    }
    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tiles-{}", std::process::id()));
    let this = std::env::current_exe().unwrap();
    let child = Command::new(this)
        .args(["--exact", "tiles_agree_with_vector_code"])
        .envs([(OUTPUT, file.as_os_str()), ("FOVEAL_ISA", "avx512".as_ref())])
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    let bytes = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let want: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let (got, mut at) = (outputs(), 0);
    let (mut complaints, mut on_tiles) = (Vec::new(), Vec::new());
    for (spec, dtype, rows, ctx, t) in cases() {
        let span = at..at + H * D * rows;
        at = span.end;
        let what = format!("{spec}, {dtype}, {rows} rows, window {:?}", ctx.window);
        complaints.extend(complaint(&what, &got[span.clone()], &want[span.clone()], &ctx, &t));
        if got[span.clone()] != want[span] {
            on_tiles.push(spec.parse::<Spec>().unwrap().id);
        }
    }
    assert_eq!((at, at), (got.len(), want.len()));
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
    // Equal to the last bit would mean that the tiles were not used.
    for id in ["loki", "tokenselect", "palu"] {
        assert!(on_tiles.iter().any(|x| x == id), "{id} did not run on tiles");
    }
}
