//! Running a comparison: every plan at every length, with dense work shared.
//!
//! At one length there is one prompt: the text with the passkeys in it (the plain text where needles
//! are left out). Plans with the same prefill part form a group, whose prompt gives everything: its
//! time, perplexity where the store is dense (of the text's own tokens in its last quarter), and the
//! store that needles and decoding start from. Three quarters of it run once more and serve every
//! member's perplexity through its store. Captured keys and values live no longer than that.
//!
//! Dense is timed before and after all others, repeats go round by round over all groups, so that a
//! drift of the machine hits all alike, and decode steps of a store alternate with steps of a dense
//! store of the same prompt.

use crate::error::{LabError, Result};
use crate::needle::{self, Haystack, NeedleOptions};
use crate::results::*;
use crate::verdict::{Crossover, Verdict, judge, summarise};
use crate::{maps, ppl};
use foveal::cache::Needs;
use foveal::registry;
use foveal_llm::plan::DENSE;
use foveal_llm::{
    AttentionDtype, Calibration, LlmError, LogitsFor, Model, Plan, PrefillOptions, Prompt, Session, Tokenizer,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What to measure, and how finely.
#[derive(Debug, Clone, PartialEq)]
pub struct CompareOptions {
    /// Measure perplexity.
    pub ppl: bool,
    /// Passkeys; `None` leaves needles out.
    pub needles: Option<NeedleOptions>,
    /// Record what one layer and head looked at.
    pub maps: bool,
    /// Layer and query head of the pictures; `None` = the middle layer's first head.
    pub map_head: Option<(usize, usize)>,
    /// Storage type of q, k and v in prompt attention, dense and sparse alike.
    pub attention: AttentionDtype,
    /// Decode steps timed.
    pub decode_steps: usize,
    /// Rows of a prompt whose attention output is compared with exact attention.
    pub probe_rows: usize,
    /// A prompt is repeated until about this many seconds are spent (at most 5 times).
    pub repeat_seconds: f64,
}

impl Default for CompareOptions {
    fn default() -> Self {
        Self {
            ppl: true,
            needles: Some(NeedleOptions::default()),
            maps: true,
            map_head: None,
            attention: AttentionDtype::fastest(),
            decode_steps: 16,
            probe_rows: 64,
            repeat_seconds: 1.0,
        }
    }
}

/// How far a comparison is.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Share of the estimated work that is done, 0 to 1.
    pub fraction: f64,
    /// What runs now.
    pub what: String,
}

/// A comparison to run.
pub struct Comparison<'a> {
    /// The model.
    pub model: &'a Model,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Tokens of the text.
    pub text: &'a [u32],
    /// Tokens for statistics that some policies need; empty = the end of the text if it reaches
    /// 512 tokens beyond the longest length, else its beginning (said in the notes).
    pub calibration: &'a [u32],
    /// Prompt lengths in tokens.
    pub lengths: Vec<usize>,
    /// What to compare; dense is put first if it is not there.
    pub plans: Vec<Plan>,
    /// What to measure.
    pub options: CompareOptions,
    /// What the caller knows; machine and model are filled in.
    pub facts: Facts,
}

/// Prefill systems of the default comparison, each with a dense store.
pub const DEFAULT_PREFILL: [&str; 5] = ["minference", "xattention", "hip-attention", "moba", "anchorattention"];
/// Cache policies of the default comparison, each with dense prefill.
pub const DEFAULT_CACHE: [&str; 5] = ["think", "loki", "tokenselect", "alisa", "palu"];
/// Lengths of the default comparison.
pub const DEFAULT_LENGTHS: [usize; 3] = [512, 2048, 8192];
/// Tokens of a calibration text that are used.
const CALIBRATION: usize = 2048;

/// Plans of a comparison: dense, then every prefill spec × every cache spec. With both lists
/// empty the default systems, one change at a time.
pub fn plans(prefill: &[foveal::Spec], cache: &[foveal::Spec], kv: foveal::prim::kv::KvDtype) -> Vec<Plan> {
    let dense = foveal::Spec::new(DENSE);
    let mut first = Plan::of(&dense, &dense, kv);
    first.name = "dense".into();
    let mut out = vec![first];
    let mut add = |p: &foveal::Spec, c: &foveal::Spec| {
        let plan = Plan::of(p, c, kv);
        if (p.id != DENSE || c.id != DENSE) && !out.contains(&plan) {
            out.push(plan);
        }
    };
    if prefill.is_empty() && cache.is_empty() {
        DEFAULT_PREFILL.iter().for_each(|p| add(&foveal::Spec::new(*p), &dense));
        DEFAULT_CACHE.iter().for_each(|c| add(&dense, &foveal::Spec::new(*c)));
        return out;
    }
    let or_dense = |x: &[foveal::Spec]| if x.is_empty() { vec![dense.clone()] } else { x.to_vec() };
    for p in or_dense(prefill) {
        for c in or_dense(cache) {
            add(&p, &c);
        }
    }
    out
}

