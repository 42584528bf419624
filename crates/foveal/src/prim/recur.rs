//! Linear recurrences over a matrix state on candle tensors, with gradients: S_t = A_t S_{t−1} + k_tᵀ v_t,
//! o_t = scale · q_t S_t, in chunks ([`recur`]) and token by token ([`recur_step`]).
//!
//! q is (B, Hq, T, D), k (B, Hk, T, D), v (B, Hv, T, Dv), f32 or bf16 of one dtype; the number of heads of each
//! operand divides the largest, H, and shared heads are never repeated. The output is f32 (B, H, T, Dv) over
//! memory in (B, T, H, Dv) order, so that a model's output projection reads it without a copy.
//!
//! Where any operand tracks gradients, so do output and final state; operands are then joined in one tensor for
//! the backward pass, which costs a copy of them.

use crate::error::{Error, Result};
use crate::prim::conv::{WorkCell, cpu, elements, flat, gradient, readable, through};
use crate::prim::tensor::rows;
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Shape, Storage, Tensor, WithDType};
use foveal_kernels::recur::{Gate, Recur, RecurGrads};
use foveal_kernels::{Element, Isa, View, ViewMut, Work};
use half::bf16;

const OP: &str = "recur";

/// The transition A_t and the factor on what is written: [`Gate`] on tensors. Log decays `g` are ≤ 0; `g`, `beta`
/// and `dt` are f32 (others are converted), `a` and `b` of [`RecurGate::LowRank`] of q's dtype.
#[derive(Clone, Debug)]
pub enum RecurGate {
    /// S_t = S_{t−1} + k vᵀ.
    Identity,
    /// S_t = e^g S_{t−1} + k vᵀ.
    Scalar {
        /// (B, heads, T, 1).
        g: Tensor,
    },
    /// S_t = e^g ⊙ S_{t−1} + k vᵀ with g by key channel.
    Channel {
        /// (B, heads, T, D).
        g: Tensor,
    },
    /// S_t = (I − β k kᵀ) S_{t−1} + β k vᵀ.
    Delta {
        /// (B, heads, T, 1).
        beta: Tensor,
    },
    /// S_t = e^g (I − β k kᵀ) S_{t−1} + β k vᵀ.
    GatedDelta {
        /// (B, heads, T, 1).
        g: Tensor,
        /// (B, heads, T, 1).
        beta: Tensor,
    },
    /// S_t = (I − β k kᵀ) (e^g ⊙ S_{t−1}) + β k vᵀ with g by key channel.
    ChannelDelta {
        /// (B, heads, T, D).
        g: Tensor,
        /// (B, heads, T, 1).
        beta: Tensor,
    },
    /// S_t = (diag(e^g) + a bᵀ) S_{t−1} + k vᵀ.
    LowRank {
        /// (B, heads, T, D).
        g: Tensor,
        /// (B, heads, T, D), q's dtype.
        a: Tensor,
        /// (B, heads, T, D), q's dtype.
        b: Tensor,
    },
    /// S_t = e^{dt·a} S_{t−1} + dt k vᵀ.
    Ssd {
        /// (B, heads, T, 1), ≥ 0.
        dt: Tensor,
        /// (H), ≤ 0.
        a: Tensor,
    },
    /// `S_t[n, c] = e^{dt[c]·a[c, n]} S_{t−1}[n, c] + dt[c] k[n] v[c]`.
    Selective {
        /// (B, heads, T, Dv), ≥ 0.
        dt: Tensor,
        /// (H, Dv, D), ≤ 0.
        a: Tensor,
    },
}

/// Options of one call.
#[derive(Clone, Debug, Default)]
pub struct RecurOptions {
    /// Factor on q; `None` = 1/√D.
    pub scale: Option<f32>,
    /// State before the first token, (sequences, H, D, Dv); zero if absent.
    pub initial: Option<Tensor>,
    /// Ragged batch: sequence i is tokens `cu_seqlens[i]..cu_seqlens[i + 1]` of a batch of 1.
    pub cu_seqlens: Option<Vec<u32>>,
    /// Instruction set; `None` = the best there is.
    pub isa: Option<Isa>,
}

