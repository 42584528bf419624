//! The command line, as clap sees it. Its doc comments are the help texts and `docs/cli.md`.

use clap::{Args, Parser, Subcommand, ValueEnum};
use foveal::registry::State;
use foveal::{Family, Slot};
use foveal_kernels::Isa;
use std::path::PathBuf;

/// Which attention should this model use, at this length, on this machine, and what does it cost in quality?
///
/// Foveal runs pretrained models with any of its attention systems in place of the dense one,
/// measures time, memory and quality beside dense attention, and says where a system pays.
///
/// Systems are written as an id with optional parameters: xattention, xattention:threshold=0.9,stride=8.
/// A list inside a parameter is separated by semicolons. `foveal list` shows the ids, `foveal show ID` the parameters.
#[derive(Parser)]
#[command(name = "foveal", version, arg_required_else_help = true, max_term_width = 110)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// No progress and no remarks on standard error; errors are still reported
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Threads to compute with [default: the physical cores available]
    #[arg(long, global = true, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
    /// Highest instruction set to use: portable, avx2, avx512 or amx [default: the best of this machine]
    #[arg(long, global = true, value_name = "ISA", value_parser = isa)]
    pub isa: Option<Isa>,
}

#[derive(Subcommand)]
pub enum Command {
    List(ListArgs),
    Show(ShowArgs),
    Doctor(DoctorArgs),
    Apply(ApplyArgs),
    #[command(hide = true)]
    Docs(DocsArgs),
}

