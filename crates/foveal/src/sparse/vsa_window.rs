//! VSA: varied-size window attention (Zhang et al. 2022, arXiv 2204.08446).
//!
//! Queries keep their w×w windows; where a window looks is learned. From the mean input of a window,
//! x̄, a layer predicts for each head an offset and a scale, (o, s) = W LeakyReLU(x̄) + b. The window's w² keys and
//! values are sampled at c + (1 + s)·δ + o, c its centre and δ the places of its tokens around it, by bilinear
//! interpolation, zero outside. Attention within, with a learned bias for each relative position.
//!
//! q, k, v (B, H or H_kv, T, D) and x (B, T, C) over a token grid → (B, H, T, D). Cost: 4·T·C for pooling and
//! predicting, 8·T·H·(D + Dv) for sampling, w² keys per query.

use super::layer_ops::{for_each_query_head, linear, numbers};
use super::{Domain, Grid};
use crate::error::{Error, Result};
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::{AttendBias, AttendOptions, attend};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::{Device, Tensor};
use candle_nn::{Init, VarBuilder};
use foveal_kernels::Work;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VsaWindow {
    /// Side of a window.
    pub window: usize,
}

impl Default for VsaWindow {
    fn default() -> Self {
        Self { window: 7 }
    }
}

impl Config for VsaWindow {
    const DOCS: &'static [(&'static str, &'static str)] =
        &[("window", "side of a window: so many tokens squared ask together and sample as many keys")];
    fn validate(&self) -> std::result::Result<(), String> {
        if !(1..=64).contains(&self.window) {
            return Err(format!("window = {}: use 1 to 64, such as 7", self.window));
        }
        Ok(())
    }
}

struct Layer {
    grid: Grid,
    side: usize,
    offsets: [Tensor; 2],
    scales: [Tensor; 2],
    /// ((2w − 1)², H).
    bias: Tensor,
}

impl MixerSystem for VsaWindow {
    fn layer(&self, dims: &MixerDims, vb: VarBuilder) -> Result<Box<dyn Mixer>> {
        let bad = |message: &str| Error::Param { system: CARD.id.into(), message: message.into() };
        let grid = dims.grid.ok_or_else(|| bad("no token grid: windows need one, such as 14x14"))?;
        if grid.first > 0 {
            return Err(bad("the token grid does not start at token 0: tokens beside it have no window; remove them"));
        }
        let predictor = |name: &str| -> Result<[Tensor; 2]> {
            let init = Init::Randn { mean: 0.0, stdev: 0.1 / (dims.hidden as f64).sqrt() };
            let bias = vb.get_with_hints((2 * dims.heads,), &format!("{name}.bias"), Init::Const(0.0))?;
            Ok([vb.get_with_hints((2 * dims.heads, dims.hidden), &format!("{name}.weight"), init)?, bias])
        };
        let places = (2 * self.window - 1).pow(2);
        let small = Init::Randn { mean: 0.0, stdev: 0.02 };
        Ok(Box::new(Layer {
            grid,
            side: self.window,
            offsets: predictor("sampling_offsets")?,
            scales: predictor("sampling_scales")?,
            bias: vb.get_with_hints((places, dims.heads), "relative_position_bias_table", small)?,
        }))
    }

    fn domain(&self) -> Domain {
        Domain::GRID
    }
}

impl Layer {
    /// Windows down and across.
    fn windows(&self) -> (usize, usize) {
        (self.grid.h.div_ceil(self.side), self.grid.w.div_ceil(self.side))
    }

    /// (B, heads, T, D) to frames filled up to whole windows, (B·t, heads, h, w, D).
    fn frames(&self, x: &Tensor) -> Result<Tensor> {
        let (b, n, _, d) = x.dims4()?;
        let Grid { t, h, w, .. } = self.grid;
        let (down, across) = self.windows();
        let x = x.reshape((b, n, t, h, w, d))?.transpose(1, 2)?.reshape((b * t, n, h, w, d))?;
        let x = x.pad_with_zeros(2, 0, down * self.side - h)?;
        Ok(x.pad_with_zeros(3, 0, across * self.side - w)?)
    }

    /// Frames (N, heads, h, w, D) to windows (N, heads, windows, w², D).
    fn cut(&self, x: &Tensor) -> Result<Tensor> {
        let (n, heads, _, _, d) = x.dims5()?;
        let ((down, across), s) = (self.windows(), self.side);
        let x = x.reshape(vec![n, heads, down, s, across, s, d])?.permute(vec![0, 1, 2, 4, 3, 5, 6])?;
        Ok(x.reshape((n, heads, down * across, s * s, d))?)
    }

