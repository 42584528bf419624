//! Progress on standard error: a bar on a terminal, a line now and then elsewhere, nothing under `--quiet`.

use crate::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Between two lines where there is no terminal.
const LINES_APART: Duration = Duration::from_secs(10);
/// Parts of the bar: fine enough that a step of any length moves it.
const PARTS: u64 = 1000;

/// How far one piece of work is.
pub struct Progress {
    bar: Option<ProgressBar>,
    /// When the last line was written; `None` = lines are not wanted.
    lines: Option<Mutex<Instant>>,
}

impl Progress {
    /// A bar of its own, starting at nothing.
    pub fn new(ctx: &Context) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = (terminal && !ctx.quiet).then(|| {
            let bar = ProgressBar::with_draw_target(Some(PARTS), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3}% {elapsed:>4} {wide_msg}") {
                bar.set_style(style);
            }
            bar
        });
        let lines = (!terminal && !ctx.quiet).then(|| Mutex::new(Instant::now()));
        Self { bar, lines }
    }

    /// `fraction` of the work (0 to 1) is done and `what` runs now.
    pub fn at(&self, fraction: f64, what: &str) {
        let fraction = fraction.clamp(0.0, 1.0);
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_string());
            bar.set_position((fraction * PARTS as f64) as u64);
        }
        if let Some(last) = &self.lines
            && let Ok(mut last) = last.lock()
            && last.elapsed() >= LINES_APART
        {
            *last = Instant::now();
            eprintln!("{:3.0}% {what}", fraction * 100.0);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
