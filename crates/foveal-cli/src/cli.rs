//! The command line, as clap sees it. Its doc comments are the help texts and `docs/cli.md`.

use clap::{Args, Parser, Subcommand, ValueEnum};
use foveal::prim::kv::KvDtype;
use foveal::registry::State;
use foveal::{Family, Slot, Spec};
use foveal_kernels::Isa;
use foveal_kernels::linear::WeightFormat;
use foveal_llm::AttentionDtype;
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
    Pull(PullArgs),
    Compare(CompareArgs),
    Run(RunArgs),
    Eval(EvalArgs),
    Train(TrainArgs),
    Plan(PlanArgs),
    #[command(subcommand)]
    Bench(BenchCommand),
    #[command(subcommand)]
    Tune(TuneCommand),
    List(ListArgs),
    Show(ShowArgs),
    Doctor(DoctorArgs),
    Apply(ApplyArgs),
    Picture(PictureArgs),
    #[command(hide = true)]
    Docs(DocsArgs),
}

/// The model that is run when none is named.
pub const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// A weight format; `None` = as the file needs.
#[derive(Debug, Clone, Copy)]
pub struct Weights(pub Option<WeightFormat>);

/// How a model is found and held.
#[derive(Args)]
pub struct LoadArgs {
    /// Never fetch anything; what is not in the cache folder is an error
    #[arg(long)]
    pub offline: bool,
    /// Storage of the weights in memory: f32, bf16, int8, int4, or auto: no wider than the file needs
    #[arg(long, value_name = "FORMAT", default_value = "auto", value_parser = weights)]
    pub weights: Weights,
    /// Storage of q, k and v in prompt attention: f32 or bf16 [default: bf16 with AMX, else f32]
    #[arg(long, value_name = "TYPE")]
    pub attention: Option<AttentionDtype>,
}

impl LoadArgs {
    /// The attention type asked for, else the fastest here.
    pub fn attention(&self) -> AttentionDtype {
        self.attention.unwrap_or_else(AttentionDtype::fastest)
    }
}

/// What serves the prompt and the store.
#[derive(Args)]
pub struct ChoiceArgs {
    /// Plan file (TOML), as `foveal plan` writes it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prefill", "cache", "kv_dtype"])]
    pub plan: Option<PathBuf>,
    /// Prefill system, for example xattention:threshold=0.9 [default: exact]
    #[arg(long, value_name = "SYSTEM", value_parser = spec)]
    pub prefill: Option<Spec>,
    /// Cache policy, for example think:ratio=0.5 [default: everything kept]
    #[arg(long, value_name = "SYSTEM", value_parser = spec)]
    pub cache: Option<Spec>,
    /// Storage of keys and values: f32, bf16, int8 or int4 [default: bf16]
    #[arg(long, value_name = "TYPE", value_parser = kv_dtype)]
    pub kv_dtype: Option<KvDtype>,
}

/// Train what attention systems learn, on a pretrained model that stays as it is
#[derive(Subcommand)]
pub enum TuneCommand {
    Gates(TuneGatesArgs),
}

/// Teach SeerAttention's gates a model's own attention
///
/// Runs the model once over each piece of a text, keeps pooled queries and keys and the block maxima of its true
/// attention, and fits every layer's gates to them. Prints how much of the true attention of held-out text the blocks
/// hold that the gates choose, beside other choices of as many blocks, and writes a file for
/// --prefill seerattention:gates=FILE.
#[derive(Args)]
pub struct TuneGatesArgs {
    /// Known name, GGUF file, or folder with config.json and *.safetensors
    #[arg(default_value = DEFAULT_MODEL)]
    pub model: String,
    #[command(flatten)]
    pub load: LoadArgs,
    /// Text to read, UTF-8 [default: the King James Bible, fetched once]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// The gates, a safetensors file
    #[arg(long, value_name = "FILE", default_value = "gates.safetensors")]
    pub out: PathBuf,
    /// Settings, losses and recall of every layer as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Queries and keys per block
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub block_size: usize,
    /// Channels of a gate; 0: those of a head
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub gate_dim: usize,
    /// Tokens of a piece of text
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub length: usize,
    /// Pieces that gates are taught on
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub sequences: usize,
    /// Pieces after those that gates are judged on
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub held_out: usize,
    /// Optimiser steps of each layer
    #[arg(long, value_name = "N", default_value_t = 400)]
    pub steps: usize,
    /// Pieces a step
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub batch: usize,
    /// Highest learning rate
    #[arg(long, value_name = "RATE", default_value_t = 2e-3)]
    pub lr: f64,
    /// Seed of initial gates and of the order of pieces
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Blocks per query block, own included, at which choices are compared
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "2,4,8")]
    pub budgets: Vec<usize>,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Fetch a model or text by name into the cache folder
