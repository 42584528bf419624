//! Plans: which system serves each layer and head of a model.
//!
//! A plan is a TOML file:
//!
//! ```toml
//! version = 1
//! name = "sparse prompt, narrow keys"
//! prefill = "xattention:threshold=0.9"   # default "flashattention-2": exact
//! cache = "think:ratio=0.5"              # default "flashattention-2": everything kept
//! kv_dtype = "bf16"                      # f32, bf16, int8 or int4
//!
//! [[rule]]                               # later rules win
//! layers = [0, 1]
//! heads = [0, 3]                         # query heads; without it all heads; prefill only
//! prefill = "flashattention-2"
//! ```
//!
//! Parsing is strict: an unknown key, a wrong type or an unknown version is an error, because a
//! misspelt key that is ignored would measure something else than what was asked for.

use crate::config::ModelConfig;
use crate::error::{LlmError, Result};
use foveal::cache::CachePolicy;
use foveal::cache::dense::DenseCache;
use foveal::error::nearest_hint;
use foveal::mixer::{Mixer, MixerDims, MixerSystem, Weights};
use foveal::prim::kv::KvDtype;
use foveal::sparse::Selector;
use foveal::{Slot, Spec, System, registry};
use std::path::Path;
use std::sync::Arc;

/// The version of the format that this build reads and writes.
pub const VERSION: u32 = 1;
/// Id of exact attention and of the dense store.
pub const DENSE: &str = "flashattention-2";
/// A plan of more bytes than this is refused: the largest sensible one is far smaller.
const MAX_BYTES: u64 = 16 << 20;

/// Which system serves each layer and head.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Format version, [`VERSION`].
    pub version: u32,
    /// Name for tables; may be empty.
    pub name: String,
    /// Prefill system of every head that no rule names.
    pub prefill: Spec,
    /// Cache policy of every layer that no rule names.
    pub cache: Spec,
    /// Storage type that caches are asked to use.
    pub kv_dtype: KvDtype,
    /// Exceptions; later ones win.
    pub rules: Vec<Rule>,
}

/// An exception for some layers and heads.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rule {
    /// Layer numbers.
    pub layers: Vec<usize>,
    /// Query heads, for `prefill` only; `None` = all.
    pub heads: Option<Vec<usize>>,
    /// Prefill system here.
    pub prefill: Option<Spec>,
    /// Cache policy here.
    pub cache: Option<Spec>,
}

/// What serves the prompt in one layer.
pub enum LayerPrefill {
    /// Per query head; `None` = exact.
    Heads(Vec<Option<Arc<dyn Selector>>>),
    /// All heads together.
    Layer(LayerMixer),
}

/// A system that serves all heads of a layer together.
pub struct LayerMixer {
    /// The layer.
    pub mixer: Arc<dyn Mixer>,
    /// Whether it reads q and k before rotation.
    pub before_rotation: bool,
}

/// A plan's systems, built for one model.
pub struct Resolved {
    /// Per layer.
    pub prefill: Vec<LayerPrefill>,
    /// Per layer.
    pub cache: Vec<Arc<dyn CachePolicy>>,
    /// Per layer: the policy's spelling, for messages.
    pub cache_names: Vec<String>,
}

fn bad(problem: impl Into<String>) -> LlmError {
    LlmError::Plan { problem: problem.into() }
}

impl Default for Plan {
    fn default() -> Self {
        Self::dense()
    }
}

impl Plan {
    /// Exact attention and a dense bf16 store everywhere.
    pub fn dense() -> Plan {
        let mut p = Self::of(&Spec::new(DENSE), &Spec::new(DENSE), KvDtype::default());
        p.name = "dense".into();
        p
    }

    /// One prefill system and one cache policy everywhere.
    pub fn of(prefill: &Spec, cache: &Spec, kv_dtype: KvDtype) -> Plan {
        let mut names: Vec<String> = [prefill, cache].iter().filter(|s| s.id != DENSE).map(|s| s.to_string()).collect();
        if names.is_empty() {
            names.push("dense".into());
        }
        Plan {
            version: VERSION,
            name: names.join(" + "),
            prefill: prefill.clone(),
            cache: cache.clone(),
            kv_dtype,
            rules: Vec::new(),
        }
    }