/// What a call returns.
#[derive(Clone, Debug)]
pub struct Recurred {
    /// f32 (B, H, T, Dv), in (B, T, H, Dv) memory.
    pub out: Tensor,
    /// State after the last token, f32 (sequences, H, D, Dv): the next call's `initial`. Tracks gradients like
    /// `out`.
    pub state: Tensor,
    /// Work of the forward call.
    pub work: Work,
}

/// A whole sequence (or several) in chunks of 64 tokens.
pub fn recur(q: &Tensor, k: &Tensor, v: &Tensor, gate: &RecurGate, options: &RecurOptions) -> Result<Recurred> {
    let x = Operands::new(q, k, v, gate, options)?;
    if x.tracked() { x.tracked_call() } else { x.direct(false) }
}

/// Token by token, for decoding: the same result in f32, without gradients.
pub fn recur_step(q: &Tensor, k: &Tensor, v: &Tensor, gate: &RecurGate, options: &RecurOptions) -> Result<Recurred> {
    let x = Operands::new(q, k, v, gate, options)?;
    if x.tracked() {
        return Err(Error::NoBackward { op: "recur_step", tensor: "an operand" });
    }
    x.direct(true)
}

/// [`RecurGate`] without its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Identity,
    Scalar,
    Channel,
    Delta,
    GatedDelta,
    ChannelDelta,
    LowRank,
    Ssd,
    Selective,
}

/// Operands in their order in a joined tensor.
struct Operands {
    /// q, k, v and (low rank) a, b: of one dtype.
    values: Vec<Tensor>,
    /// g, then beta or dt: f32, as the kind has them.
    gates: Vec<Tensor>,
    /// The fixed `a` of scans, and the initial state: contiguous f32.
    fixed: Option<Tensor>,
    initial: Option<Tensor>,
    call: Call,
}

/// Everything about a call but its operands.
#[derive(Clone)]
struct Call {
    kind: Kind,
    scale: f32,
    cu_seqlens: Option<Vec<u32>>,
    isa: Isa,
    /// Sequences, H, D, Dv.
    state: [usize; 4],
    /// (B, H, T, Dv).
    out: [usize; 4],
}

/// f32 with contiguous rows.
fn wide(name: &'static str, x: &Tensor) -> Result<Tensor> {
    readable(OP, name, x, 4, "(batch, heads, tokens, width)")?;
    rows(OP, name, &x.to_dtype(DType::F32)?)
}

/// Contiguous f32.
fn fixed(name: &'static str, x: &Tensor, dims: usize, want: &'static str) -> Result<Tensor> {
    readable(OP, name, x, dims, want)?;
    Ok(x.to_dtype(DType::F32)?.contiguous()?)
}