///
/// Uses Python's pip, checks the SHA-256 of what it fetched, and keeps it in FOVEAL_CACHE, else
/// XDG_CACHE_HOME/foveal, else the user's cache folder. Without a name, fetches the default model and
/// the default text, which is all that `foveal compare` needs.
#[derive(Args)]
pub struct PullArgs {
    /// smollm2-135m-instruct (model) or kjv (text) [default: both]
    pub name: Option<String>,
}

/// Compare attention systems on a real model: time, memory, quality, and a verdict for each
///
/// Runs the model densely and under each system at each length, prints one table per length and a
/// verdict per system, and writes PREFIX.html, PREFIX.json and PREFIX.csv. Without --prefill and
/// --cache it compares the default systems, one change at a time; with them, every prefill system
/// with every cache policy.
#[derive(Args)]
pub struct CompareArgs {
    /// Known name, GGUF file, or folder with config.json and *.safetensors
    #[arg(default_value = DEFAULT_MODEL)]
    pub model: String,
    #[command(flatten)]
    pub load: LoadArgs,
    /// Prefill systems, separated by commas; a part name=value belongs to the system before it
    #[arg(long, value_name = "LIST", value_parser = specs)]
    pub prefill: Vec<Specs>,
    /// Cache policies, separated by commas
    #[arg(long, value_name = "LIST", value_parser = specs)]
    pub cache: Vec<Specs>,
    /// A plan file to compare as well; may be repeated
    #[arg(long, value_name = "FILE")]
    pub plan: Vec<PathBuf>,
    /// Prompt lengths in tokens
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "512,2048,8192")]
    pub lengths: Vec<usize>,
    /// Text to read, UTF-8 [default: the King James Bible, fetched once]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Storage of keys and values: f32, bf16, int8 or int4
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = kv_dtype)]
    pub kv_dtype: KvDtype,
    /// Prefix of the report files
    #[arg(long, value_name = "PREFIX", default_value = "foveal-report")]
    pub out: PathBuf,
    /// Passkeys hidden per length, at most 20; 0 leaves them out
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = trials)]
    pub trials: usize,
    /// Leave perplexity out
    #[arg(long)]
    pub no_ppl: bool,
    /// Leave the pictures of what was looked at out
    #[arg(long)]
    pub no_maps: bool,
    /// Decode steps timed per system and length
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub decode_steps: usize,
    /// Seed of the passkeys
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Print the whole report as JSON instead of tables
    #[arg(long)]
    pub json: bool,
}

