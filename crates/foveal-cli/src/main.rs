//! The `foveal` command: compare, plan, run and measure efficient attention on real models.

mod cli;
mod commands;
mod error;
mod files;
mod machine;
mod models;
mod progress;
mod run_facts;
mod table;

use clap::Parser;
use cli::{BenchCommand, Cli, Command, TuneCommand};
use error::{CliError, Result};
use foveal_kernels::Isa;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Exit code after Ctrl-C: 128 + SIGINT, as shells report it.
const INTERRUPTED: u8 = 130;

/// What every command is given.
pub struct Context {
    /// No progress, no remarks.
    pub quiet: bool,
    /// Threads of the pool.
    pub threads: usize,
    /// Set by Ctrl-C; long work looks at it and stops at the next safe point.
    pub cancel: Arc<AtomicBool>,
}

impl Context {
    /// A remark for people, on standard error.
    pub fn remark(&self, text: &str) {
        if !self.quiet {
            eprintln!("{text}");
        }
    }

    /// Whether Ctrl-C was pressed.
    pub fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr();
    let cancel = Arc::new(AtomicBool::new(false));
    let result = start(&cli, &cancel).and_then(|ctx| {
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        run(&cli.command, &ctx, &mut out)?;
        Ok(out.flush()?)
    });
    match result {
        _ if cancel.load(Ordering::Relaxed) => {
            eprintln!("error: interrupted; no file was left half-written");
            ExitCode::from(INTERRUPTED)
        }
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.is_broken_pipe() => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", e.one_line());
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command, ctx: &Context, out: &mut dyn Write) -> Result {
    match command {
        Command::Pull(a) => commands::pull::run(a, ctx, out),
        Command::Compare(a) => commands::compare::run(a, ctx, out),
        Command::Run(a) => commands::run::run(a, ctx, out),
        Command::Eval(a) => commands::eval::run(a, ctx, out),
        Command::Train(a) => commands::train::run(a, ctx, out),
        Command::Plan(a) => commands::plan::run(a, ctx, out),
        Command::Bench(BenchCommand::Ops(a)) => commands::bench::ops(a, ctx, out),
        Command::Bench(BenchCommand::Model(a)) => commands::bench::model(a, ctx, out),
        Command::Bench(BenchCommand::Selectors(a)) => commands::bench::selectors(a, ctx, out),
        Command::Tune(TuneCommand::Gates(a)) => commands::tune::gates(a, ctx, out),
        Command::List(a) => commands::list::run(a, out),
        Command::Show(a) => commands::show::run(a, out),
        Command::Doctor(a) => commands::doctor::run(a, ctx, out),
        Command::Picture(a) => commands::picture::run(a, ctx, out),
        Command::Apply(a) => commands::apply::run(a, ctx, out),
        Command::Docs(a) => commands::docs::run(a, out),
    }
}

/// Threads, instruction set and Ctrl-C, before any work.
fn start(cli: &Cli, cancel: &Arc<AtomicBool>) -> Result<Context> {
    if let Some(isa) = cli.global.isa {
        Isa::set_active(isa).map_err(CliError::Arguments)?;
    }
    let threads = cli.global.threads.unwrap_or_else(machine::physical_cores);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|e| CliError::Arguments(format!("cannot start {threads} threads: {e}; lower --threads")))?;
    let flag = cancel.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            // Asked twice: stop here. Files are written under temporary names, so none is half done.
            std::process::exit(i32::from(INTERRUPTED));
        }
        // On a thread of its own: whoever holds standard error (a full pipe, a stopped pager) must not
        // keep this handler from hearing the second Ctrl-C. Without a thread there is no message.
        let tell = || eprintln!("\nstopping at the next safe point; Ctrl-C again stops at once");
        let _ = std::thread::Builder::new().spawn(tell);
    })
    .map_err(|e| CliError::Arguments(format!("cannot listen for Ctrl-C: {e}")))?;
    Ok(Context { quiet: cli.global.quiet, threads, cancel: cancel.clone() })
}

/// `FOVEAL_LOG` = error, warn, info, debug or trace; warnings by default.
fn log_to_stderr() {
    let level = std::env::var("FOVEAL_LOG").ok().and_then(|s| s.parse().ok()).unwrap_or(tracing::Level::WARN);
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false).init();
}
