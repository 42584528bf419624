//! `foveal docs`: documentation that is generated, so that it cannot say other than the code.

use super::list::{slots_of, state_text};
use super::show::{paper, value_text};
use crate::cli::{Cli, DocsArgs};
use crate::error::{CliError, Result};
use crate::files;
use clap::CommandFactory;
use foveal::registry::{self, State};
use foveal::{Card, Family};
use std::fmt::Write as _;
use std::io::Write;

pub fn run(a: &DocsArgs, out: &mut dyn Write) -> Result {
    for (name, text) in [("systems.md", systems()), ("cli.md", commands())] {
        let path = a.dir.join(name);
        if !a.check {
            files::write_whole(&path, text.as_bytes())?;
            writeln!(out, "wrote {}", path.display())?;
            continue;
        }
        let there = std::fs::read_to_string(&path).map_err(|e| CliError::file(&path, "read", e))?;
        if let Some((i, (old, new))) = there.lines().zip(text.lines()).enumerate().find(|(_, (a, b))| a != b) {
            return Err(CliError::BadFile {
                path,
                problem: format!(
                    "out of date at line {}: holds {old:?}, should hold {new:?}; run `foveal docs` and commit",
                    i + 1
                ),
            });
        }
        if there != text {
            return Err(CliError::BadFile {
                path,
                problem: "out of date in length or line ends; run `foveal docs` and commit".into(),
            });
        }
    }
    Ok(())
}

/// Every subcommand's long help.
fn commands() -> String {
    let mut s = String::from(
        "# Command reference\n\nGenerated from the command line's own definition by `foveal docs`; do not edit.\n",
    );
    let mut root = Cli::command().term_width(100);
    root.build();
    write_help(&mut s, &mut root, "foveal");
    let names: Vec<String> =
        root.get_subcommands().filter(|c| !c.is_hide_set()).map(|c| c.get_name().to_string()).collect();
    for name in names.iter().filter(|n| *n != "help") {
        if let Some(c) = root.find_subcommand_mut(name) {
            write_command(&mut s, c, &format!("foveal {name}"));
        }
    }
    s
}

fn write_command(s: &mut String, c: &mut clap::Command, path: &str) {
    write_help(s, c, path);
    let names: Vec<String> = c.get_subcommands().map(|c| c.get_name().to_string()).collect();
    for name in names.iter().filter(|n| *n != "help") {
        if let Some(sub) = c.find_subcommand_mut(name) {
            write_command(s, sub, &format!("{path} {name}"));
        }
    }
}

fn write_help(s: &mut String, c: &mut clap::Command, path: &str) {
    let help = c.render_long_help().to_string();
    let help: Vec<&str> = help.lines().map(str::trim_end).collect();
    let _ = write!(s, "\n## {path}\n\n```text\n{}\n```\n", help.join("\n").trim_end());
}

/// Every built system in full, then the whole catalogue.
fn systems() -> String {
    let all = registry::catalogue();
    let count = |state| all.iter().filter(|e| e.state == state).count();
    let mut s =
        String::from("# Systems\n\nGenerated from the cards and the catalogue by `foveal docs`; do not edit.\n");
    let _ = writeln!(
        s,
        "\n{} systems are catalogued: {} done, {} not yet, {} with nothing to build.\n\n## Built\n",
        all.len(),
        count(State::Done),
        count(State::NotYet),
        count(State::NothingToBuild)
    );
    let mut cards: Vec<&Card> = registry::cards().to_vec();
    cards.sort_by_key(|c| (c.family, c.id));
    s.push_str("| id | family | slots | paper | cost |\n| --- | --- | --- | --- | --- |\n");
    for c in &cards {
        let cells = [
            format!("[`{}`](#{})", c.id, c.id),
            c.family.letter().to_string(),
            c.slot_names(),
            paper(c),
            c.cost.to_string(),
        ];
        row(&mut s, &cells);
    }
    for c in &cards {
        card(&mut s, c);
    }
    s.push_str("\n## Catalogue\n");
    for family in ('A'..='P').filter_map(Family::from_letter) {
        let entries: Vec<_> = all.iter().filter(|e| e.family == family).collect();
        if entries.is_empty() {
            continue;
        }
        let _ = write!(
            s,
            "\n### {}: {}\n\n| id | title | slots | state |\n| --- | --- | --- | --- |\n",
            family.letter(),
            family.title()
        );
        for e in entries {
            let state = match e.reason {
                Some(why) => format!("{}: {why}", state_text(e.state)),
                None => state_text(e.state).into(),
            };
            let slots: Vec<String> = slots_of(e.id).iter().map(ToString::to_string).collect();
            row(&mut s, &[format!("`{}`", e.id), e.title.into(), slots.join(", "), state]);
        }
    }
    s
}

fn card(s: &mut String, c: &Card) {
    let _ = write!(s, "\n### {}\n\n{}. {}. Slots: {}.\n\n```text\n", c.id, c.title, paper(c), c.slot_names());
    for line in c.equation.lines() {
        let _ = writeln!(s, "{}", line.trim());
    }
    let _ = write!(s, "```\n\nCost: {}.\n", c.cost.trim_end_matches('.'));
    let params = (c.params)();
    if !params.is_empty() {
        s.push_str("\n| parameter | default | meaning |\n| --- | --- | --- |\n");
        for p in params {
            row(s, &[format!("`{}`", p.name), format!("`{}`", value_text(&p.default)), p.doc.into()]);
        }
    }
    s.push_str("\nLaws:\n\n");
    for l in c.laws {
        let _ = writeln!(s, "- {l}");
    }
    if !c.choices.is_empty() {
        s.push_str("\nSettled choices:\n\n");
        for choice in c.choices {
            let _ = writeln!(s, "- {choice}");
        }
    }
}

/// One table row; a bar inside a cell would end it.
fn row(s: &mut String, cells: &[String]) {
    let cells: Vec<String> = cells.iter().map(|c| c.replace('|', "\\|").replace('\n', " ")).collect();
    let _ = writeln!(s, "| {} |", cells.join(" | "));
}