/// Generate text, streaming, under any plan
///
/// The prompt is the second argument, the contents of --prompt-file, or standard input. A single
/// argument with a space in it that names no file is taken as the prompt of the default model.
/// The text goes to standard output, one line of times and bytes to standard error.
#[derive(Args)]
pub struct RunArgs {
    /// Known name, GGUF file, or folder with config.json and *.safetensors [default: smollm2-135m-instruct]
    pub model: Option<String>,
    /// The prompt
    pub prompt: Option<String>,
    /// Read the prompt from a UTF-8 file; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompt_file: Option<PathBuf>,
    #[command(flatten)]
    pub load: LoadArgs,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    /// Continue the prompt as raw text instead of answering it through the chat template
    #[arg(long, conflicts_with = "system")]
    pub no_chat: bool,
    /// System message of the chat
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_tokens: usize,
    /// Randomness of the choice; 0 always takes the likeliest token
    #[arg(long, value_name = "X", allow_negative_numbers = true, default_value_t = 0.0)]
    pub temperature: f32,
    /// Choose among the likeliest tokens that hold this share of the probability
    #[arg(long, value_name = "X", allow_negative_numbers = true, default_value_t = 1.0)]
    pub top_p: f32,
    /// Choose among this many likeliest tokens; 0 is all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: usize,
    /// Drop tokens less likely than this share of the likeliest one
    #[arg(long, value_name = "X", allow_negative_numbers = true, default_value_t = 0.0)]
    pub min_p: f32,
    /// Factor against repeating tokens; 1 is none
    #[arg(long, value_name = "X", allow_negative_numbers = true, default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Seed of the choice
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// End the answer before this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Text for policies that need statistics of the model [default: the King James Bible, fetched once]
    #[arg(long, value_name = "FILE")]
    pub calibration_text: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Task {
    /// Perplexity of the last quarter of the text given the rest
    Ppl,
    /// Passkeys hidden in the text at several depths
    Needle,
}

/// Measure one plan on one task
#[derive(Args)]
pub struct EvalArgs {
    /// What to measure
    pub task: Task,
    /// Known name, GGUF file, or folder with config.json and *.safetensors
    #[arg(default_value = DEFAULT_MODEL)]
    pub model: String,
    #[command(flatten)]
    pub load: LoadArgs,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    /// Length in tokens
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub length: usize,
    /// Text to read, UTF-8 [default: the King James Bible, fetched once]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Passkeys, at most 20 (needle)
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = trials)]
    pub trials: usize,
    /// Seed of the passkeys (needle)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Machine-readable output
    #[arg(long)]
    pub json: bool,
}

/// A task that small models are trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TrainTask {
    /// Find one token of another kind among noise
    Needle,
    /// Multi-query associative recall (Zoology): answer each key with its value
    Mqar,
    /// Fashion-MNIST images as patches on a grid
    Fashion,
}

/// Train a small model of any attention layers on a task, and the same with a random choice of keys
///
/// Where other programs compute beside it, set CANDLE_NUM_THREADS=1 and RAYON_NUM_THREADS=1: the threads of candle's own
/// operations wait for one another by spinning, which takes the time that they wait for.
#[derive(Args)]
pub struct TrainArgs {
    /// Task
    pub task: TrainTask,
    /// Systems of the layers, first to last, such as moba:topk=4*2+flashattention-2; repeat the option to compare models
    #[arg(long, value_name = "LAYERS", default_value = "flashattention-2*2")]
    pub layers: Vec<String>,
    /// Train each model a second time with its choice of keys replaced by a random one of the same size
    #[arg(long)]
    pub random: bool,
    /// Steps
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub steps: usize,
    /// Examples a step
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub batch: usize,
    /// Channels
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub hidden: usize,
    /// Heads
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub heads: usize,
    /// Highest learning rate
    #[arg(long, value_name = "X", default_value_t = 2e-3)]
    pub lr: f64,
    /// Tokens a sequence (needle, mqar)
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub tokens: usize,
    /// Pairs to remember (mqar)
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub pairs: usize,
    /// Size of the vocabulary (needle, mqar)
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub vocab: usize,
    /// Side of a patch in pixels, a divisor of 28 (fashion)
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub patch: usize,
    /// Folder with the files of Fashion-MNIST [default: fetched once]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Never fetch anything; what is not in the cache folder is an error
    #[arg(long)]
    pub offline: bool,
    /// Seed of parameters and batches
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// File to resume from and to write to (one model only)
    #[arg(long, value_name = "FILE")]
    pub checkpoint: Option<PathBuf>,
    /// Machine-readable output, the loss of every step included
    #[arg(long)]
    pub json: bool,
}

