//! The engine's promises beside its numbers: sessions fork, probes judge, prompts stop, bad input
//! is refused with a reason. On the tiny GGUF golden.

use foveal::Spec;
use foveal::prim::kv::KvDtype;
use foveal_llm::{Checkpoint, LoadOptions, LogitsFor, Model, Plan, PrefillOptions, WeightFormat};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

fn model() -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/llm/gguf_llama.gguf");
    Model::load(&Checkpoint::open(&path).unwrap(), &LoadOptions { weights: Some(WeightFormat::F32) }).unwrap()
}

fn plan(kv: KvDtype) -> Plan {
    let dense = Spec::new("flashattention-2");
    Plan::of(&dense, &dense, kv)
}

fn ids(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 37 + 11) % 96).collect()
}

fn captured() -> PrefillOptions {
    PrefillOptions { capture: true, ..Default::default() }
}

#[test]
fn forks_go_their_own_way() {
    let m = model();
    let (mut a, _) = m.start(&ids(20), &plan(KvDtype::F32), None, &PrefillOptions::default()).unwrap();
    let mut b = a.fork();
    b.extend(&[5, 6, 7]).unwrap();
    let c = a.fork().extend(&[9]).unwrap().hidden;
    assert_eq!((a.len(), b.len()), (20, 23));
    assert_eq!(a.extend(&[9]).unwrap().hidden, c);
    assert!(b.resident().total() > a.resident().total());
}

#[test]
fn resident_bytes_are_those_of_the_storage_type() {
    let m = model();
    let c = m.config();
    let prompt = m.prefill(&ids(33), &plan(KvDtype::F32), &captured()).unwrap();
    for (kv, bytes) in [(KvDtype::F32, 4), (KvDtype::Bf16, 2)] {
        let s = m.session(&prompt, &plan(kv), None).unwrap();
        assert_eq!(s.resident().total(), 2 * 33 * c.num_layers * c.num_kv_heads * c.head_dim * bytes);
    }
}

#[test]
fn probes_see_rounding_and_nothing_else() {
    let m = model();
    let o = PrefillOptions { probe_rows: 5, ..captured() };
    let prompt = m.prefill(&ids(40), &plan(KvDtype::F32), &o).unwrap();
    assert_eq!(prompt.probe.len(), m.config().num_layers);
    assert!(prompt.probe.iter().all(|&e| e < 1e-5), "{:?}", prompt.probe);
    let probe = |kv| {
        let mut s = m.session(&prompt, &plan(kv), None).unwrap();
        s.probe_next(&prompt).unwrap();
        let e = s.extend(&[1, 2, 3]).unwrap().probe;
        assert!(s.extend(&[4]).unwrap().probe.is_empty() && s.probe_next(&prompt).is_err());
        e
    };
    assert!(probe(KvDtype::F32).iter().all(|&e| e < 1e-5));
    let rough = probe(KvDtype::Int8);
    assert!(rough.iter().all(|&e| e > 1e-5 && e < 0.05), "{rough:?}");
}

#[test]
fn nll_is_the_softmax_of_the_logits() {
    let m = model();
    let t = ids(70);
    let o = PrefillOptions { logits: LogitsFor::LastN(70), ..Default::default() };
    let p = m.prefill(&t, &plan(KvDtype::F32), &o).unwrap();
    let nll = m.nll(&p.hidden, &t[1..]);
    assert_eq!(nll.len(), 69);
    let logits = m.logits(&p.hidden);
    for (i, n) in nll.iter().enumerate() {
        let row = &logits[i * 96..(i + 1) * 96];
        let z: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        assert!((n - (z.ln() - f64::from(row[t[i + 1] as usize]))).abs() < 1e-5);
    }
    assert_eq!(m.nll(&p.hidden, &[96]), [f64::INFINITY]);
    // The last rows alone are the same rows.
    let last = m.prefill(&t, &plan(KvDtype::F32), &PrefillOptions::default()).unwrap();
    assert_eq!(last.hidden, p.hidden[69 * 32..]);
}

