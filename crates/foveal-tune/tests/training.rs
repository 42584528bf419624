//! Training goes on exactly where it stopped, learns what it should, and refuses what it cannot do.

use foveal_tune::tasks::Task;
use foveal_tune::tasks::mqar::Mqar;
use foveal_tune::tasks::needle::Needle;
use foveal_tune::trainer::{Hooks, TrainConfig, train};
use foveal_tune::{Report, TuneError};
use std::sync::atomic::{AtomicBool, Ordering};

fn config(task: &dyn Task, layer: &str, steps: usize) -> TrainConfig {
    let base = TrainConfig::for_task(task, vec![layer.into(); 2], 32, 2);
    TrainConfig { steps, batch: 16, eval_every: steps, eval_batches: 4, ..base }
}

fn run(task: &dyn Task, config: &TrainConfig) -> Report {
    train(task, config, Hooks::default()).unwrap_or_else(|e| panic!("{e}")).2
}

#[test]
fn a_killed_run_resumes_to_the_same_losses() {
    let task = Mqar::new(32, 4, 24, 0.1).unwrap();
    let config = config(&task, "flashattention-2", 12);
    let whole = run(&task, &config);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.safetensors");
    let cancel = AtomicBool::new(false);
    let mut stop = |s: &foveal_tune::trainer::Step| cancel.store(s.step == 5, Ordering::Relaxed);
    let hooks = Hooks { on_step: Some(&mut stop), cancel: Some(&cancel), checkpoint: Some(path.clone()) };
    match train(&task, &config, hooks) {
        Err(TuneError::Cancelled { step: 5 }) => {}
        Err(e) => panic!("{e}"),
        Ok(_) => panic!("was not stopped"),
    }
    let (_, _, resumed) = train(&task, &config, Hooks { checkpoint: Some(path.clone()), ..Hooks::default() }).unwrap();
    assert_eq!(resumed.losses, whole.losses);
    assert_eq!(resumed.last.accuracy, whole.last.accuracy);
    // Another run's checkpoint is refused by name.
    let other = TrainConfig { lr: 1e-4, ..config };
    let e = train(&task, &other, Hooks { checkpoint: Some(path), ..Hooks::default() }).err().unwrap().to_string();
    assert!(e.contains("run.safetensors") && e.contains("other settings"), "{e}");
}

#[test]
fn attention_finds_the_needle_and_a_random_choice_of_a_few_keys_does_not() {
    let task = Needle::new(64, 16).unwrap();
    let dense = config(&task, "flashattention-2", 300);
    let found = run(&task, &dense);
    assert!(found.best_accuracy > 0.9, "attention: {}", found.best_accuracy);
    assert_eq!(found.density, 1.0);
    let mut random = config(&task, "moba:block_size=4,topk=3,block_q=1", 300);
    random.net.random = true;
    let lost = run(&task, &random);
    assert!(lost.best_accuracy < 0.6, "random choice: {}", lost.best_accuracy);
    assert!(lost.density < 0.4, "density {}", lost.density);
}

#[test]
fn settings_that_cannot_be_are_refused_by_name() {
    let task = Needle::new(16, 8).unwrap();
    let good = config(&task, "flashattention-2", 1);
    let fail = |c: &TrainConfig| train(&task, c, Hooks::default()).err().expect("a refusal").to_string();
    let mut c = good.clone();
    c.net.heads = 3;
    assert!(fail(&c).contains("heads = 3"));
    let mut c = good.clone();
    c.net.layers = vec!["no-such-system".into()];
    assert!(fail(&c).contains("no-such-system"));
    let mut c = good.clone();
    c.net.layers = vec!["think".into()];
    assert!(fail(&c).contains("think"));
    assert!(fail(&TrainConfig { steps: 0, ..good }).contains("steps"));
}