    /// Read a plan from TOML text.
    ///
    /// # Errors
    /// [`LlmError::Plan`] naming the key, its value and what is allowed.
    pub fn parse(toml: &str) -> Result<Plan> {
        let table: toml::Table = toml.parse().map_err(|e: toml::de::Error| {
            let line = e.span().map(|s| toml[..s.start.min(toml.len())].matches('\n').count() + 1);
            let at = line.map(|l| format!("line {l}: ")).unwrap_or_default();
            bad(format!("{at}{}", e.message().replace('\n', " ")))
        })?;
        let mut plan = Plan::dense();
        plan.name = String::new();
        keys(&table, "the plan", &["version", "name", "prefill", "cache", "kv_dtype", "rule"])?;
        match table.get("version") {
            None => return Err(bad(format!("version is missing; write version = {VERSION}"))),
            Some(v) if v.as_integer() == Some(i64::from(VERSION)) => {}
            Some(v) => {
                return Err(bad(format!("version = {v} is not supported; this build reads version {VERSION}")));
            }
        }
        if let Some(v) = table.get("name") {
            plan.name = string("name", v)?.to_owned();
        }
        if let Some(v) = table.get("prefill") {
            plan.prefill = spec("prefill", v)?;
        }
        if let Some(v) = table.get("cache") {
            plan.cache = spec("cache", v)?;
        }
        if let Some(v) = table.get("kv_dtype") {
            plan.kv_dtype = string("kv_dtype", v)?.parse().map_err(bad)?;
        }
        if let Some(v) = table.get("rule") {
            let rules = v.as_array().ok_or_else(|| bad("rule must be an array of tables; write [[rule]]"))?;
            for (i, r) in rules.iter().enumerate() {
                let place = format!("rule {}", i + 1);
                let r = r.as_table().ok_or_else(|| bad(format!("{place} must be a table; write [[rule]]")))?;
                keys(r, &place, &["layers", "heads", "prefill", "cache"])?;
                let layers = r.get("layers").ok_or_else(|| bad(format!("{place} needs layers = [numbers]")))?;
                let rule = Rule {
                    layers: numbers(&format!("{place}: layers"), layers)?,
                    heads: r.get("heads").map(|h| numbers(&format!("{place}: heads"), h)).transpose()?,
                    prefill: r.get("prefill").map(|p| spec(&format!("{place}: prefill"), p)).transpose()?,
                    cache: r.get("cache").map(|c| spec(&format!("{place}: cache"), c)).transpose()?,
                };
                check_rule(&place, &rule)?;
                plan.rules.push(rule);
            }
        }
        Ok(plan)
    }

    /// The plan as TOML; [`Plan::parse`] gives it back.
    pub fn to_toml(&self) -> String {
        let mut t = toml::Table::new();
        let text = |s: &dyn std::fmt::Display| toml::Value::String(s.to_string());
        let list = |x: &[usize]| toml::Value::Array(x.iter().map(|&n| toml::Value::Integer(n as i64)).collect());
        t.insert("version".into(), toml::Value::Integer(i64::from(self.version)));
        t.insert("name".into(), text(&self.name));
        t.insert("prefill".into(), text(&self.prefill));
        t.insert("cache".into(), text(&self.cache));
        t.insert("kv_dtype".into(), text(&self.kv_dtype));
        let rules = self.rules.iter().map(|r| {
            let mut t = toml::Table::new();
            t.insert("layers".into(), list(&r.layers));
            if let Some(h) = &r.heads {
                t.insert("heads".into(), list(h));
            }
            if let Some(p) = &r.prefill {
                t.insert("prefill".into(), text(p));
            }
            if let Some(c) = &r.cache {
                t.insert("cache".into(), text(c));
            }
            toml::Value::Table(t)
        });
        let rules: Vec<toml::Value> = rules.collect();
        if !rules.is_empty() {
            t.insert("rule".into(), toml::Value::Array(rules));
        }
        t.to_string()
    }

    /// Read a plan file.
    ///
    /// # Errors
    /// A file that cannot be read, or [`LlmError::Plan`].
    pub fn load(path: impl AsRef<Path>) -> Result<Plan> {
        let path = path.as_ref();
        let size = std::fs::metadata(path).map_err(|e| LlmError::io(path, "read the plan", e))?.len();
        if size > MAX_BYTES {
            return Err(bad(format!("{}: {size} bytes are too many for a plan (limit {MAX_BYTES})", path.display())));
        }
        let text = std::fs::read_to_string(path).map_err(|e| LlmError::io(path, "read the plan", e))?;
        Self::parse(&text).map_err(|e| match e {
            LlmError::Plan { problem } => bad(format!("{}: {problem}", path.display())),
            e => e,
        })
    }

    /// Whether every head is exact and every layer dense.
    pub fn is_dense(&self) -> bool {
        let dense = |s: &Option<Spec>| s.as_ref().is_none_or(|s| s.id == DENSE);
        self.prefill.id == DENSE
            && self.cache.id == DENSE
            && self.rules.iter().all(|r| dense(&r.prefill) && dense(&r.cache))
    }

