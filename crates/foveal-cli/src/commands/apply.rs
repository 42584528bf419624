//! `foveal apply`.

use super::print_json;
use crate::Context;
use crate::cli::ApplyArgs;
use crate::error::{CliError, Result};
use crate::files;
use candle_core::{DType, Device, Tensor};
use foveal::apply::{ApplyOptions, apply_prefill};
use foveal::system::parse_value;
use foveal::{Slot, Spec, registry};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

/// The mask is one byte a pair; above this it is refused before it is allocated.
const MASK_LIMIT: u64 = 4 << 30;

pub fn run(a: &ApplyArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    let mut spec: Spec = a.id.parse()?;
    for (name, value) in &a.set {
        spec.params.insert(name.clone(), parse_value(value));
    }
    let card = registry::find(&spec.id)?;
    let params = (card.params)();
    let seeded = params.iter().any(|p| p.name == "seed");
    if let (Some(seed), true) = (a.seed, seeded) {
        spec.params.insert("seed".into(), seed.into());
    }
    // Before the file is read: a wrong parameter is the quicker answer.
    let system = registry::build(&spec, Slot::Prefill)?;
    if let Some(s) = a.scale
        && !s.is_finite()
    {
        return Err(CliError::Arguments(format!("--scale {s}: give a finite number")));
    }
    if same_file(&a.input, &a.out) {
        return Err(CliError::Arguments(format!("--out {} is the input file; give another name", a.out.display())));
    }
    let bytes = std::fs::read(&a.input).map_err(|e| CliError::file(&a.input, "read", e))?;
    let [q, k, v] = read_qkv(&a.input, &bytes)?;
    if a.mask {
        let pairs = [q.dims().first(), q.dims().get(1), q.dims().get(2), k.dims().get(2)]
            .into_iter()
            .flatten()
            .try_fold(1u64, |n, &d| n.checked_mul(d as u64));
        if pairs.is_none_or(|n| n > MASK_LIMIT) {
            return Err(CliError::Arguments(format!(
                "--mask for q {:?} and k {:?} would take more than 4 GiB; use fewer tokens or heads",
                q.dims(),
                k.dims()
            )));
        }
    }
    let done = {
        let options = ApplyOptions { scale: a.scale, causal: a.causal, grid: a.grid };
        apply_prefill(&spec.id, system, &q, &k, &v, options)?
    };
    if ctx.cancelled() {
        return Err(CliError::Arguments("interrupted; nothing was written".into()));
    }
    let d = q.dims().last().copied().unwrap_or(1);
    let scale = a.scale.unwrap_or(1.0 / (d as f32).sqrt());

    let mut tensors = vec![("o", done.out.contiguous())];
    tensors.extend(done.lse.clone().map(|lse| ("lse", Ok(lse))));
    if a.mask {
        tensors.push(("mask", Ok(done.mask()?)));
    }
    let tensors: Vec<(&str, Tensor)> =
        tensors.into_iter().map(|(n, t)| Ok((n, t.map_err(foveal::Error::from)?))).collect::<Result<_>>()?;
    // One key: the order of several would differ from run to run.
    let about = json!({
        "system": spec.to_string(), "causal": a.causal, "grid": a.grid.map(|g| g.to_string()), "scale": scale, "version": env!("CARGO_PKG_VERSION"),
    });
    let note = HashMap::from([("foveal".to_string(), about.to_string())]);
    files::write_whole(&a.out, &serialise(&a.out, &tensors, note)?)?;

    let mut effective = serde_json::Map::new();
    for p in params {
        effective.insert(p.name.into(), spec.params.get(p.name).cloned().unwrap_or(p.default));
    }
    let work = |w: foveal::Work| json!({"flops": w.flops, "bytes": w.bytes, "tiles": w.tiles, "pairs": w.pairs, "fallback": w.fallback});
    let (visited, dense) = (done.visited_pairs(), done.dense_pairs());
    print_json(
        out,
        &json!({
            "system": spec.id,
            "params": effective,
            "causal": a.causal,
            "scale": scale,
            "random": seeded,
            "q": q.dims(), "k": k.dims(), "v": v.dims(),
            "work": {"attend": work(done.work), "select": work(done.select)},
            "visited_pairs": visited,
            "dense_pairs": dense,
            "density": if dense == 0 { 0.0 } else { visited as f64 / dense as f64 },
            "out": a.out.display().to_string(),
            "tensors": tensors.iter().map(|(n, t)| (n.to_string(), json!(t.dims()))).collect::<serde_json::Map<_, _>>(),
        }),
    )
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn read_qkv(path: &Path, bytes: &[u8]) -> Result<[Tensor; 3]> {
    let bad = |problem: String| CliError::BadFile { path: path.into(), problem };
    let file = SafeTensors::deserialize(bytes)
        .map_err(|e| bad(format!("damaged or no safetensors file ({e}); write it again with tensors q, k and v")))?;
    let mut names: Vec<String> = file.names().into_iter().map(|n| n.to_string()).collect();
    names.sort_unstable();
    let read = |name: &str| -> Result<Tensor> {
        let t = file.tensor(name).map_err(|_| {
            let there = if names.is_empty() { "no tensors".to_string() } else { names.join(", ") };
            bad(format!("tensor `{name}` is missing; the file holds {there}, and q, k and v are needed"))
        })?;
        let dtype = match t.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(bad(format!("tensor `{name}` has dtype {other:?}; convert it to F32, F16 or BF16"))),
        };
        Tensor::from_raw_buffer(t.data(), dtype, t.shape(), &Device::Cpu)
            .map_err(|e| bad(format!("tensor `{name}` of shape {:?}: {e}", t.shape())))
    };
    Ok([read("q")?, read("k")?, read("v")?])
}

fn serialise(path: &Path, tensors: &[(&str, Tensor)], note: HashMap<String, String>) -> Result<Vec<u8>> {
    let bad = |problem: String| CliError::BadFile { path: path.into(), problem };
    let raw = tensors
        .iter()
        .map(|(name, t)| {
            let flat = t.flatten_all()?;
            Ok(match t.dtype() {
                DType::U8 => (*name, Dtype::U8, t.dims().to_vec(), flat.to_vec1::<u8>()?),
                _ => {
                    let x = flat.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                    (*name, Dtype::F32, t.dims().to_vec(), x.iter().flat_map(|x| x.to_le_bytes()).collect())
                }
            })
        })
        .collect::<std::result::Result<Vec<_>, candle_core::Error>>()
        .map_err(foveal::Error::from)?;
    let views = raw
        .iter()
        .map(|(name, dtype, shape, data)| Ok((*name, TensorView::new(*dtype, shape.clone(), data)?)))
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|e| bad(e.to_string()))?;
    safetensors::serialize(views, Some(note)).map_err(|e| bad(e.to_string()))
}
