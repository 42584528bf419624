//! Trainable parameters by name, from a seed or a file.

use crate::error::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

type Vars = Arc<Mutex<BTreeMap<String, Var>>>;

/// f32 parameters on the CPU. One that is asked for and not there yet is made from the seed and its own name, so that
/// the order in which a model asks for them changes nothing.
#[derive(Clone)]
pub struct Weights {
    vars: Vars,
    seed: Option<u64>,
}

impl Weights {
    /// Parameters that are made as they are asked for.
    pub fn seeded(seed: u64) -> Self {
        Self { vars: Vars::default(), seed: Some(seed) }
    }

    /// These and no others.
    pub fn from_tensors(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Result<Self> {
        let vars = tensors
            .into_iter()
            .map(|(name, t)| Ok((name, Var::from_tensor(&t.to_dtype(DType::F32)?)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        Ok(Self { vars: Arc::new(Mutex::new(vars)), seed: None })
    }

    /// None: for systems without parameters.
    pub fn none() -> Self {
        Self { vars: Vars::default(), seed: None }
    }

    /// The parameters of a safetensors file.
    pub fn load(path: &Path) -> Result<Self> {
        Self::from_tensors(candle_core::safetensors::load(path, &Device::Cpu)?)
    }

    /// Write all to a safetensors file: to a temporary name beside it first, so that no file is half written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let tensors: BTreeMap<String, Tensor> =
            self.all().into_iter().map(|(n, v)| (n, v.as_tensor().clone())).collect();
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        let part = path.with_file_name(name);
        let file = |action, e: std::io::Error| Error::File { path: path.into(), action, message: e.to_string() };
        let bytes = safetensors::serialize(tensors.iter().map(|(n, t)| (n.as_str(), t)), None)
            .map_err(|e| Error::File { path: path.into(), action: "write", message: e.to_string() })?;
        std::fs::write(&part, bytes).map_err(|e| file("write", e))?;
        std::fs::rename(&part, path).map_err(|e| file("rename into place", e))
    }

    /// A builder that hands these out.
    pub fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), DType::F32, Device::Cpu)
    }

    /// All parameters there are, by name.
    pub fn all(&self) -> Vec<(String, Var)> {
        let vars = self.vars.lock().unwrap_or_else(PoisonError::into_inner);
        vars.iter().map(|(n, v)| (n.clone(), v.clone())).collect()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.all().iter().map(|(_, v)| v.elem_count()).sum()
    }
}

/// FNV-1a: the same on every machine and in every release, unlike the standard library's hash.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// `n` numbers of an initial distribution.
fn draw(init: Init, shape: &Shape, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let n = shape.elem_count();
    let mut normal = |mean: f64, stdev: f64| -> Vec<f32> {
        let mut one = || {
            let (u, v): (f64, f64) = (rng.random_range(f64::MIN_POSITIVE..1.0), rng.random());
            mean + stdev * (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
        };
        (0..n).map(|_| one() as f32).collect()
    };
    match init {
        Init::Const(c) => vec![c as f32; n],
        Init::Randn { mean, stdev } => normal(mean, stdev),
        Init::Uniform { lo, up } => (0..n).map(|_| rng.random_range(lo..up) as f32).collect(),
        Init::Kaiming { dist, fan, non_linearity } => {
            let std = non_linearity.gain() / (fan.for_shape(shape).max(1) as f64).sqrt();
            match dist {
                candle_nn::init::NormalOrUniform::Normal => normal(0.0, std),
                candle_nn::init::NormalOrUniform::Uniform => {
                    let bound = 3f64.sqrt() * std;
                    (0..n).map(|_| rng.random_range(-bound..bound) as f32).collect()
                }
            }
        }
    }
}

impl SimpleBackend for Weights {
    fn get(&self, s: Shape, name: &str, h: Init, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        let mut vars = self.vars.lock().unwrap_or_else(PoisonError::into_inner);
        if !vars.contains_key(name) {
            let Some(seed) = self.seed else {
                candle_core::bail!("parameter {name:?} of shape {s:?} is missing; train the system or load its weights")
            };
            let x = draw(h, &s, &mut ChaCha8Rng::seed_from_u64(seed ^ hash(name)));
            vars.insert(name.into(), Var::from_vec(x, s.clone(), &Device::Cpu)?);
        }
        let t = vars[name].as_tensor();
        if t.shape() != &s {
            candle_core::bail!("parameter {name:?} has shape {:?}; this layer needs {s:?}", t.shape())
        }
        // Of the same type and device this is the variable itself, which gradients need.
        t.to_device(dev)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        match self.vars.lock().unwrap_or_else(PoisonError::into_inner).get(name) {
            Some(v) => v.as_tensor().to_device(dev)?.to_dtype(dtype),
            None => candle_core::bail!("parameter {name:?} is missing"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.seed.is_some() || self.vars.lock().unwrap_or_else(PoisonError::into_inner).contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_depend_on_seed_and_name_alone_and_round_trip() {
        let get = |w: &Weights, n: &str| w.builder().get_with_hints((3, 4), n, candle_nn::init::DEFAULT_KAIMING_NORMAL);
        let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (a, b) = (Weights::seeded(1), Weights::seeded(1));
        let first = flat(get(&a, "x").unwrap());
        get(&b, "y").unwrap();
        assert_eq!(first, flat(get(&b, "x").unwrap()));
        assert_ne!(first, flat(get(&Weights::seeded(2), "x").unwrap()));
        assert_ne!(first, flat(get(&b, "y").unwrap()));
        let path = std::env::temp_dir().join(format!("foveal-weights-{}.safetensors", std::process::id()));
        a.save(&path).unwrap();
        let c = Weights::load(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(first, flat(get(&c, "x").unwrap()));
        let e = get(&c, "gone").unwrap_err().to_string();
        assert!(e.contains("gone") && e.contains("missing"), "{e}");
        let e = c.builder().get((4, 4), "x").unwrap_err().to_string();
        assert!(e.contains("[3, 4]") && e.contains("[4, 4]"), "{e}");
    }

    #[test]
    fn gradients_reach_the_variables() {
        let w = Weights::seeded(3);
        let t = w.builder().get((2,), "a").unwrap();
        let grads = t.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(w.all()[0].1.as_tensor()).is_some());
    }
}