/// List all catalogued systems with family, slots and state
///
/// States: `done` (built and held to its laws), `not-yet` (catalogued only), `nothing` (a paper
/// without an attention, mixing, low-rank or adapter piece; the reason is shown).
#[derive(Args)]
pub struct ListArgs {
    /// Only one family: its letter (A to P) or a word of its title
    #[arg(long, value_name = "FAMILY", value_parser = family)]
    pub family: Option<Family>,
    /// Only systems that plug in at this slot (built systems only)
    #[arg(long, value_name = "SLOT", value_parser = slot)]
    pub slot: Option<Slot>,
    /// Only systems in this state
    #[arg(long, value_name = "STATE")]
    pub state: Option<StateArg>,
    /// Only systems whose id, title or reason contains this text, ignoring case
    #[arg(long, value_name = "TEXT")]
    pub search: Option<String>,
    /// Machine-readable output
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum StateArg {
    /// Built and held to its laws
    Done,
    /// In the catalogue, not built yet
    NotYet,
    /// Nothing to build
    Nothing,
}

impl StateArg {
    pub fn state(self) -> State {
        match self {
            StateArg::Done => State::Done,
            StateArg::NotYet => State::NotYet,
            StateArg::Nothing => State::NothingToBuild,
        }
    }
}

/// Show one system: paper, equation, cost, slots, laws, parameters with defaults, settled choices
///
/// Settled choices say what the sources left open or contradict, what was chosen here and why.
#[derive(Args)]
pub struct ShowArgs {
    /// Id of the system, as in `foveal list`
    pub id: String,
    /// Machine-readable output
    #[arg(long)]
    pub json: bool,
}

/// Show what this machine offers and what each missing thing disables
///
/// Looks at instruction sets, cores, memory, the cache folder and the tools that fetching needs.
#[derive(Args)]
pub struct DoctorArgs {
    /// Machine-readable output
    #[arg(long)]
    pub json: bool,
}

/// Run one system on raw tensors from a file, to check it against a reference of your own
///
/// The input is a safetensors file with `q` of shape (B, H, Tq, D), `k` (B, Hkv, Tk, D) and `v`
/// (B, Hkv, Tk, Dv) in F32, F16 or BF16 (computed in f32; H a multiple of Hkv). The causal mask is
/// aligned bottom-right: query i sees keys up to Tk - Tq + i. The output holds `o` (B, H, Tq, Dv) and
/// `lse` (B, H, Tq), the natural log-sum-exp, both F32, and with --mask `mask` (B, H, Tq, Tk), U8, 1
/// where the query attended to the key.
///
/// Standard output gets one JSON object: the parameters in force, the work of attending and of
/// selecting, and the density (visited pairs over the pairs that exact attention visits).
#[derive(Args)]
pub struct ApplyArgs {
    /// System with slot prefill: an id, or an id with parameters (id:name=value,…)
    pub id: String,
    /// safetensors file with q, k and v
    #[arg(long = "in", value_name = "FILE")]
    pub input: PathBuf,
    /// safetensors file to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Set a parameter; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = assignment)]
    pub set: Vec<(String, String)>,
    /// Seed of systems that draw at random (the parameter `seed`); without effect on the others
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Also write the dense 0/1 mask of what was attended to
    #[arg(long)]
    pub mask: bool,
    /// Whether query i sees only keys up to Tk - Tq + i; `false` works with exact systems only
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub causal: bool,
    /// Factor on q·k [default: 1/√D]
    #[arg(long, value_name = "X")]
    pub scale: Option<f32>,
}

/// Write docs/systems.md and docs/cli.md from the cards, the catalogue and this command line.
#[derive(Args)]
pub struct DocsArgs {
    /// Folder to write into
    #[arg(long, value_name = "DIR", default_value = "docs")]
    pub dir: PathBuf,
    /// Write nothing; fail if the files there are not what would be written
    #[arg(long)]
    pub check: bool,
}

fn threads(s: &str) -> Result<usize, String> {
    match s.parse::<usize>() {
        Ok(n) if (1..=1024).contains(&n) => Ok(n),
        _ => Err("give a number from 1 to 1024".into()),
    }
}

fn isa(s: &str) -> Result<Isa, String> {
    s.parse().map_err(|_| "use portable, avx2, avx512 or amx".into())
}

fn family(s: &str) -> Result<Family, String> {
    let all = || ('A'..='P').filter_map(Family::from_letter);
    let mut letters = s.chars();
    if let (Some(c), None) = (letters.next(), letters.next())
        && let Some(f) = Family::from_letter(c.to_ascii_uppercase())
    {
        return Ok(f);
    }
    let word = s.to_lowercase();
    let found: Vec<Family> = all().filter(|f| !word.is_empty() && f.title().to_lowercase().contains(&word)).collect();
    match found[..] {
        [one] => Ok(one),
        _ => Err(format!(
            "give a letter or a word of one title: {}",
            all().map(|f| format!("{} {}", f.letter(), f.title())).collect::<Vec<_>>().join("; ")
        )),
    }
}

/// All slots, in the order of the design.
pub const SLOTS: &[Slot] = &[
    Slot::Prefill,
    Slot::Cache,
    Slot::Mixer,
    Slot::Score,
    Slot::Position,
    Slot::Reduce,
    Slot::Convert,
    Slot::Adapter,
    Slot::Optimiser,
    Slot::Parallel,
    Slot::Kernel,
    Slot::Check,
    Slot::Task,
];

fn slot(s: &str) -> Result<Slot, String> {
    SLOTS
        .iter()
        .copied()
        .find(|x| x.to_string() == s.to_lowercase())
        .ok_or_else(|| format!("slots are {}", SLOTS.iter().map(Slot::to_string).collect::<Vec<_>>().join(", ")))
}

fn assignment(s: &str) -> Result<(String, String), String> {
    match s.split_once('=') {
        Some((k, v)) if !k.trim().is_empty() => Ok((k.trim().into(), v.trim().into())),
        _ => Err("write NAME=VALUE".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn families_by_letter_or_word() {
        assert_eq!(family("b").unwrap(), Family::Sparse);
        assert_eq!(family("sparse").unwrap(), Family::Sparse);
        assert_eq!(family("vision").unwrap(), Family::Vision);
        assert!(family("zz").unwrap_err().contains("B sparse patterns"));
    }
}