    /// Check layers and heads against a model and build every system once.
    ///
    /// # Errors
    /// A layer or head out of range, an unknown system or parameter, a system in the wrong slot.
    pub fn check(&self, cfg: &ModelConfig) -> Result<()> {
        self.resolve(cfg).map(|_| ())
    }

    /// Build the systems of every layer and head.
    ///
    /// # Errors
    /// As [`Plan::check`].
    pub fn resolve(&self, cfg: &ModelConfig) -> Result<Resolved> {
        if self.version != VERSION {
            return Err(bad(format!("version = {} is not supported; this build reads {VERSION}", self.version)));
        }
        let first = prefill_system(&self.prefill)?;
        let policy = cache_policy(&self.cache)?;
        let mut out = Resolved {
            prefill: (0..cfg.num_layers).map(|l| first.layer(&self.prefill, cfg, l)).collect::<Result<_>>()?,
            cache: vec![policy; cfg.num_layers],
            cache_names: vec![self.cache.to_string(); cfg.num_layers],
        };
        for (i, r) in self.rules.iter().enumerate() {
            let place = format!("rule {}", i + 1);
            check_rule(&place, r)?;
            let prefill = match &r.prefill {
                Some(spec) => Some((spec, prefill_system(spec)?)),
                None => None,
            };
            let cache = r.cache.as_ref().map(cache_policy).transpose()?;
            for &l in &r.layers {
                if l >= cfg.num_layers {
                    return Err(bad(format!(
                        "{place}: layer {l} is out of range; the model has layers 0 to {}",
                        cfg.num_layers.saturating_sub(1)
                    )));
                }
                if let (Some(c), Some(spec)) = (&cache, &r.cache) {
                    out.cache[l] = c.clone();
                    out.cache_names[l] = spec.to_string();
                }
                let Some((spec, system)) = &prefill else { continue };
                let all = system.layer(spec, cfg, l)?;
                match (&r.heads, all) {
                    (None, all) => out.prefill[l] = all,
                    (Some(_), LayerPrefill::Layer(_)) => {
                        return Err(bad(format!("{place}: {spec} serves whole layers; leave out heads")));
                    }
                    (Some(heads), LayerPrefill::Heads(all)) => {
                        let LayerPrefill::Heads(row) = &mut out.prefill[l] else {
                            return Err(bad(format!(
                                "{place}: layer {l} is served as a whole by an earlier choice; give the heads' rule first a \
                                 rule for the whole layer"
                            )));
                        };
                        for &h in heads {
                            *row.get_mut(h).ok_or_else(|| {
                                bad(format!(
                                    "{place}: head {h} is out of range; the model has query heads 0 to {}",
                                    cfg.num_heads.saturating_sub(1)
                                ))
                            })? = all.get(h).cloned().flatten();
                        }
                    }
                }
            }
        }
        Ok(out)
    }
}

impl Resolved {
    /// What the caches need, all layers together.
    pub fn needs(&self) -> foveal::cache::Needs {
        self.cache.iter().map(|c| c.needs()).fold(foveal::cache::Needs::default(), |a, b| foveal::cache::Needs {
            weights: a.weights || b.weights,
            calibration: a.calibration || b.calibration,
            input_moment: a.input_moment || b.input_moment,
            pre_rotation: a.pre_rotation || b.pre_rotation,
        })
    }
}

/// A built prefill system, before it is spread over layers.
enum Built {
    Dense,
    Selector(Arc<dyn Selector>),
    Mixer(Arc<dyn MixerSystem>),
}

fn prefill_system(spec: &Spec) -> Result<Built> {
    let system = registry::build(spec, Slot::Prefill)?;
    system.domain().check(&spec.id, true, None, 0)?;
    match system {
        System::Dense => Ok(Built::Dense),
        System::Selector(s) => Ok(Built::Selector(Arc::from(s))),
        System::Cache(_) => Err(bad(format!("{spec} is a cache policy; name it as cache, not as prefill"))),
        System::Mixer(m) => Ok(Built::Mixer(Arc::from(m))),
    }
}