/// The plan with a dense store.
fn prompt_part(p: &Plan) -> Plan {
    let mut q = p.clone();
    q.name = String::new();
    q.cache = foveal::Spec::new(DENSE);
    q.rules.iter_mut().for_each(|r| r.cache = None);
    q.rules.retain(|r| r.prefill.is_some());
    q
}

/// What a plan changes; `kv` is dense's storage type.
pub fn role(p: &Plan, kv: foveal::prim::kv::KvDtype) -> Role {
    let sparse = |s: &foveal::Spec| s.id != DENSE;
    let prompt = sparse(&p.prefill) || p.rules.iter().any(|r| r.prefill.as_ref().is_some_and(sparse));
    let store = sparse(&p.cache) || p.rules.iter().any(|r| r.cache.as_ref().is_some_and(sparse)) || p.kv_dtype != kv;
    match (prompt, store) {
        (false, false) => Role::Dense,
        (true, false) => Role::Prefill,
        (false, true) => Role::Cache,
        (true, true) => Role::Both,
    }
}

fn describe(p: &Plan, role: Role) -> SystemInfo {
    let mut ids: Vec<&str> = vec![&p.prefill.id, &p.cache.id];
    for r in &p.rules {
        ids.extend(r.prefill.iter().chain(&r.cache).map(|s| s.id.as_str()));
    }
    if ids.iter().any(|i| *i != DENSE) {
        ids.retain(|i| *i != DENSE);
    }
    let mut seen: Vec<&str> = Vec::new();
    ids.retain(|i| {
        !seen.contains(i) && {
            seen.push(i);
            true
        }
    });
    let cards: Vec<_> = ids.iter().filter_map(|i| registry::find(i).ok()).collect();
    let join = |f: fn(&foveal::Card) -> &str, by: &str| {
        cards.iter().map(|c| f(c)).filter(|s| !s.is_empty()).collect::<Vec<_>>().join(by)
    };
    SystemInfo {
        name: if p.name.is_empty() { format!("{} + {}", p.prefill, p.cache) } else { p.name.clone() },
        prefill: p.prefill.to_string(),
        cache: p.cache.to_string(),
        kv_dtype: p.kv_dtype.to_string(),
        role,
        plan: p.to_toml(),
        title: join(|c| c.title, "; "),
        arxiv: join(|c| c.arxiv, ", "),
    }
}

/// Everything measured of one plan at one length.
#[derive(Default, Clone)]
struct Measured {
    store: Option<StoreMeasured>,
    ppl: Option<f64>,
    needle: Option<Needle>,
    error: Option<OutputError>,
    failed: Option<String>,
}

#[derive(Clone, Copy)]
struct StoreMeasured {
    resident: foveal::cache::Resident,
    tokens: usize,
    decode: DecodeMeasured,
}

#[derive(Clone, Copy, Default)]
struct DecodeMeasured {
    step_seconds: f64,
    /// Speed over the dense store's of the same prompt, steps taken in turn.
    ratio: f64,
    pairs: u64,
    dense_pairs: u64,
    steps: usize,
}

#[derive(Default, Clone)]
struct PromptMeasured {
    seconds: Vec<f64>,
    attention: Vec<f64>,
    select: Vec<f64>,
    pairs: u64,
    flops: u64,
    fallback_flops: u64,
    failed: Option<String>,
}

/// What all plans read at one length.
struct Subject {
    tokens: Vec<u32>,
    /// The last quarter of the text begins here.
    from: usize,
    /// Of each token from `from` on, whether it is the text's own.
    own: Vec<bool>,
    hay: Option<Haystack>,
}

impl Subject {
    fn new(c: &Comparison, l: usize) -> Result<Self> {
        let Some(o) = &c.options.needles else {
            let from = ppl::split(l)?;
            return Ok(Self { tokens: c.text[..l].to_vec(), from, own: vec![true; l - from], hay: None });
        };
        let hay = needle::haystack(c.tokenizer, c.text, l, o)?;
        let own: Vec<usize> = (0..hay.prompt.len()).filter(|&i| hay.text[i]).collect();
        let from = own[ppl::split(own.len())?];
        Ok(Self { tokens: hay.prompt.clone(), from, own: hay.text[from..].to_vec(), hay: Some(hay) })
    }

