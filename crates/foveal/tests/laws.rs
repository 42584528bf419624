//! Every law of every registered system; failures must be in the waiver ledger, and nothing in the
//! ledger may hold.

use foveal::laws::{Outcome, check};
use foveal::registry;
use std::path::Path;

fn waivers() -> Vec<[String; 3]> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/waivers.md");
    let text = std::fs::read_to_string(&path).expect("docs/waivers.md is part of the repository");
    let rows = text.lines().filter(|l| l.starts_with('|')).skip(2);
    rows.map(|l| {
        let cells: Vec<&str> = l.trim_matches('|').split('|').map(str::trim).collect();
        assert_eq!(cells.len(), 5, "a waiver row has five cells: {l}");
        assert!(!cells[3].is_empty(), "a waiver names an issue: {l}");
        [cells[0].into(), cells[1].into(), cells[2].into()]
    })
    .collect()
}

fn key(o: &Outcome) -> [String; 3] {
    [o.system.into(), o.slot.to_string(), o.law.clone()]
}

#[test]
fn every_registered_system_keeps_its_laws() {
    let waived = waivers();
    let mut complaints = Vec::new();
    let mut seen = Vec::new();
    for card in registry::cards() {
        let outcomes = check(card);
        assert!(outcomes.len() >= 3, "{} has too few laws to be called tested", card.id);
        assert!(!card.laws.is_empty(), "{} declares no law that could fail", card.id);
        for o in outcomes {
            match (&o.failure, waived.contains(&key(&o))) {
                (Some(e), false) => complaints.push(format!("{} ({}) breaks {}: {e}", o.system, o.slot, o.law)),
                (None, true) => complaints.push(format!("{} ({}) keeps {}: drop its waiver", o.system, o.slot, o.law)),
                _ => {}
            }
            seen.push(key(&o));
        }
    }
    for w in &waived {
        if !seen.contains(w) {
            complaints.push(format!("waiver {w:?} names no law of a registered system"));
        }
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn ids_are_unique_and_catalogued() {
    let all = registry::catalogue();
    assert_eq!(all.len(), 301, "the catalogue has 301 systems");
    for (i, c) in registry::cards().iter().enumerate() {
        assert!(all.iter().any(|e| e.id == c.id && e.family == c.family), "{} is not in the catalogue as such", c.id);
        assert!(!registry::cards()[..i].iter().any(|d| d.id == c.id), "{} is registered twice", c.id);
    }
}