/// Search a plan: which pattern each head should use
///
/// For minference: runs the model densely on a calibration text and gives each head the pattern
/// (vertical-slash, A-shape or block-sparse) whose output is nearest to exact attention at a fixed
/// cost, or leaves it dense where none comes near enough. The sizes are shares of the prompt, so that the plan serves other lengths too.
///
/// For moa-sparse: tries windows of alpha + beta·N keys on every head at --length and at half of it, and gives each head the one
/// with which the heads together err least while their mean cost keeps within the budget at both lengths.
#[derive(Args)]
pub struct PlanArgs {
    /// Known name, GGUF file, or folder with config.json and *.safetensors
    #[arg(default_value = DEFAULT_MODEL)]
    pub model: String,
    #[command(flatten)]
    pub load: LoadArgs,
    /// System to search for
    #[arg(long, value_name = "SYSTEM", default_value = "minference", value_parser = ["minference", "moa-sparse"])]
    pub system: String,
    /// Plan file to write [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Calibration length in tokens; near the length at which the plan will run is best
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub length: usize,
    /// Cost that each head (of moa-sparse their mean) may have, as a share of dense attention
    #[arg(long, value_name = "X", allow_negative_numbers = true, default_value_t = 0.3)]
    pub budget: f64,
    /// Largest relative error of the attention output; heads whose every pattern is worse stay dense (minference)
    #[arg(long, value_name = "X", allow_negative_numbers = true, default_value_t = 0.5)]
    pub max_error: f64,
    /// Calibration text, UTF-8 [default: the King James Bible, fetched once]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
}

/// Measure this machine
// Made once a process: boxing arguments would only clutter their use.
#[allow(clippy::large_enum_variant)]
#[derive(Subcommand)]
pub enum BenchCommand {
    Ops(BenchOpsArgs),
    Model(BenchModelArgs),
    Selectors(BenchSelectorsArgs),
}

/// Measure what every causal selector keeps of the attention mass, at what density and in what time
///
/// Each system runs at several budgets on the same queries and keys: random ones, and those of a real prompt, one
/// head from every so manyth layer of the model. Mass is the exact softmax weight of the visited keys on sampled
/// queries. Time is that of choosing and attending, in rounds that take turns with dense attention by the same
/// kernels.
#[derive(Args)]
pub struct BenchSelectorsArgs {
    /// Known name, GGUF file, or folder with config.json and *.safetensors
    #[arg(default_value = DEFAULT_MODEL)]
    pub model: String,
    #[command(flatten)]
    pub load: LoadArgs,
    /// Token counts
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "8192")]
    pub lengths: Vec<usize>,
    /// Query heads, each with keys of its own
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub heads: usize,
    /// Width of the random heads
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub head_dim: usize,
    /// What q and k to use: random, recorded
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "recorded")]
    pub source: Vec<Source>,
    /// Systems with parameters, separated by commas; a part name=value belongs to the system before it [default: every
    /// causal selector at several budgets]
    #[arg(long, value_name = "LIST", value_parser = specs)]
    pub systems: Vec<Specs>,
    /// Timed rounds; 0 measures mass and density alone
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub rounds: usize,
    /// Queries of each head on which mass is measured
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub rows: usize,
    /// Text to read, UTF-8 [default: the King James Bible, fetched once]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// File of recorded q and k: read if it is there, else written; of one length
    #[arg(long, value_name = "FILE")]
    pub recording: Option<PathBuf>,
    /// Also write the rows to a JSON file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw mass against density to an SVG file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// Where q and k come from
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Source {
    /// Standard normal numbers
    Random,
    /// A real prompt of the model
    Recorded,
}