    /// Tokens that are scored.
    fn scored(&self) -> usize {
        self.own.iter().filter(|x| **x).count()
    }

    /// Of −ln p of the tokens from `from` on.
    fn perplexity(&self, nll: &[f64]) -> f64 {
        let own: Vec<f64> = nll.iter().zip(&self.own).filter(|x| *x.1).map(|x| *x.0).collect();
        ppl::perplexity(&own)
    }
}

/// Plans with one prefill part.
struct Group {
    plan: Plan,
    members: Vec<usize>,
}

/// Estimated cost of a dense prompt of `t` tokens in units of a short prompt's token: only for
/// the progress bar.
fn cost(t: usize) -> f64 {
    t as f64 * (1.0 + t as f64 / 6000.0)
}

struct Run<'a, 'c> {
    c: &'c Comparison<'a>,
    plans: Vec<Plan>,
    needs: Vec<Needs>,
    roles: Vec<Role>,
    calibration: Option<Calibration>,
    cancel: Option<Arc<AtomicBool>>,
    progress: &'c mut dyn FnMut(&Progress),
    done: f64,
    total: f64,
    notes: Vec<String>,
    maps: Vec<Map>,
}

impl Comparison<'_> {
    /// Measure everything. `progress` is told before every step; `cancel` stops at the next one.
    /// A system that the engine refuses is reported as failed and the rest goes on.
    ///
    /// # Errors
    /// A text shorter than the longest length, lengths that make no sense, cancellation, and
    /// any failure of dense itself.
    pub fn run(&self, progress: &mut dyn FnMut(&Progress), cancel: Option<Arc<AtomicBool>>) -> Result<Results> {
        let begin = Instant::now();
        let mut lengths = self.lengths.clone();
        lengths.sort_unstable();
        lengths.dedup();
        let longest = *lengths.last().ok_or(LabError::Setting {
            name: "lengths",
            value: "none".into(),
            remedy: "give at least one, for example 512,2048,8192".into(),
        })?;
        if let Some(&l) = lengths.iter().find(|&&l| l < 64) {
            return Err(LabError::Length { length: l, problem: "use at least 64 tokens".into() });
        }
        if self.text.len() < longest {
            return Err(LabError::TextTooShort {
                what: format!("a length of {longest}"),
                have: self.text.len(),
                need: longest,
            });
        }
        let config = self.model.config();
        let mut plans = self.plans.clone();
        let kv = plans.first().map(|p| p.kv_dtype).unwrap_or_default();
        if plans.first().is_none_or(|p| role(p, kv) != Role::Dense) {
            let dense = foveal::Spec::new(DENSE);
            let mut first = Plan::of(&dense, &dense, kv);
            first.name = "dense".into();
            plans.insert(0, first);
        }
        let roles: Vec<Role> = plans.iter().map(|p| role(p, kv)).collect();
        let mut needs = Vec::new();
        for p in &plans {
            // A plan that does not fit the model is the caller's mistake, better told at once.
            needs.push(p.resolve(config)?.needs());
        }
        let mut groups: Vec<Group> = Vec::new();
        for (i, p) in plans.iter().enumerate() {
            let part = Plan { kv_dtype: kv, ..prompt_part(p) };
            match groups.iter_mut().find(|g| g.plan == part) {
                Some(g) => g.members.push(i),
                None => groups.push(Group { plan: part, members: vec![i] }),
            }
        }

        let stores = |g: &Group| g.members.iter().filter(|&&m| matches!(roles[m], Role::Cache | Role::Both)).count();
        let mut total = 0.0;
        for &l in &lengths {
            total += cost(l);
            for g in &groups {
                total += cost(l) + 0.3 * cost(l) * g.members.len() as f64;
                total += if stores(g) > 0 { 0.6 * cost(l) + 0.6 * cost(l) * stores(g) as f64 } else { 0.0 };
            }
        }
        let systems: Vec<SystemInfo> = plans.iter().zip(&roles).map(|(p, r)| describe(p, *r)).collect();
        let mut run = Run {
            c: self,
            plans,
            needs,
            roles,
            calibration: None,
            cancel,
            progress,
            done: 0.0,
            total,
            notes: Vec::new(),
            maps: Vec::new(),
        };
        let calibrated = run.calibrate(longest)?;
        let map_length = lengths.iter().copied().filter(|&l| l <= 2048).max().unwrap_or(lengths[0]);
        let mut rows = Vec::new();
        for &l in &lengths {
            let shown = if self.options.maps && l == map_length { Some(self.map_head()) } else { None };
            rows.extend(run.length(l, &groups, shown)?);
        }
        let Run { mut notes, maps, .. } = run;
        notes.extend(fallback_note(&rows, &systems));
        let mut maps_in_order = maps;
        maps_in_order.sort_by_key(|m| m.system);
        let (layer, head) = self.map_head();
        let mut facts = crate::facts::gather(self.model, self.facts.clone());
        facts.text_tokens = self.text.len();
        facts.seed = self.options.needles.map_or(0, |n| n.seed);
        if facts.calibration.is_empty() {
            facts.calibration = calibrated;
        }
        let mut results = Results {
            schema: SCHEMA,
            facts,
            lengths,
            systems,
            rows,
            summaries: Vec::new(),
            maps: (!maps_in_order.is_empty()).then_some(Maps { layer, head, length: map_length, maps: maps_in_order }),
            seconds: 0.0,
            peak_bytes: crate::facts::peak_bytes(),
            notes,
        };
        judge_all(&mut results);
        results.seconds = begin.elapsed().as_secs_f64();
        Ok(results)
    }

    fn map_head(&self) -> (usize, usize) {
        self.options.map_head.unwrap_or((self.model.config().num_layers / 2, 0))
    }
}