    /// What a predictor says of every window: two (N, H, windows, 1), across and down.
    fn predict(&self, pooled: &Tensor, [weight, bias]: &[Tensor; 2]) -> Result<[Tensor; 2]> {
        let (n, windows, _) = pooled.dims3()?;
        let y = linear(pooled, weight, Some(bias))?;
        let y = y.reshape((n, windows, (), 2))?.permute((3, 0, 2, 1))?.contiguous()?;
        let part = |i: usize| Ok::<_, Error>(y.get(i)?.unsqueeze(3)?);
        Ok([part(0)?, part(1)?])
    }

    /// Where each head of each window samples, in tokens: across and down, (N, H, windows, w²).
    fn places(&self, x: &Tensor) -> Result<[Tensor; 2]> {
        let (b, t, c) = x.dims3()?;
        let ((down, across), s) = (self.windows(), self.side);
        let pooled = self.cut(&self.frames(&x.reshape((b, 1, t, c))?)?)?.mean(3)?.squeeze(1)?;
        // LeakyReLU(x) = max(x, 0) − 0.01·max(−x, 0).
        let pooled = (pooled.relu()? - (pooled.neg()?.relu()? * 0.01)?)?;
        let (offsets, scales) = (self.predict(&pooled, &self.offsets)?, self.predict(&pooled, &self.scales)?);
        let [ox, oy] = offsets;
        let [sx, sy] = scales;
        let axis = |windows: usize,
                    full: usize,
                    of: &dyn Fn(usize) -> usize,
                    at: &dyn Fn(usize) -> usize,
                    offset: Tensor,
                    scale: Tensor|
         -> Result<Tensor> {
            let half = (s as f32 - 1.0) / 2.0;
            let centre: Vec<f32> = (0..down * across).map(|x| (of(x) * s) as f32 + half).collect();
            let around: Vec<f32> = (0..s * s).map(|x| at(x) as f32 - half).collect();
            let centre = Tensor::from_vec(centre, (down * across, 1), &Device::Cpu)?;
            let around = Tensor::from_vec(around, (s * s,), &Device::Cpu)?;
            // An offset of 1 is half the picture over its number of whole windows.
            let unit = (windows * s).saturating_sub(1) as f64 / 2.0 / (full / s).max(1) as f64;
            let spread = (scale + 1.0)?.broadcast_mul(&around)?;
            Ok((offset * unit)?.broadcast_add(&centre)?.broadcast_add(&spread)?)
        };
        let Grid { h, w, .. } = self.grid;
        Ok([axis(across, w, &|x| x % across, &|x| x % s, ox, sx)?, axis(down, h, &|x| x / across, &|x| x / s, oy, sy)?])
    }