impl Operands {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, gate: &RecurGate, o: &RecurOptions) -> Result<Self> {
        let mut values = vec![rows(OP, "q", q)?, rows(OP, "k", k)?, rows(OP, "v", v)?];
        let (mut gates, mut a_fixed) = (Vec::new(), None);
        let kind = match gate {
            RecurGate::Identity => Kind::Identity,
            RecurGate::Scalar { g } => {
                gates.push(wide("g", g)?);
                Kind::Scalar
            }
            RecurGate::Channel { g } => {
                gates.push(wide("g", g)?);
                Kind::Channel
            }
            RecurGate::Delta { beta } => {
                gates.push(wide("beta", beta)?);
                Kind::Delta
            }
            RecurGate::GatedDelta { g, beta } => {
                gates.extend([wide("g", g)?, wide("beta", beta)?]);
                Kind::GatedDelta
            }
            RecurGate::ChannelDelta { g, beta } => {
                gates.extend([wide("g", g)?, wide("beta", beta)?]);
                Kind::ChannelDelta
            }
            RecurGate::LowRank { g, a, b } => {
                gates.push(wide("g", g)?);
                values.extend([rows(OP, "a", a)?, rows(OP, "b", b)?]);
                Kind::LowRank
            }
            RecurGate::Ssd { dt, a } => {
                gates.push(wide("dt", dt)?);
                a_fixed = Some(fixed("a", a, 1, "(heads)")?);
                Kind::Ssd
            }
            RecurGate::Selective { dt, a } => {
                gates.push(wide("dt", dt)?);
                a_fixed = Some(fixed("a", a, 3, "(heads, value_dim, key_dim)")?);
                Kind::Selective
            }
        };
        for (name, x) in ["q", "k", "v", "a", "b"].into_iter().zip(&values) {
            if x.dtype() != q.dtype() {
                return Err(Error::Dtype {
                    op: OP,
                    tensor: name,
                    dtype: format!("{:?}", x.dtype()),
                    expected: "the dtype of q",
                });
            }
        }
        let (b, _, t, d) = q.dims4()?;
        let dv = v.dims4()?.3;
        let h = values.iter().chain(&gates).map(|x| x.dims()[1]).max().unwrap_or(0);
        let sequences = o.cu_seqlens.as_ref().map_or(b, |cu| cu.len().saturating_sub(1));
        let state = [sequences, h, d, dv];
        let initial = match &o.initial {
            None => None,
            Some(s) if s.dims() == state => Some(fixed("initial", s, 4, "(sequences, heads, key_dim, value_dim)")?),
            Some(s) => {
                let expected = format!("(sequences, heads, key_dim, value_dim) = {state:?}");
                return Err(Error::Shape { op: OP, tensor: "initial", shape: s.dims().to_vec(), expected });
            }
        };
        let call = Call {
            kind,
            scale: o.scale.unwrap_or(1.0 / (d.max(1) as f32).sqrt()),
            cu_seqlens: o.cu_seqlens.clone(),
            isa: o.isa.unwrap_or_else(Isa::active),
            state,
            out: [b, h, t, dv],
        };
        Ok(Operands { values, gates, fixed: a_fixed, initial, call })
    }

    fn tracked(&self) -> bool {
        self.values.iter().chain(&self.gates).chain(&self.fixed).chain(&self.initial).any(Tensor::track_op)
    }

    fn direct(&self, step: bool) -> Result<Recurred> {
        match self.values[0].dtype() {
            DType::BF16 => self.direct_as::<bf16>(step),
            _ => self.direct_as::<f32>(step),
        }
    }

    /// Operands read where they lie.
    fn direct_as<T: Element + WithDType>(&self, step: bool) -> Result<Recurred> {
        let values: Vec<_> = self.values.iter().map(Tensor::storage_and_layout).collect();
        let gates: Vec<_> = self.gates.iter().map(Tensor::storage_and_layout).collect();
        let (a, initial) = (
            self.fixed.as_ref().map(Tensor::storage_and_layout),
            self.initial.as_ref().map(Tensor::storage_and_layout),
        );
        let values = values.iter().map(|(s, l)| view::<T>(s, l)).collect::<Result<Vec<_>>>()?;
        let gates = gates.iter().map(|(s, l)| view::<f32>(s, l)).collect::<Result<Vec<_>>>()?;
        let a = a.as_ref().map(|(s, l)| flat(cpu(s)?, l)).transpose()?.unwrap_or(&[]);
        let initial = initial.as_ref().map(|(s, l)| flat(cpu(s)?, l)).transpose()?;
        let parts = Parts { values, gates, a, initial };
        let (out, last) = (self.call.outputs(), self.call.states());
        let (mut out, mut last) = (vec![0f32; out], vec![0f32; last]);
        let work = self.call.forward(&parts, &mut out, &mut last, step)?;
        self.results(Tensor::from_vec(out, self.call.outputs(), &Device::Cpu)?, last, work)
    }

    fn results(&self, out: Tensor, last: Vec<f32>, work: Work) -> Result<Recurred> {
        let state = Tensor::from_vec(last, &self.call.state, &Device::Cpu)?;
        Ok(Recurred { out: self.call.shape_out(&out)?, state, work })
    }

    /// Through autograd. An operation has at most three arguments: what has q's dtype travels as one tensor, what is
    /// f32 as another.
    fn tracked_call(&self) -> Result<Recurred> {
        let join = |x: Vec<Tensor>| -> Result<Tensor> {
            let flat = x.iter().map(Tensor::flatten_all).collect::<candle_core::Result<Vec<_>>>()?;
            Ok(Tensor::cat(&flat, 0)?.contiguous()?)
        };
        let initial = match &self.initial {
            Some(s) => s.clone(),
            None => Tensor::zeros(&self.call.state, DType::F32, &Device::Cpu)?,
        };
        let shapes = |x: &[Tensor]| -> Result<Vec<[usize; 4]>> {
            x.iter().map(|x| Ok(x.dims4()?).map(|(b, h, t, w)| [b, h, t, w])).collect()
        };
        let work = WorkCell::default();
        let op = Tracked {
            call: self.call.clone(),
            values: shapes(&self.values)?,
            gates: shapes(&self.gates)?,
            a: self.fixed.as_ref().map_or(0, Tensor::elem_count),
            initial: self.initial.is_some(),
            work: work.clone(),
        };
        let gates = join(self.gates.iter().chain(&self.fixed).chain([&initial]).cloned().collect())?;
        let both = join(self.values.clone())?.apply_op2(&gates, op)?;
        let n = self.call.outputs();
        let out = self.call.shape_out(&both.narrow(0, 0, n)?)?;
        let state = both.narrow(0, n, self.call.states())?.reshape(&self.call.state)?;
        Ok(Recurred { out, state, work: work.get() })
    }
}

