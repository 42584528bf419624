//! Attention over feature maps on candle tensors, with gradients.

use crate::error::{Error, Result};
use crate::prim::conv::{WorkCell, cpu, gradient, readable, wrap};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Tensor};
use foveal_kernels::feature::{FeatureAttend, FeatureGrads};
use foveal_kernels::{View, ViewMut, Work};

/// Options of one call.
#[derive(Clone, Debug, Default)]
pub struct FeatureOptions {
    /// Query i of n sees keys up to m − n + i.
    pub causal: bool,
    /// Divide by the sum of weights plus this ε; `None`: no division.
    pub normalise: Option<f32>,
}

/// o_i = Σ_j c_(i−j) (q_i·k_j) v_j / (Σ_j c_(i−j) q_i·k_j + ε) over visible keys; q and k are feature maps already.
///
/// q is (B, H, Tq, R), k (B, H_kv, Tk, R), v (B, H_kv, Tk, Dv), f32 or bf16 of one dtype; `weights` (H, 2T − 1) holds
/// c_(i−j) at i − j + T − 1 (all one if absent) and needs Tq = Tk. Returns f32 (B, H, Tq, Dv) and the work done.
pub fn feature_attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    weights: Option<&Tensor>,
    options: &FeatureOptions,
) -> Result<(Tensor, Work)> {
    const OP: &str = "feature_attend";
    for (name, x) in [("q", q), ("k", k), ("v", v)] {
        readable(OP, name, x, 4, "(batch, heads, tokens, features)")?;
        if x.dtype() != q.dtype() {
            return Err(Error::Dtype {
                op: OP,
                tensor: name,
                dtype: format!("{:?}", x.dtype()),
                expected: "the dtype of q",
            });
        }
    }
    let rows = |x: &Tensor| if x.stride()[3] == 1 || x.dims()[3] <= 1 { Ok(x.clone()) } else { x.contiguous() };
    let (q, k, v) = (rows(q)?, rows(k)?, rows(v)?);
    let work = WorkCell::default();
    let options = options.clone();
    let Some(c) = weights else {
        let out = q.apply_op3(&k, &v, Plain { options, work: work.clone() })?;
        return Ok((out, work.get()));
    };
    readable(OP, "weights", c, 2, "(heads, 2 * tokens - 1)")?;
    // An operation has at most three arguments: k and v travel as one.
    let (kb, kh, kt, r) = k.dims4()?;
    let (vb, vh, vt, _) = v.dims4()?;
    if (kb, kh, kt) != (vb, vh, vt) {
        let expected = format!("({kb}, {kh}, {kt}, v_dim) as k");
        return Err(Error::Shape { op: OP, tensor: "v", shape: v.dims().to_vec(), expected });
    }
    let kv = Tensor::cat(&[&k, &v], 3)?;
    let c = c.to_dtype(DType::F32)?.contiguous()?;
    let out = q.apply_op3(&kv, &c, Weighted { options, features: r, work: work.clone() })?;
    Ok((out, work.get()))
}

/// Part of a 4-D tensor's last dimension as a view.
fn view<'a, T: Copy>(
    x: &'a [T],
    layout: &Layout,
    name: &'static str,
    from: usize,
    width: usize,
) -> candle_core::Result<View<'a, T>> {
    let (d, s) = (layout.dims(), layout.stride());
    let at = (layout.start_offset() + from).min(x.len());
    View::new(name, &x[at..], [d[0], d[1], d[2], width], [s[0], s[1], s[2]]).map_err(wrap)
}

/// Run `$body` with `$x` bound to the slices of the storages, whichever dtype they share.
macro_rules! slices {
    ([$($s:expr),*], [$($x:ident),*] => $body:expr) => {
        match ($($s),*) {
            ($(CpuStorage::F32($x)),*) => $body,
            ($(CpuStorage::BF16($x)),*) => $body,
            _ => candle_core::bail!("feature_attend: q, k and v differ in dtype; convert them to one of f32, bf16"),
        }
    };
}

struct Plain {
    options: FeatureOptions,
    work: WorkCell,
}

fn kernel<'a>(o: &FeatureOptions, weights: Option<&'a [f32]>) -> FeatureAttend<'a> {
    FeatureAttend { causal: o.causal, normalise: o.normalise, weights, ..FeatureAttend::default() }
}

/// Gradient buffers of q, k and v.
struct Buffers([Vec<f32>; 3]);

impl Buffers {
    fn new(shapes: [[usize; 4]; 3]) -> Self {
        Self(shapes.map(|s| vec![0f32; s.iter().product()]))
    }
}