    /// Bilinear samples of frames (N, H, h, w, D) at places (N, H, windows, w²): (N, H, windows, w², D).
    fn sample(&self, x: &Tensor, places: &[Tensor; 2]) -> Result<Tensor> {
        let (n, heads, h, w, d) = x.dims5()?;
        let flat = x.reshape((n * heads * h * w, d))?;
        let dims = places[0].dims4()?;
        let each = dims.2 * dims.3;
        let (px, py) = (numbers(&places[0])?, numbers(&places[1])?);
        let whole = |x: &[f32]| -> Vec<f32> { x.iter().map(|x| x.floor()).collect() };
        let (x0, y0) = (whole(&px), whole(&py));
        let tensor = |x: Vec<f32>| Tensor::from_vec(x, dims, &Device::Cpu);
        // Fractions carry the gradient, the corners themselves have none.
        let fx = (&places[0] - tensor(x0.clone())?)?;
        let fy = (&places[1] - tensor(y0.clone())?)?;
        let mut out: Option<Tensor> = None;
        for (dx, dy) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            let mut at = Vec::with_capacity(px.len());
            let mut inside = Vec::with_capacity(px.len());
            for (i, (x, y)) in x0.iter().zip(&y0).enumerate() {
                let (x, y) = (x + dx as f32, y + dy as f32);
                let ok = x >= 0.0 && y >= 0.0 && x < w as f32 && y < h as f32;
                let token = if ok { y as usize * w + x as usize } else { 0 };
                at.push((i / each * h * w + token) as u32);
                inside.push(if ok { 1f32 } else { 0.0 });
            }
            let rows = flat.index_select(&Tensor::new(at, &Device::Cpu)?, 0)?;
            let rows = rows.reshape((dims.0, dims.1, dims.2, dims.3, d))?;
            let side = |f: &Tensor, far: i32| if far == 1 { Ok(f.clone()) } else { 1.0 - f };
            let weight = ((side(&fx, dx)? * side(&fy, dy)?)? * tensor(inside)?)?;
            let part = rows.broadcast_mul(&weight.unsqueeze(4)?)?;
            out = Some(match out {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        let Some(out) = out else { unreachable!("four corners were added") };
        Ok(out)
    }

    /// Bias of relative positions, (1, H, w², w²).
    fn relative(&self) -> Result<Tensor> {
        let s = self.side;
        let index = |i: usize, j: usize| (i / s + s - 1 - j / s) * (2 * s - 1) + (i % s + s - 1 - j % s);
        let all: Vec<u32> = (0..s * s * s * s).map(|x| index(x / (s * s), x % (s * s)) as u32).collect();
        let rows = self.bias.index_select(&Tensor::new(all, &Device::Cpu)?, 0)?;
        Ok(rows.reshape((s * s, s * s, ()))?.permute((2, 0, 1))?.unsqueeze(0)?.contiguous()?)
    }
}

impl Mixer for Layer {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let x = i.x(CARD.id)?;
        let (b, heads, t, d) = i.q.dims4()?;
        let dv = i.v.dim(3)?;
        if t != self.grid.tokens() || i.k.dim(2)? != t || x.dim(1)? != t {
            return Err(Error::Shape {
                op: CARD.id,
                tensor: "q",
                shape: i.q.dims().to_vec(),
                expected: format!("the {} tokens of the grid {}, in k, v and x too", self.grid.tokens(), self.grid),
            });
        }
        let places = self.places(x)?;
        let sampled = |x: &Tensor| self.sample(&for_each_query_head(&self.frames(&x.contiguous()?)?, heads)?, &places);
        let (k, v) = (sampled(i.k)?, sampled(i.v)?);
        let q = self.cut(&self.frames(&i.q.contiguous()?)?)?;
        let (n, _, windows, each, _) = q.dims5()?;
        let apart = |x: &Tensor, d: usize| x.transpose(1, 2)?.reshape((n * windows, heads, each, d));
        let bias = Some(AttendBias::Dense(self.relative()?));
        let options = AttendOptions { scale: i.scale, bias, ..AttendOptions::default() };
        let a = attend(&apart(&q, d)?, &apart(&k, d)?, &apart(&v, dv)?, &options, None)?;
        let ((down, across), s) = (self.windows(), self.side);
        let Grid { t: frames, h, w, .. } = self.grid;
        let out = a.out.reshape(vec![n, down, across, heads, s, s, dv])?.permute(vec![0, 3, 1, 4, 2, 5, 6])?;
        let out = out.reshape((n, heads, down * s, across * s, dv))?.narrow(2, 0, h)?.narrow(3, 0, w)?;
        let out = out.reshape((b, frames, heads, h * w, dv))?.transpose(1, 2)?.reshape((b, heads, t, dv))?;
        let c = x.dim(2)?;
        let predicting = (b * t * c + n * windows * (c + 2 * c * 4 * heads)) as u64;
        let sampling = (n * windows * each * heads * (8 * (d + dv) + 12)) as u64;
        let select = Work { flops: predicting + sampling, bytes: (4 * b * t * c) as u64, ..Work::default() };
        Ok(Mixed { out, work: a.work, select, loss: None, selections: Vec::new() })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "vsa-window",
    title: "VSA: Learning Varied-Size Window Attention in Vision Transformers",
    authors: "Zhang et al., 2022",
    arxiv: "2204.08446",
    family: Family::Sparse,
    slots: &[Slot::Mixer],
    laws: &[Law::Work { pairs: Growth::Linear, flops: Growth::Linear }, Law::Gradients],
    equation: "(o, s) = W LeakyReLU(mean of x in the window) + b, for each head\n\
               keys and values sampled at centre + (1 + s)·place + o, bilinear, 0 outside\n\
               softmax(scale·QK' + bias of relative position) V within each window",
    cost: "4·T·C predicting, 8·T·H·(D + Dv) sampling, window² keys per query",
    choices: &[
        "As in the authors' code an offset of 1 is half the picture's side over its number of whole windows, and \
         pictures are filled up with zeros below and to the right, zeros that take part as keys.",
        "The authors start offsets and scales at 0, where samples lie on tokens and interpolation has a kink; here \
         they start small and random. The relative bias is theirs.",
        "The depthwise convolution before the layer is the block's business, not the layer's.",
        "Frames of a video are pictures by themselves.",
    ],
    params: params_of::<VsaWindow>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<VsaWindow>(CARD.id, params)?)))
}