impl Run<'_, '_> {
    fn tell(&mut self, what: String) -> Result<()> {
        self.check()?;
        (self.progress)(&Progress { fraction: (self.done / self.total.max(1.0)).min(1.0), what });
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if self.cancel.as_ref().is_some_and(|c| c.load(Ordering::Relaxed)) { Err(LabError::Cancelled) } else { Ok(()) }
    }

    /// A failure of one system: kept as a reason unless everything must stop.
    fn survive<T>(&self, r: Result<T>) -> Result<std::result::Result<T, String>> {
        self.check()?;
        match r {
            Ok(x) => Ok(Ok(x)),
            Err(e) => Ok(Err(e.to_string())),
        }
    }

    fn calibrate(&mut self, longest: usize) -> Result<String> {
        if !self.needs.iter().any(|n| n.calibration) {
            return Ok(String::new());
        }
        let (text, told) = if !self.c.calibration.is_empty() {
            (self.c.calibration, "its own text")
        } else if self.c.text.len() >= longest + 512 {
            (&self.c.text[longest..], "the text beyond the longest length")
        } else {
            self.notes.push(
                "The calibration text is the beginning of the measured text itself: give another one to keep them apart."
                    .into(),
            );
            (self.c.text, "the beginning of the measured text")
        };
        let tokens = &text[..text.len().min(CALIBRATION)];
        self.tell(format!("calibrating on {} tokens", tokens.len()))?;
        // Policies that factorise the weights weigh them by the layer's inputs.
        let inputs = self.needs.iter().any(|n| n.input_moment);
        self.calibration = Some(self.c.model.calibrate_until(tokens, inputs, self.cancel.clone())?);
        Ok(format!("{told}, {} tokens", tokens.len()))
    }

    fn options(&self, logits: LogitsFor) -> PrefillOptions {
        PrefillOptions {
            logits,
            attention: self.c.options.attention,
            cancel: self.cancel.clone(),
            ..Default::default()
        }
    }