impl Built {
    /// What serves layer `l`.
    fn layer(&self, spec: &Spec, cfg: &ModelConfig, l: usize) -> Result<LayerPrefill> {
        Ok(match self {
            Built::Dense => LayerPrefill::Heads(vec![None; cfg.num_heads]),
            Built::Selector(s) => LayerPrefill::Heads(vec![Some(s.clone()); cfg.num_heads]),
            Built::Mixer(m) => {
                if cfg.window(l).is_some() {
                    return Err(bad(format!(
                        "{spec} knows no sliding window, which layer {l} of this model has; give that layer another system"
                    )));
                }
                let dims = MixerDims {
                    hidden: cfg.hidden_size,
                    kv_heads: cfg.num_kv_heads,
                    layer: l,
                    ..MixerDims::new(cfg.num_heads, cfg.head_dim, true)
                };
                let mixer = m.layer(&dims, Weights::none().builder())?;
                LayerPrefill::Layer(LayerMixer { mixer: Arc::from(mixer), before_rotation: m.reads_before_rotation() })
            }
        })
    }
}

fn cache_policy(spec: &Spec) -> Result<Arc<dyn CachePolicy>> {
    match registry::build(spec, Slot::Cache)? {
        System::Dense => Ok(Arc::new(DenseCache)),
        System::Cache(c) => Ok(Arc::from(c)),
        System::Selector(_) | System::Mixer(_) => {
            Err(bad(format!("{spec} is a prefill system; name it as prefill, not as cache")))
        }
    }
}

fn check_rule(place: &str, r: &Rule) -> Result<()> {
    if r.layers.is_empty() {
        return Err(bad(format!("{place}: layers is empty; name at least one layer or remove the rule")));
    }
    if r.prefill.is_none() && r.cache.is_none() {
        return Err(bad(format!("{place} changes nothing; give it prefill or cache")));
    }
    if r.heads.is_some() && r.cache.is_some() {
        return Err(bad(format!("{place}: heads go with prefill only; a cache serves whole layers")));
    }
    if r.heads.as_ref().is_some_and(Vec::is_empty) {
        return Err(bad(format!("{place}: heads is empty; name at least one head or leave it out for all")));
    }
    Ok(())
}

fn keys(t: &toml::Table, place: &str, known: &[&str]) -> Result<()> {
    match t.keys().find(|k| !known.contains(&k.as_str())) {
        None => Ok(()),
        Some(k) => Err(bad(format!(
            "{place} has an unknown key {k:?}{}; it takes: {}",
            nearest_hint(k, known.iter().copied()),
            known.join(", ")
        ))),
    }
}

fn string<'a>(key: &str, v: &'a toml::Value) -> Result<&'a str> {
    v.as_str().ok_or_else(|| bad(format!("{key} = {} must be a string in quotes", short(v))))
}

fn spec(key: &str, v: &toml::Value) -> Result<Spec> {
    let s: Spec = string(key, v)?.parse()?;
    if s.id.is_empty() {
        return Err(bad(format!("{key} is empty; name a system such as {DENSE:?}")));
    }
    Ok(s)
}

fn numbers(key: &str, v: &toml::Value) -> Result<Vec<usize>> {
    let list = v.as_array().ok_or_else(|| bad(format!("{key} = {} must be a list of numbers", short(v))))?;
    list.iter()
        .map(|x| {
            x.as_integer()
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| bad(format!("{key}: {} is no number of 0 or more", short(x))))
        })
        .collect()
}