/// Time a whole model: tokens a second of prompts and of decoding after long prompts
///
/// Goes round all prompts and depths once to warm up and then --repeats times, and prints the median,
/// the slowest and the fastest. A prompt counts from nothing to the logits of its last token with
/// the stores filled; a decode step to the logits of its token. Prompts are made-up tokens unless
/// --text is given.
///
/// With --serve it times on request instead, so that another program can take turns with it: each line
/// of standard input is {"prefill":{"tokens":N}} or {"decode":{"depth":N,"steps":N}}, each answer a
/// line of JSON with tokens, seconds, attention_seconds and tokens_per_second, or error.
#[derive(Args)]
pub struct BenchModelArgs {
    /// Known name, GGUF file, or folder with config.json and *.safetensors
    #[arg(default_value = DEFAULT_MODEL)]
    pub model: String,
    #[command(flatten)]
    pub load: LoadArgs,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    /// Prompt lengths in tokens
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "512,2048")]
    pub prompt: Vec<usize>,
    /// Tokens before the decode steps; 0 is an empty start
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,2048")]
    pub depth: Vec<usize>,
    /// Decode steps timed together
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub steps: usize,
    /// Timings of each prompt and depth
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub repeats: usize,
    /// Text to read, UTF-8 [default: made-up tokens]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Also write the rows, and what they were measured with, to a JSON file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Answer requests on standard input
    #[arg(long, conflicts_with_all = ["prompt", "depth", "steps", "repeats", "json"])]
    pub serve: bool,
}