fn view<'a, T: WithDType>(storage: &'a Storage, layout: &Layout) -> Result<View<'a, T>> {
    let (d, s) = (layout.dims(), layout.stride());
    let x = &cpu(storage)?.as_slice::<T>()?[layout.start_offset()..];
    Ok(View::new("operand", x, [d[0], d[1], d[2], d[3]], [s[0], s[1], s[2]])?)
}

/// What a kernel call reads.
struct Parts<'a, T> {
    values: Vec<View<'a, T>>,
    gates: Vec<View<'a, f32>>,
    a: &'a [f32],
    initial: Option<&'a [f32]>,
}

impl Call {
    fn outputs(&self) -> usize {
        self.out.iter().product()
    }

    fn states(&self) -> usize {
        self.state.iter().product()
    }

    /// (B, H, T, Dv) over (B, T, H, Dv) memory.
    fn strides(&self) -> [usize; 3] {
        let [_, h, t, dv] = self.out;
        [t * h * dv, dv, h * dv]
    }

    fn shape_out(&self, flat: &Tensor) -> Result<Tensor> {
        let [b, h, t, dv] = self.out;
        Ok(flat.reshape((b, t, h, dv))?.transpose(1, 2)?)
    }

    fn kernel<'a, T: Element>(&'a self, p: &Parts<'a, T>) -> Recur<'a, T> {
        let first = || p.gates[0];
        let gate = match self.kind {
            Kind::Identity => Gate::Identity,
            Kind::Scalar => Gate::Scalar { g: first() },
            Kind::Channel => Gate::Channel { g: first() },
            Kind::Delta => Gate::Delta { beta: first() },
            Kind::GatedDelta => Gate::GatedDelta { g: first(), beta: p.gates[1] },
            Kind::ChannelDelta => Gate::ChannelDelta { g: first(), beta: p.gates[1] },
            Kind::LowRank => Gate::LowRank { g: first(), a: p.values[3], b: p.values[4] },
            Kind::Ssd => Gate::Ssd { dt: first(), a: p.a },
            Kind::Selective => Gate::Selective { dt: first(), a: p.a },
        };
        Recur::new(gate, self.scale).isa(self.isa).cu_seqlens(self.cu_seqlens.as_deref())
    }

    fn forward<T: Element>(&self, p: &Parts<T>, out: &mut [f32], last: &mut [f32], step: bool) -> Result<Work> {
        let (kernel, [q, k, v]) = (self.kernel(p), [&p.values[0], &p.values[1], &p.values[2]]);
        let mut out = ViewMut::new("out", out, self.out, self.strides())?;
        if !step {
            return Ok(kernel.forward(q, k, v, p.initial, &mut out, Some(last))?);
        }
        if let Some(initial) = p.initial {
            last.copy_from_slice(initial);
        }
        Ok(kernel.step(q, k, v, last, &mut out)?)
    }