/// A value in at most 40 characters.
fn short(v: &toml::Value) -> String {
    let s = v.to_string().replace('\n', " ");
    if s.chars().count() <= 40 { s } else { s.chars().take(37).chain("...".chars()).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn error(toml: &str) -> String {
        Plan::parse(toml).unwrap_err().to_string()
    }

    #[test]
    fn reads_the_documented_form() {
        let p = Plan::parse(
            "version = 1\nname = \"x\"\nprefill = \"xattention:threshold=0.9\"\nkv_dtype = \"int8\"\n\
             [[rule]]\nlayers = [0, 1]\nheads = [3]\nprefill = \"flashattention-2\"\n\
             [[rule]]\nlayers = [2]\ncache = \"think:ratio=0.5\"\n",
        )
        .unwrap();
        assert_eq!(p.prefill, Spec::new("xattention").with("threshold", "0.9"));
        assert_eq!(p.cache.id, DENSE);
        assert_eq!(p.kv_dtype, KvDtype::Int8);
        assert_eq!(p.rules.len(), 2);
        assert_eq!(p.rules[0].heads, Some(vec![3]));
        assert_eq!(p.rules[1].cache, Some(Spec::new("think").with("ratio", "0.5")));
        assert!(!p.is_dense() && Plan::dense().is_dense());
    }

    #[test]
    fn refuses_with_the_key_and_the_remedy() {
        assert!(error("name = \"x\"").contains("write version = 1"));
        assert!(error("version = 2").contains("version = 2 is not supported"));
        assert!(error("version = 1\nprefil = \"x\"").contains("did you mean \"prefill\""));
        assert!(error("version = 1\nprefill = 3").contains("prefill = 3 must be a string"));
        assert!(error("version = 1\nkv_dtype = \"f16\"").contains("use f32, bf16, int8 or int4"));
        assert!(error("version = 1\n[[rule]]\nlayers = [-1]\nprefill = \"a\"").contains("-1 is no number"));
        assert!(error("version = 1\n[[rule]]\nlayer = [1]").contains("did you mean \"layers\""));
        assert!(error("version = 1\n[[rule]]\nlayers = [1]").contains("changes nothing"));
        assert!(error("version = 1\n[[rule]]\nlayers = [1]\nheads = [1]\ncache = \"a\"").contains("whole layers"));
        assert!(error("version = 1\n[[rule]]\nlayers = []\ncache = \"a\"").contains("layers is empty"));
        assert!(error("version = 1\nname = \"a\nb\"").starts_with("plan: "));
        assert!(error("version = 1\nprefill = \"x:y\"").contains("name=value"));
    }

    #[test]
    fn a_list_of_one_is_written_as_a_list() {
        let p = Plan::parse("version = 1\nprefill = \"x:threshold=0.;,stride=8\"\ncache = \"y:z=;\"").unwrap();
        assert!(p.prefill.params["threshold"].is_array() && p.cache.params["z"].is_array());
        assert_eq!(Plan::parse(&p.to_toml()).unwrap(), p);
    }

    #[test]
    fn names_the_models_count_when_out_of_range() {
        let cfg = crate::testing::config(3, 4);
        let plan = |rule: &str| Plan::parse(&format!("version = 1\n[[rule]]\n{rule}\n")).unwrap();
        plan("layers = [2]\nheads = [3]\nprefill = \"flashattention-2\"").check(&cfg).unwrap();
        let e = plan("layers = [3]\nprefill = \"flashattention-2\"").check(&cfg).unwrap_err().to_string();
        assert!(e.contains("layer 3 is out of range; the model has layers 0 to 2"), "{e}");
        let e = plan("layers = [0]\nheads = [4]\nprefill = \"flashattention-2\"").check(&cfg).unwrap_err().to_string();
        assert!(e.contains("query heads 0 to 3"), "{e}");
        let e = plan("layers = [0]\nprefill = \"flashattention-3x\"").check(&cfg).unwrap_err().to_string();
        assert!(e.contains("unknown system"), "{e}");
    }

    fn arb_spec() -> impl Strategy<Value = Spec> {
        let value = prop_oneof![
            any::<i32>().prop_map(|x| x.to_string()),
            (-1e3f64..1e3).prop_map(|x| format!("{x:?}")),
            "[a-z][a-z-]{0,6}",
            Just("true".to_string()),
            Just("1;2;x".to_string()),
            Just("7;".to_string()),
            Just("; a b ; c".to_string()),
        ];
        ("[a-z][a-z0-9-]{0,12}", proptest::collection::vec(("[a-z_]{1,8}", value), 0..4))
            .prop_map(|(id, params)| params.into_iter().fold(Spec::new(id), |s, (k, v)| s.with(&k, &v)))
    }

    fn arb_rule() -> impl Strategy<Value = Rule> {
        let list = || proptest::collection::vec(0usize..100, 1..5);
        (list(), proptest::option::of(list()), arb_spec(), proptest::option::of(arb_spec())).prop_map(
            |(layers, heads, prefill, cache)| Rule {
                cache: if heads.is_some() { None } else { cache },
                layers,
                heads,
                prefill: Some(prefill),
            },
        )
    }

    proptest! {
        #[test]
        fn round_trips(
            name in any::<String>(),
            prefill in arb_spec(),
            cache in arb_spec(),
            dtype in 0usize..4,
            rules in proptest::collection::vec(arb_rule(), 0..5),
        ) {
            let kv_dtype = [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8, KvDtype::Int4][dtype];
            let plan = Plan { version: VERSION, name, prefill, cache, kv_dtype, rules };
            prop_assert_eq!(Plan::parse(&plan.to_toml()).unwrap(), plan);
        }

        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Plan::parse(&String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn never_panics_near_the_grammar(
            text in r#"(version|name|prefill|cache|kv_dtype|layers|heads|\[\[rule\]\]|\[rule\]|=|1|-7|"|\[|\]|,|\n| |a:b=c|é){0,60}"#
        ) {
            let _ = Plan::parse(&text);
        }
    }
}