    fn length(&mut self, l: usize, groups: &[Group], shown: Option<(usize, usize)>) -> Result<Vec<Row>> {
        let c = self.c;
        let subject = Subject::new(c, l)?;
        let mut measured = vec![Measured::default(); self.plans.len()];
        let mut prompts = vec![PromptMeasured::default(); groups.len()];
        let dense_failed = |e: String| LabError::Length { length: l, problem: format!("dense attention failed: {e}") };

        // 1. Dense alone, which also tells how often short prompts are to be repeated.
        self.tell(format!("{l} tokens: prompt, dense"))?;
        let first = c.model.prefill(&subject.tokens, &groups[0].plan, &self.options(LogitsFor::Last));
        let first = self.survive(first.map_err(Into::into))?.map_err(dense_failed)?;
        prompts[0].add(&first);
        self.done += cost(l);
        let repeats = ((c.options.repeat_seconds / first.stats.seconds).ceil() as usize).clamp(1, 5);
        drop(first);

        // 2. Everything that hangs on a group's prompt; dense last, so that it frames the others.
        for (g, group) in groups.iter().enumerate().skip(1).chain(groups.iter().enumerate().take(1)) {
            let done = self.group(&subject, l, group, shown, &mut prompts[g], &mut measured);
            if let Err(e) = self.survive(done)? {
                if g == 0 {
                    return Err(dense_failed(e));
                }
                group.members.iter().for_each(|&m| measured[m].failed = Some(e.clone()));
                prompts[g].failed = Some(e);
            }
        }
        for _ in 1..repeats {
            for (g, group) in
                groups.iter().enumerate().filter(|(g, _)| prompts[*g].failed.is_none()).collect::<Vec<_>>()
            {
                self.tell(format!("{l} tokens: prompt, {}", group_name(&self.plans, group)))?;
                let p = c.model.prefill(&subject.tokens, &group.plan, &self.options(LogitsFor::Last))?;
                prompts[g].add(&p);
            }
        }

        // 3. Perplexity through the stores.
        if c.options.ppl {
            for group in groups {
                self.store_ppl(&subject, l, group, &mut measured)?;
            }
        }
        self.rows(l, subject.scored(), groups, &prompts, &measured)
    }

    /// A group's prompt: time, perplexity, errors, stores, decoding, needles, pictures.
    fn group(
        &mut self,
        subject: &Subject,
        l: usize,
        group: &Group,
        shown: Option<(usize, usize)>,
        timed: &mut PromptMeasured,
        measured: &mut [Measured],
    ) -> Result<()> {
        let c = self.c;
        let (tokens, hay) = (&subject.tokens[..], subject.hay.as_ref());
        let sparse = group.plan != prompt_part(&self.plans[0]);
        let has_store = |r: Role| matches!(r, Role::Cache | Role::Both);
        let stored: Vec<usize> = group.members.iter().copied().filter(|&m| has_store(self.roles[m])).collect();
        let plain: Vec<usize> = group.members.iter().copied().filter(|&m| !has_store(self.roles[m])).collect();
        self.tell(format!("{l} tokens: prompt, {}", group_name(&self.plans, group)))?;
        let scored = tokens.len() - subject.from;
        let mut o = self.options(if c.options.ppl { LogitsFor::LastN(scored + 1) } else { LogitsFor::Last });
        o.probe_rows = if sparse { c.options.probe_rows } else { 0 };
        o.record = shown.into_iter().collect();
        o.capture = !stored.is_empty();
        o.capture_pre = stored.iter().any(|&m| self.needs[m].pre_rotation);
        let (reference, prompt) = c.model.start(tokens, &group.plan, None, &o)?;
        timed.add(&prompt);
        self.done += cost(l);
        if c.options.ppl && !plain.is_empty() {
            let ppl = subject.perplexity(&ppl::of_prompt(c.model, &prompt, tokens, subject.from)?);
            plain.iter().for_each(|&m| measured[m].ppl = Some(ppl));
        }
        let prompt_error = OutputError::of(prompt.probe.iter().map(|&x| f64::from(x)).collect(), Place::Prompt);
        for &m in &group.members {
            measured[m].error = prompt_error.clone();
        }
        for r in &prompt.recorded {
            let first = group.members[0];
            match &r.selection {
                Some(s) => {
                    if let Some(&m) = plain.first().or(stored.first()) {
                        self.maps.push(maps::selection(m, s, r.tq, r.tk, true));
                    }
                }
                None if first == 0 => {
                    let scale = 1.0 / (r.d as f32).sqrt();
                    let (q, k) = (&r.q, &r.k);
                    let head = maps::Head { q, k, tq: r.tq, tk: r.tk, d: r.d, scale, causal: true };
                    self.maps.push(maps::exact(0, &head));
                }
                None => {}
            }
        }

        // The dense store of this prompt: needles of the plans that keep it.
        if let Some(h) = hay
            && !plain.is_empty()
        {
            self.tell(format!("{l} tokens: needles, {}", self.plans[plain[0]].name))?;
            let n = needle::run(c.model, &reference, h)?;
            for &m in &plain {
                measured[m].needle = Some(n.clone());
            }
        }
        if plain.contains(&0) {
            let decode = self.decode(&reference, None, None)?.0;
            measured[0].store = Some(StoreMeasured { resident: reference.resident(), tokens: reference.len(), decode });
        }
        self.done += 0.3 * cost(l) * plain.len() as f64;

        for &m in &stored {
            self.tell(format!("{l} tokens: store and needles, {}", self.plans[m].name))?;
            let one = self.one_store(&prompt, &reference, m, hay, shown, tokens);
            match self.survive(one)? {
                Ok((store, needle, error, strip)) => {
                    measured[m].store = Some(store);
                    measured[m].needle = needle;
                    // Of two errors the larger speaks for a combination.
                    if let Some(e) = error
                        && measured[m].error.as_ref().is_none_or(|p| e.mean > p.mean)
                    {
                        measured[m].error = Some(e);
                    }
                    self.maps.extend(strip);
                }
                Err(e) => measured[m].failed = Some(e),
            }
            self.done += 0.3 * cost(l);
        }
        Ok(())
    }