    fn backward<T: Element>(&self, p: &Parts<T>, dresult: &[f32]) -> Result<RecurGrads> {
        let (dout, dlast) = dresult.split_at(self.outputs());
        let dout = View::new("dout", dout, self.out, self.strides())?;
        let [q, k, v] = [&p.values[0], &p.values[1], &p.values[2]];
        Ok(self.kernel(p).backward(q, k, v, p.initial, &dout, Some(dlast))?.0)
    }
}

/// The recurrence inside autograd: one flat result, the output in (B, T, H, Dv) memory and then the final state.
struct Tracked {
    call: Call,
    values: Vec<[usize; 4]>,
    gates: Vec<[usize; 4]>,
    /// Elements of the fixed `a`.
    a: usize,
    /// Whether there is an initial state; where there is none, zeros stand in its place.
    initial: bool,
    work: WorkCell,
}

/// Contiguous parts of `x` in `shapes`, and the rest.
fn cut<'a, T: Copy>(x: &'a [T], shapes: &[[usize; 4]]) -> Result<(Vec<View<'a, T>>, &'a [T])> {
    let (mut rest, mut views) = (x, Vec::with_capacity(shapes.len()));
    for shape in shapes {
        let (part, more) = rest.split_at(shape.iter().product());
        views.push(View::contiguous("operand", part, *shape)?);
        rest = more;
    }
    Ok((views, rest))
}

impl Tracked {
    fn parts<'a, T: Copy>(&self, values: &'a [T], gates: &'a [f32]) -> Result<Parts<'a, T>> {
        let (values, _) = cut(values, &self.values)?;
        let (gates, rest) = cut(gates, &self.gates)?;
        let (a, initial) = rest.split_at(self.a);
        Ok(Parts { values, gates, a, initial: self.initial.then_some(initial) })
    }

    fn forward<T: Element>(&self, values: &[T], gates: &[f32]) -> Result<Vec<f32>> {
        let mut both = vec![0f32; self.call.outputs() + self.call.states()];
        let (out, last) = both.split_at_mut(self.call.outputs());
        self.work.set(self.call.forward(&self.parts(values, gates)?, out, last, false)?);
        Ok(both)
    }

    /// Gradients of the two arguments.
    fn backward<T: Element>(&self, values: &[T], gates: &[f32], dresult: &[f32]) -> Result<[Vec<f32>; 2]> {
        let mut g = self.call.backward(&self.parts(values, gates)?, dresult)?;
        // `a` is a row operand of the low-rank gate, and a parameter of the scans.
        let (a, fixed) = if self.a == 0 { (std::mem::take(&mut g.a), Vec::new()) } else { (Vec::new(), g.a) };
        Ok([[g.q, g.k, g.v, a, g.b].concat(), [g.g, g.beta, g.dt, fixed, g.initial].concat()])
    }
}

impl CustomOp2 for Tracked {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        vl: &Layout,
        gates: &CpuStorage,
        gl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let gates = flat(gates, gl)?;
        let both = match values {
            CpuStorage::BF16(_) => self.forward(elements::<bf16>(values, vl)?, gates),
            _ => self.forward(elements::<f32>(values, vl)?, gates),
        };
        let both = both.map_err(through)?;
        let n = both.len();
        Ok((CpuStorage::F32(both), Shape::from(n)))
    }

    fn bwd(
        &self,
        values: &Tensor,
        gates: &Tensor,
        _: &Tensor,
        dresult: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dresult = dresult.contiguous()?;
        let [dvalues, dgates] = {
            let ((vs, vl), (gs, gl)) = (values.storage_and_layout(), gates.storage_and_layout());
            let (ds, dl) = dresult.storage_and_layout();
            let (gates, dresult) = (flat(cpu(&gs)?, gl)?, flat(cpu(&ds)?, dl)?);
            let grads = match values.dtype() {
                DType::BF16 => self.backward(elements::<bf16>(cpu(&vs)?, vl)?, gates, dresult),
                _ => self.backward(elements::<f32>(cpu(&vs)?, vl)?, gates, dresult),
            };
            grads.map_err(through)?
        };
        Ok((gradient(dvalues, values)?, gradient(dgates, gates)?))
    }
}
