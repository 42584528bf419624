//! Models, texts and plans named on the command line.

use crate::Context;
use crate::cli::{ChoiceArgs, LoadArgs};
use crate::error::{CliError, Result};
use crate::machine::size;
use crate::progress::Progress;
use foveal::Spec;
use foveal_llm::plan::DENSE;
use foveal_llm::{Calibration, Checkpoint, LoadOptions, Model, Plan, PrefillOptions, Tokenizer, pull};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Tokens of a calibration text.
const CALIBRATION: usize = 2048;
/// Bytes of text that a token is allowed before the rest is not even looked at: no vocabulary packs
/// plain text tighter, and reading all of a long book would take seconds.
const BYTES_A_TOKEN: usize = 16;

/// A model ready to run.
pub struct Loaded {
    pub model: Model,
    pub tokenizer: Tokenizer,
    /// One line about the checkpoint.
    pub about: String,
}

/// Tell of a download.
fn fetching<'a>(progress: &'a Progress, name: &'a str) -> impl FnMut(pull::Progress) + 'a {
    move |p| {
        let fraction = if p.total == 0 { 0.0 } else { p.bytes as f64 / p.total as f64 };
        progress.at(fraction, &format!("fetching {name}: {} of {}", size(p.bytes), size(p.total)));
    }
}

/// Path of a model, fetched if it is a known name and absent.
pub fn model_path(name: &str, offline: bool, ctx: &Context) -> Result<PathBuf> {
    let progress = Progress::new(ctx);
    Ok(pull::model_path(name, offline, fetching(&progress, name), &ctx.cancel)?)
}

/// Path of the default text, fetched if absent.
pub fn default_text(offline: bool, ctx: &Context) -> Result<PathBuf> {
    let progress = Progress::new(ctx);
    Ok(pull::text_path(offline, fetching(&progress, pull::TEXT.name), &ctx.cancel)?)
}

/// Open a checkpoint and load its weights and tokenizer.
pub fn load(name: &str, a: &LoadArgs, ctx: &Context) -> Result<Loaded> {
    let path = model_path(name, a.offline, ctx)?;
    let checkpoint = Checkpoint::open(&path)?;
    let tokenizer = checkpoint.tokenizer()?;
    let about = checkpoint.describe();
    ctx.remark(&about);
    let model = Model::load_until(&checkpoint, &LoadOptions { weights: a.weights.0 }, Some(&ctx.cancel))?;
    Ok(Loaded { model, tokenizer, about })
}

/// Tokens of a text and one line about it.
pub struct Text {
    pub tokens: Vec<u32>,
    pub about: String,
}

/// Read at least `need` tokens of a text file, or of the default text. Fewer come back when the
/// text is shorter: whoever uses it says how many it wants.
pub fn text(file: Option<&Path>, need: usize, offline: bool, tokenizer: &Tokenizer, ctx: &Context) -> Result<Text> {
    let (path, about) = match file {
        Some(p) => (p.to_path_buf(), String::new()),
        None => (default_text(offline, ctx)?, format!(" ({})", pull::TEXT.about)),
    };
    let all = read_utf8(&path)?;
    let mut end = need.saturating_mul(BYTES_A_TOKEN).min(all.len());
    while !all.is_char_boundary(end) {
        end += 1;
    }
    let mut tokens = tokenizer.encode(&all[..end], true, false)?;
    if tokens.len() < need && end < all.len() {
        tokens = tokenizer.encode(&all, true, false)?;
    }
    tokens.truncate(need.max(1));
    let name = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
    Ok(Text { about: format!("{name}{about}, the first {} tokens", tokens.len()), tokens })
}

/// A UTF-8 file; the error says where it stops being one.
pub fn read_utf8(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| CliError::file(path, "read", e))?;
    String::from_utf8(bytes).map_err(|e| CliError::BadFile {
        path: path.into(),
        problem: format!("is not UTF-8 text (at byte {}); convert it first", e.utf8_error().valid_up_to()),
    })
}

/// The plan that the arguments describe, checked against the model.
pub fn plan(a: &ChoiceArgs, model: &Model) -> Result<Plan> {
    let plan = match &a.plan {
        Some(file) => Plan::load(file)?,
        None => {
            let dense = || Spec::new(DENSE);
            Plan::of(
                &a.prefill.clone().unwrap_or_else(dense),
                &a.cache.clone().unwrap_or_else(dense),
                a.kv_dtype.unwrap_or_default(),
            )
        }
    };
    plan.check(model.config())?;
    Ok(plan)
}

/// Statistics that the plan's cache policies need, from a text; `None` when they need none.
pub fn calibration(
    loaded: &Loaded,
    plan: &Plan,
    file: Option<&Path>,
    offline: bool,
    ctx: &Context,
) -> Result<Option<Calibration>> {
    let needs = plan.resolve(loaded.model.config())?.needs();
    if !needs.calibration {
        return Ok(None);
    }
    let text = text(file, CALIBRATION, offline, &loaded.tokenizer, ctx)?;
    ctx.remark(&format!("calibrating on {}", text.about));
    Ok(Some(loaded.model.calibrate_until(&text.tokens, needs.input_moment, Some(ctx.cancel.clone()))?))
}

/// Prompt options that show progress and obey Ctrl-C.
pub fn prompt_options(load: &LoadArgs, ctx: &Context, what: &'static str) -> PrefillOptions {
    let progress = Progress::new(ctx);
    PrefillOptions {
        attention: load.attention(),
        cancel: Some(ctx.cancel.clone()),
        progress: Some(Arc::new(move |done, total| progress.at(done as f64 / total.max(1) as f64, what))),
        ..PrefillOptions::default()
    }
}