    #[allow(clippy::type_complexity)]
    fn one_store(
        &self,
        prompt: &Prompt,
        reference: &Session,
        m: usize,
        hay: Option<&Haystack>,
        shown: Option<(usize, usize)>,
        tokens: &[u32],
    ) -> Result<(StoreMeasured, Option<Needle>, Option<OutputError>, Option<Map>)> {
        let c = self.c;
        let session = c.model.session_until(prompt, &self.plans[m], self.calibration.as_ref(), self.cancel.clone())?;
        let resident = session.resident();
        let mut error = None;
        let mut needle = None;
        // The first continuation also shows how far attention is from exact.
        let mut probed = session.fork();
        probed.probe_next(prompt)?;
        let per_layer = |p: Vec<f32>| OutputError::of(p.iter().map(|&x| f64::from(x)).collect(), Place::Decode);
        match hay {
            Some(h) => {
                let mut trials = Vec::new();
                let mut first = Some(probed);
                for q in &h.questions {
                    self.check()?;
                    let s = first.take().unwrap_or_else(|| session.fork());
                    let e = needle::ask_rows(s, q)?;
                    trials.push(needle::score(c.model, &e, q));
                    if !e.probe.is_empty() {
                        error = per_layer(e.probe);
                    }
                }
                needle = Some(Needle { trials, tokens: h.prompt.len() });
            }
            None => {
                let n = 24.min(tokens.len());
                error = per_layer(probed.extend(&tokens[..n])?.probe);
            }
        }
        let (decode, visited) = self.decode(reference, Some(&session), shown)?;
        let strip = (!visited.is_empty()).then(|| maps::strip(m, &visited, tokens.len() + visited.len()));
        Ok((StoreMeasured { resident, tokens: session.len(), decode }, needle, error, strip))
    }

    /// Time single steps of `own` in turn with steps of the dense store `reference`; of the
    /// reference alone without `own`.
    fn decode(
        &self,
        reference: &Session,
        own: Option<&Session>,
        shown: Option<(usize, usize)>,
    ) -> Result<(DecodeMeasured, Vec<Vec<u32>>)> {
        const WARM: usize = 2;
        let mut dense = reference.fork();
        let mut other = own.map(Session::fork);
        let (mut td, mut to, mut visited) = (Vec::new(), Vec::new(), Vec::new());
        let mut m = DecodeMeasured { steps: self.c.options.decode_steps.max(1), ..Default::default() };
        for (i, &t) in self.c.text.iter().cycle().take(WARM + m.steps).enumerate() {
            self.check()?;
            let d = dense.extend(&[t])?.stats;
            if i >= WARM {
                td.push(d.seconds);
                m.dense_pairs += d.attend.pairs;
            }
            if let Some(s) = &mut other {
                let e = s.extend(&[t])?.stats;
                if i >= WARM {
                    to.push(e.seconds);
                    m.pairs += e.attend.pairs;
                    if let Some((layer, head)) = shown
                        && let Some(heads) = s.last_visited(layer)
                        && let Some(keys) = heads.get(head)
                    {
                        visited.push(keys.clone());
                    }
                }
            }
        }
        let dense_step = median(&mut td);
        if other.is_some() {
            m.step_seconds = median(&mut to);
            m.ratio = dense_step / m.step_seconds;
        } else {
            (m.step_seconds, m.ratio, m.pairs) = (dense_step, 1.0, m.dense_pairs);
        }
        Ok((m, visited))
    }