#[test]
fn calibration_is_the_sum_of_outer_products() {
    let m = model();
    let d = m.config().head_dim;
    let o = PrefillOptions { capture_pre: true, ..captured() };
    let p = m.prefill(&ids(30), &plan(KvDtype::F32), &o).unwrap();
    let c = m.calibrate(&ids(30), true).unwrap();
    assert_eq!(c.layers.len(), m.config().num_layers);
    for (l, kv) in c.layers.iter().zip(p.kv.iter()) {
        assert_eq!((l.tokens, l.input_moment.len()), (30, 32 * 32));
        for (moment, rows) in [(&l.key_moment[0], &kv.k), (&l.key_pre_moment[0], &kv.k_pre)] {
            let sum: f64 = rows.chunks(d).map(|r| f64::from(r[1]) * f64::from(r[3])).sum();
            assert!((moment[d + 3] - sum).abs() < 1e-6 * (1.0 + sum.abs()));
        }
        // Rows of a normalised input have a mean square near the gain's.
        let trace: f64 = (0..32).map(|i| l.input_moment[i * 33]).sum();
        assert!(trace > 0.25 * 30.0 * 32.0 && trace < 2.0 * 30.0 * 32.0, "{trace}");
    }
    assert!(m.calibrate(&ids(30), false).unwrap().layers[0].input_moment.is_empty());
}

#[test]
fn stops_on_request_and_tells_progress() {
    let m = model();
    let cancel = Arc::new(AtomicBool::new(false));
    let seen = Arc::new(AtomicUsize::new(0));
    let (c, s) = (cancel.clone(), seen.clone());
    let o = PrefillOptions {
        chunk: 8,
        cancel: Some(cancel),
        progress: Some(Arc::new(move |done, total| {
            assert!(done <= total && total == 2 * 4);
            s.fetch_add(1, Ordering::Relaxed);
            c.store(done == 3, Ordering::Relaxed);
        })),
        ..Default::default()
    };
    let e = m.prefill(&ids(30), &Plan::dense(), &o).unwrap_err().to_string();
    assert!(e.contains("stopped"), "{e}");
    assert_eq!(seen.load(Ordering::Relaxed), 3);
}

#[test]
fn records_what_a_head_saw() {
    let m = model();
    let o = PrefillOptions { record: vec![(1, 1)], chunk: 20, ..Default::default() };
    let p = m.prefill(&ids(30), &Plan::dense(), &o).unwrap();
    let r = &p.recorded[0];
    assert_eq!((r.layer, r.head, r.tq, r.tk, r.d, r.selection.is_none()), (1, 1, 10, 30, 16, true));
    assert_eq!((r.q.len(), r.k.len()), (160, 480));
}

#[test]
fn refuses_with_a_reason() {
    let m = model();
    let o = PrefillOptions::default();
    let says = |r: Result<(), foveal_llm::LlmError>, words: &str| {
        let e = r.unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    };
    says(m.prefill(&[], &Plan::dense(), &o).map(drop), "prompt is empty");
    says(m.prefill(&[1, 96], &Plan::dense(), &o).map(drop), "token id 96");
    let record = PrefillOptions { record: vec![(2, 0)], ..o.clone() };
    says(m.prefill(&[1], &Plan::dense(), &record).map(drop), "2 layers of 2 heads");
    let p = m.prefill(&[1, 2], &Plan::dense(), &o).unwrap();
    says(m.session(&p, &Plan::dense(), None).map(drop), "run prefill with capture");
    let (mut s, _) = m.start(&[1, 2], &Plan::dense(), None, &o).unwrap();
    says(s.extend(&[]).map(drop), "at least one");
    says(s.extend(&[1000]).map(drop), "token id 1000");
    assert_eq!(s.extend(&[3]).map(|e| e.hidden.len()).unwrap(), 32);
    let loki = Plan::of(&Spec::new("flashattention-2"), &Spec::new("loki"), KvDtype::F32);
    says(m.start(&[1, 2], &loki, None, &o).map(drop), "calibrat");
}