/// Time every primitive over a sweep of shapes
///
/// Each row is the median and the fastest of repeated calls after one warm-up; rates come from the
/// work that the calls themselves count.
///
/// With --report the machine is measured first (arithmetic in registers, matrix products, reading memory,
/// exponentials), and a page shows each operation under the roof that the machine sets for it; linear layers and sparse
/// attention are then timed at one shape each.
#[derive(Args)]
pub struct BenchOpsArgs {
    /// Only operations whose name contains this
    #[arg(long, value_name = "TEXT")]
    pub filter: Option<String>,
    /// Token counts
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "512,2048")]
    pub tokens: Vec<usize>,
    /// Query heads
    #[arg(long, value_name = "N", default_value_t = 9)]
    pub heads: usize,
    /// Key/value heads
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub kv_heads: usize,
    /// Width of a head
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub head_dim: usize,
    /// Every instruction set of this machine instead of the one in force
    #[arg(long)]
    pub all_isas: bool,
    /// Repeat each call for about this many seconds
    #[arg(long, value_name = "X", allow_negative_numbers = true, default_value_t = 0.3)]
    pub seconds: f64,
    /// Seed of the operands
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// How to print
    #[arg(long, value_name = "FORMAT", default_value = "markdown")]
    pub format: Format,
    /// Measure the machine as well and write a page with the roofline picture
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Measure the machine as well and write ceilings and rows to a JSON file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Format {
    /// A table for people
    Markdown,
    /// Comma-separated values
    Csv,
    /// One JSON array
    Json,
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
/// Settled choices say what the sources left open or contradict, what was chosen here and why. With --simulate it counts,
/// for static patterns that are a product of one pattern an axis (generalized-neighborhood-attention and its kin), the tiles
/// of queries and keys that a kernel must visit; dense tiles over these is the speed-up that such a kernel can reach.
#[derive(Args)]
pub struct ShowArgs {
    /// Id of the system, as in `foveal list`; parameters after a colon count for --simulate
    pub id: String,
    /// Count the tiles that the pattern visits on a grid TxHxW, HxW or W, and the speed-up that they allow
    #[arg(long, value_name = "GRID")]
    pub simulate: Option<foveal::sparse::Grid>,
    /// Tile of queries to simulate, such as 8x8, beside that of our kernels
    #[arg(long, value_name = "SHAPE", requires = "simulate")]
    pub tile: Option<foveal::sparse::Grid>,
    /// Tile of keys to simulate [default: a single key, as in our kernels]
    #[arg(long, value_name = "SHAPE", requires = "tile")]
    pub kv_tile: Option<foveal::sparse::Grid>,
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
    /// Whether query i sees only keys up to Tk - Tq + i; `foveal show` tells what a system knows
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub causal: bool,
    /// Token grid among the keys as TxHxW, HxW or W, and @N if it starts at token N, for systems that need one
    #[arg(long, value_name = "GRID")]
    pub grid: Option<foveal::sparse::Grid>,
    /// Factor on q·k [default: 1/√D]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub scale: Option<f32>,
}

/// Draw one head under a prefill system as SVG: its exact map, what is visited, what is missed
#[derive(Args)]
pub struct PictureArgs {
    /// System with slot prefill: an id, or an id with parameters (id:name=value,…)
    #[arg(value_parser = spec)]
    pub id: Spec,
    /// Known name, GGUF file, or folder with config.json and *.safetensors
    #[arg(default_value = DEFAULT_MODEL)]
    pub model: String,
    #[command(flatten)]
    pub load: LoadArgs,
    /// SVG file to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Layer
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub layer: usize,
    /// Query head
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub head: usize,
    /// Prompt length in tokens
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub length: usize,
    /// Text to read, UTF-8 [default: the King James Bible, fetched once]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Instead of a model's head a made one on a token grid (TxHxW, HxW or W), without a direction
    #[arg(long, value_name = "GRID")]
    pub grid: Option<foveal::sparse::Grid>,
    /// Seed of the made head
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Machine-readable output
    #[arg(long)]
    pub json: bool,
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

fn weights(s: &str) -> Result<Weights, String> {
    if s == "auto" {
        return Ok(Weights(None));
    }
    foveal_llm::model::parse_weights(s).map(|f| Weights(Some(f))).map_err(|e| format!("{e}, or auto"))
}

fn kv_dtype(s: &str) -> Result<KvDtype, String> {
    s.parse()
}

fn spec(s: &str) -> Result<Spec, String> {
    s.parse::<Spec>().map_err(|e| e.to_string())
}

fn trials(s: &str) -> Result<usize, String> {
    match s.parse::<usize>() {
        Ok(n) if n <= 20 => Ok(n),
        _ => Err("give a number from 0 to 20".into()),
    }
}

/// Systems of one list.
#[derive(Clone, Debug, PartialEq)]
pub struct Specs(pub Vec<Spec>);

/// `a,b:x=1,y=2,c` is a, b with two parameters, and c: a part with `=` before any `:` continues the
/// system before it.
fn specs(s: &str) -> Result<Specs, String> {
    let mut texts: Vec<String> = Vec::new();
    for part in s.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let head = part.split(':').next().unwrap_or(part);
        match texts.last_mut() {
            Some(last) if head.contains('=') => {
                last.push(if last.contains(':') { ',' } else { ':' });
                last.push_str(part);
            }
            _ => texts.push(part.into()),
        }
    }
    if texts.is_empty() {
        return Err("give at least one system; `foveal list --state done` shows them".into());
    }
    texts.iter().map(|t| spec(t)).collect::<Result<_, _>>().map(Specs)
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
    fn lists_of_systems() {
        let names = |s: &str| specs(s).unwrap().0.iter().map(Spec::to_string).collect::<Vec<_>>();
        assert_eq!(names("a,b:x=1,y=2,c"), ["a", "b:x=1,y=2", "c"]);
        assert_eq!(names("a:x=1, a:x=2 ,"), ["a:x=1", "a:x=2"]);
        assert_eq!(names("a,x=1"), ["a:x=1"]);
        assert!(specs(" , ").is_err());
        assert!(specs("a:x").unwrap_err().contains("name=value"));
    }

    #[test]
    fn families_by_letter_or_word() {
        assert_eq!(family("b").unwrap(), Family::Sparse);
        assert_eq!(family("sparse").unwrap(), Family::Sparse);
        assert_eq!(family("vision").unwrap(), Family::Vision);
        assert!(family("zz").unwrap_err().contains("B sparse patterns"));
    }
}