    fn store_ppl(&mut self, subject: &Subject, l: usize, group: &Group, measured: &mut [Measured]) -> Result<()> {
        let c = self.c;
        let members: Vec<usize> = group
            .members
            .iter()
            .copied()
            .filter(|&m| matches!(self.roles[m], Role::Cache | Role::Both) && measured[m].failed.is_none())
            .collect();
        if members.is_empty() {
            return Ok(());
        }
        let (before, rest) = subject.tokens.split_at(subject.from);
        self.tell(format!("{l} tokens: first three quarters, {}", group_name(&self.plans, group)))?;
        let mut o = self.options(LogitsFor::Last);
        o.capture = true;
        o.capture_pre = members.iter().any(|&m| self.needs[m].pre_rotation);
        let prompt = c.model.prefill(before, &group.plan, &o)?;
        self.done += 0.6 * cost(l);
        let h = c.model.config().hidden_size;
        for m in members {
            self.tell(format!("{l} tokens: perplexity, {}", self.plans[m].name))?;
            let one = || -> Result<f64> {
                let mut s =
                    c.model.session_until(&prompt, &self.plans[m], self.calibration.as_ref(), self.cancel.clone())?;
                let last = &prompt.hidden[prompt.hidden.len() - h..];
                Ok(subject.perplexity(&ppl::of_session(c.model, &mut s, last, rest, ppl::PIECE)?))
            };
            match self.survive(one())? {
                Ok(p) => measured[m].ppl = Some(p),
                Err(e) => measured[m].failed = Some(e),
            }
            self.done += 0.6 * cost(l);
        }
        Ok(())
    }

    fn rows(
        &self,
        l: usize,
        scored: usize,
        groups: &[Group],
        prompts: &[PromptMeasured],
        measured: &[Measured],
    ) -> Result<Vec<Row>> {
        let dense_prompt = prompts[0].summary();
        let dense_store = measured[0]
            .store
            .ok_or(LabError::Length { length: l, problem: "dense attention was not measured".into() })?;
        let dense_ppl = measured[0].ppl;
        let over = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        let mut rows = Vec::new();
        for (i, m) in measured.iter().enumerate() {
            let g = groups.iter().position(|g| g.members.contains(&i)).unwrap_or(0);
            let mut failed = m.failed.clone();
            let own = if prompts[g].failed.is_none() { prompts[g].summary() } else { dense_prompt };
            let prefill = Prefill {
                ratio: over(own.seconds, dense_prompt.seconds),
                attention_ratio: over(own.attention_seconds, dense_prompt.attention_seconds),
                density: over(own.pairs as f64, dense_prompt.pairs as f64),
                shared: g == 0 && i > 0,
                ..own
            };
            let store = m.store.unwrap_or(dense_store);
            let shared = m.store.is_none();
            let d = &store.decode;
            let decode = Decode {
                tokens_per_second: over(1.0, d.step_seconds),
                step_seconds: d.step_seconds,
                steps: d.steps,
                depth: store.tokens,
                ratio: d.ratio,
                pairs: d.pairs,
                density: over(d.pairs as f64, d.dense_pairs as f64),
                shared,
            };
            let bytes = Bytes {
                keys: store.resident.keys,
                values: store.resident.values,
                aux: store.resident.aux,
                tokens: store.tokens,
                ratio: over(store.resident.total() as f64, dense_store.resident.total() as f64),
            };
            let mut quality = None;
            match (m.ppl, dense_ppl) {
                (Some(p), Some(d)) if p.is_finite() && d.is_finite() => {
                    quality = Some(Ppl { ppl: p, tokens: scored, difference: p - d, percent: (p / d - 1.0) * 100.0 });
                }
                (Some(p), _) => failed = failed.or(Some(format!("perplexity is {p}: the output is not finite"))),
                _ => {}
            }
            rows.push(Row {
                system: i,
                length: l,
                prefill,
                decode,
                bytes,
                error: m.error.clone(),
                ppl: quality,
                needle: m.needle.clone(),
                verdict: match failed {
                    Some(reason) => Verdict::Failed { reason },
                    None => Verdict::NoGain { crossover: Crossover::Unknown },
                },
            });
        }
        Ok(rows)
    }
}

impl PromptMeasured {
    fn add(&mut self, p: &Prompt) {
        let s = &p.stats;
        self.seconds.push(s.seconds - s.store_seconds);
        self.attention.push(s.attention_seconds);
        self.select.push(s.select_seconds);
        self.pairs = s.attend.pairs;
        self.flops = s.attend.flops + s.select.flops;
        self.fallback_flops = s.attend.fallback + s.select.fallback;
    }