/// Forward into fresh contiguous (B, H, Tq, Dv).
fn forward<T: foveal_kernels::Element>(
    p: &FeatureAttend,
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    cell: &WorkCell,
) -> candle_core::Result<(CpuStorage, Shape)> {
    let shape = [q.shape[0], q.shape[1], q.shape[2], v.shape[3]];
    let mut out = vec![0f32; shape.iter().product()];
    cell.set(p.run(q, k, v, &mut ViewMut::contiguous("out", &mut out, shape).map_err(wrap)?, None).map_err(wrap)?);
    Ok((CpuStorage::F32(out), Shape::from((shape[0], shape[1], shape[2], shape[3]))))
}

/// Gradients of q, k, v and, if asked for, the weights.
fn backward<T: foveal_kernels::Element>(
    p: &FeatureAttend,
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    dout: &Tensor,
    dweights: Option<&mut [f32]>,
) -> candle_core::Result<[Vec<f32>; 3]> {
    let dout = dout.contiguous()?;
    let (gs, gl) = dout.storage_and_layout();
    let go = view(cpu(&gs)?.as_slice::<f32>()?, gl, "dout", 0, v.shape[3])?;
    let mut g = Buffers::new([q.shape, k.shape, v.shape]);
    let [dq, dk, dv] = &mut g.0;
    let grads = FeatureGrads {
        dq: &mut ViewMut::contiguous("dq", dq, q.shape).map_err(wrap)?,
        dk: &mut ViewMut::contiguous("dk", dk, k.shape).map_err(wrap)?,
        dv: &mut ViewMut::contiguous("dv", dv, v.shape).map_err(wrap)?,
        dweights,
    };
    p.backward(q, k, v, &go, grads).map_err(wrap)?;
    Ok(g.0)
}

impl CustomOp3 for Plain {
    fn name(&self) -> &'static str {
        "feature_attend"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let p = kernel(&self.options, None);
        slices!([q, k, v], [q, k, v] => forward(
            &p,
            &view(q, ql, "q", 0, ql.dims()[3])?,
            &view(k, kl, "k", 0, kl.dims()[3])?,
            &view(v, vl, "v", 0, vl.dims()[3])?,
            &self.work,
        ))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let p = kernel(&self.options, None);
        let [dq, dk, dv] = {
            let ((qs, ql), (ks, kl)) = (q.storage_and_layout(), k.storage_and_layout());
            let (vs, vl) = v.storage_and_layout();
            slices!([cpu(&qs)?, cpu(&ks)?, cpu(&vs)?], [qd, kd, vd] => backward(
                &p,
                &view(qd, ql, "q", 0, ql.dims()[3])?,
                &view(kd, kl, "k", 0, kl.dims()[3])?,
                &view(vd, vl, "v", 0, vl.dims()[3])?,
                dout,
                None,
            )?)
        };
        Ok((gradient(dq, q)?, gradient(dk, k)?, gradient(dv, v)?))
    }
}

struct Weighted {
    options: FeatureOptions,
    /// Width of k in the joined k | v.
    features: usize,
    work: WorkCell,
}

impl CustomOp3 for Weighted {
    fn name(&self) -> &'static str {
        "feature_attend"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        kv: &CpuStorage,
        kl: &Layout,
        c: &CpuStorage,
        cl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let c = &c.as_slice::<f32>()?[cl.start_offset()..cl.start_offset() + cl.shape().elem_count()];
        let (p, r) = (kernel(&self.options, Some(c)), self.features);
        slices!([q, kv], [q, kv] => forward(
            &p,
            &view(q, ql, "q", 0, ql.dims()[3])?,
            &view(kv, kl, "k", 0, r)?,
            &view(kv, kl, "v", r, kl.dims()[3] - r)?,
            &self.work,
        ))
    }

    fn bwd(
        &self,
        q: &Tensor,
        kv: &Tensor,
        c: &Tensor,
        _: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let r = self.features;
        let dv_width = kv.dims()[3] - r;
        let mut dc = vec![0f32; c.elem_count()];
        let [dq, dk, dv] = {
            let ((qs, ql), (ks, kl)) = (q.storage_and_layout(), kv.storage_and_layout());
            let (cs, cl) = c.storage_and_layout();
            let weights = &cpu(&cs)?.as_slice::<f32>()?[cl.start_offset()..cl.start_offset() + dc.len()];
            let p = kernel(&self.options, Some(weights));
            slices!([cpu(&qs)?, cpu(&ks)?], [qd, kd] => backward(
                &p,
                &view(qd, ql, "q", 0, ql.dims()[3])?,
                &view(kd, kl, "k", 0, r)?,
                &view(kd, kl, "v", r, dv_width)?,
                dout,
                Some(&mut dc),
            )?)
        };
        let rows = dk.chunks_exact(r.max(1)).zip(dv.chunks_exact(dv_width.max(1)));
        let dkv = rows.flat_map(|(k, v)| k.iter().chain(v).copied()).collect();
        Ok((gradient(dq, q)?, gradient(dkv, kv)?, gradient(dc, c)?))
    }
}