    fn summary(&self) -> Prefill {
        let m = |x: &[f64]| median(&mut x.to_vec());
        Prefill {
            seconds: m(&self.seconds),
            fastest: self.seconds.iter().copied().fold(f64::INFINITY, f64::min),
            slowest: self.seconds.iter().copied().fold(0.0, f64::max),
            repeats: self.seconds.len(),
            attention_seconds: m(&self.attention),
            select_seconds: m(&self.select),
            ratio: 1.0,
            attention_ratio: 1.0,
            pairs: self.pairs,
            flops: self.flops,
            fallback_flops: self.fallback_flops,
            density: 1.0,
            shared: false,
        }
    }
}

/// What a reader must know when fast kernels could not serve some of the prompts' attention.
fn fallback_note(rows: &[Row], systems: &[SystemInfo]) -> Option<String> {
    let share = |r: &Row| r.prefill.fallback_flops as f64 / r.prefill.flops.max(1) as f64;
    let own = || rows.iter().filter(|r| !r.prefill.shared && share(r) > 0.0);
    let worst = own().max_by(|a, b| share(a).total_cmp(&share(b)))?;
    Some(format!(
        "In {} of the measured prompts part of attention ran on a slower kernel path than the one asked for: \
         at most {:.1}% of its operations ({} at {} tokens). FOVEAL_LOG=info says why.",
        own().count(),
        share(worst) * 100.0,
        systems[worst.system].name,
        worst.length
    ))
}

fn group_name(plans: &[Plan], g: &Group) -> String {
    if g.members.contains(&0) { "dense".into() } else { plans[g.members[0]].name.clone() }
}

/// The middle value, or the mean of the two in the middle; 0 of nothing.
pub(crate) fn median(x: &mut [f64]) -> f64 {
    x.sort_by(f64::total_cmp);
    match x.len() {
        0 => 0.0,
        n if n % 2 == 1 => x[n / 2],
        n => (x[n / 2 - 1] + x[n / 2]) / 2.0,
    }
}

/// Fill every row's verdict and every system's summary from the measurements.
pub fn judge_all(r: &mut Results) {
    let verdicts: Vec<_> = r
        .rows
        .iter()
        .map(|row| {
            let dense = r.row(0, row.length).unwrap_or(row);
            let own: Vec<&Row> = r.of(row.system).collect();
            let dense_rows: Vec<&Row> = r.of(0).collect();
            judge(&r.systems[row.system], row, dense, &own, &dense_rows)
        })
        .collect();
    for (row, v) in r.rows.iter_mut().zip(verdicts) {
        row.verdict = v;
    }
    r.summaries = (0..r.systems.len()).map(|s| summarise(s, &r.of(s).collect::<Vec<_>>())).collect();
}

/// Whether an engine error means that the caller stopped the run.
pub fn is_cancelled(e: &LabError) -> bool {
    matches!(e, LabError::Cancelled | LabError::Llm(LlmError::Cancelled { .. }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use foveal::Spec;
    use foveal::prim::kv::KvDtype;

    #[test]
    fn default_and_swept_plans() {
        let p = plans(&[], &[], KvDtype::Bf16);
        assert_eq!(p.len(), 11);
        assert_eq!(role(&p[0], KvDtype::Bf16), Role::Dense);
        assert!(p[1..6].iter().all(|p| role(p, KvDtype::Bf16) == Role::Prefill));
        assert!(p[6..].iter().all(|p| role(p, KvDtype::Bf16) == Role::Cache));
        let s = |x: &str| x.parse::<Spec>().unwrap();
        let p = plans(&[s("moba:topk=3"), s("moba:topk=5")], &[s("think:ratio=0.5"), s(DENSE)], KvDtype::Bf16);
        assert_eq!(p.len(), 5);
        assert_eq!(role(&p[1], KvDtype::Bf16), Role::Both);
        assert_eq!(role(&p[2], KvDtype::Bf16), Role::Prefill);
        // A narrower store type alone changes the store.
        let int8 = Plan::of(&s(DENSE), &s(DENSE), KvDtype::Int8);
        assert_eq!(role(&int8, KvDtype::Bf16), Role::Cache);
    }

    #[test]
    fn plans_that_share_a_prompt_share_a_group() {
        let s = |x: &str| x.parse::<Spec>().unwrap();
        let a = Plan::of(&s("moba"), &s("think"), KvDtype::Bf16);
        let b = Plan::of(&s("moba"), &s("loki"), KvDtype::Bf16);
        let c = Plan::of(&s("moba:topk=2"), &s("loki"), KvDtype::Bf16);
        assert_eq!(prompt_part(&a), prompt_part(&b));
        assert_ne!(prompt_part(&a), prompt_part(&c));
    }

    #[test]
    fn medians() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&mut []), 0.0);
    }
}
