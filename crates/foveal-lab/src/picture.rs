//! One head under one system as a picture: its exact map, what the system visits, and what it misses.

use crate::maps::{self, Head};
use crate::report::png;
use crate::results::Map;
use candle_core::{Device, Tensor};
use foveal::System;
use foveal::mixer::{self, MixInput, MixerDims, Weights};
use foveal::sparse::{Grid, HeadProblem, HeadSelection, Mat, mask};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A picture.
pub struct Picture {
    maps: [Map; 3],
    /// Share of the visible pairs that are visited.
    pub density: f64,
    /// Share of the exact weights that lie on them, over the queries looked at (every n-th of a long prompt).
    pub recall: f64,
}

/// Where a head stands.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Its layer.
    pub layer: usize,
    /// Its number.
    pub head: usize,
    /// The token grid, if there is one.
    pub grid: Option<Grid>,
}

/// What a prefill system makes of a head; `id` names it in errors.
///
/// Errors: a head outside of the system's domain; a system that reports no choice of keys.
pub fn of_system(id: &str, system: System, head: &Head, at: Place) -> foveal::Result<Picture> {
    system.domain().check(id, head.causal, at.grid, head.tk)?;
    let none = || foveal::Error::Param {
        system: id.into(),
        message: "it reports no choice of keys, so there is nothing to draw; name a system that chooses".into(),
    };
    match system {
        System::Selector(s) => {
            let (q, k) = (Mat::new(head.q, head.tq, head.d, head.d), Mat::new(head.k, head.tk, head.d, head.d));
            let new = HeadProblem::new(q, k, head.scale);
            let problem = HeadProblem { layer: at.layer, head: at.head, causal: head.causal, grid: at.grid, ..new };
            Ok(of(head, &s.select(&problem)?.0))
        }
        System::Mixer(_) => {
            let t = |x: &[f32], n| Tensor::from_slice(x, (1, 1, n, head.d), &Device::Cpu);
            let (q, k) = (t(head.q, head.tq)?, t(head.k, head.tk)?);
            let dims = MixerDims { grid: at.grid, layer: at.layer, ..MixerDims::new(1, head.d, head.causal) };
            let layer = mixer::layer(id, system, &dims, Weights::none().builder())?;
            // Which keys are chosen does not hang on the values.
            let m = layer.mix(&MixInput { scale: Some(head.scale), ..MixInput::new(&q, &k, &k) })?;
            Ok(of(head, m.selections.first().ok_or_else(none)?))
        }
        _ => Err(none()),
    }
}

/// The picture of a selection.
pub fn of(head: &Head, s: &HeadSelection) -> Picture {
    let (missed, recall) = maps::missed(1, head, s);
    let density = mask::density(s, head.tq, head.tk, head.causal);
    Picture {
        maps: [maps::exact(0, head), maps::selection(1, s, head.tq, head.tk, head.causal), missed],
        density,
        recall,
    }
}

/// Side of a map in the picture.
const SIDE: usize = 300;

impl Picture {
    /// As an SVG file with a title line.
    pub fn svg(&self, title: &str) -> String {
        let esc = crate::report::escape;
        let width = 3 * SIDE + 4 * 16;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{}\" font-family=\"sans-serif\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"16\" y=\"26\" font-size=\"16\">{}</text>\n\
             <text x=\"16\" y=\"46\" font-size=\"13\" fill=\"#555\">{:.1}% of the pairs visited, {:.1}% of the \
             attention kept; queries from top to bottom, keys from left to right</text>\n",
            SIDE + 100,
            esc(title),
            100.0 * self.density,
            100.0 * self.recall,
        );
        for (i, m) in self.maps.iter().enumerate() {
            let x = 16 + i * (SIDE + 16);
            out += &format!(
                "<image x=\"{x}\" y=\"60\" width=\"{SIDE}\" height=\"{SIDE}\" preserveAspectRatio=\"none\" \
                 style=\"image-rendering:pixelated\" href=\"{}\"/>\n<text x=\"{x}\" y=\"{}\" font-size=\"13\">{}</text>\n",
                png::data_uri(m),
                SIDE + 80,
                esc(&m.caption),
            );
        }
        out + "</svg>\n"
    }
}

/// q and k of a made grid, (tokens, `d`) each: similarity falls with distance in frames, rows and columns (random Fourier
/// features), a third of each row is noise. For systems that need a grid when no model is at hand.
pub fn made(grid: Grid, d: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut normal = move || {
        let (u, v): (f32, f32) = (rng.random_range(1e-7..1.0), rng.random());
        (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
    };
    let waves: Vec<[f32; 4]> =
        (0..d).map(|_| [normal() / 2.0, normal() / 3.0, normal() / 3.0, 3.0 * normal()]).collect();
    // A logit of about 8 between equal places at the default scale.
    let loud = (8.0 * (d as f32).sqrt() * 2.0 / d as f32).sqrt();
    let mut rows = || -> Vec<f32> {
        let mut out = Vec::with_capacity(grid.tokens() * d);
        for i in 0..grid.tokens() {
            let [t, y, x] = grid.place(grid.first + i).unwrap_or_default().map(|x| x as f32);
            out.extend(waves.iter().map(|w| loud * ((w[0] * t + w[1] * y + w[2] * x + w[3]).cos() + 0.33 * normal())));
        }
        out
    };
    (rows(), rows())
}

#[cfg(test)]
mod tests {
    use super::*;
    use foveal_kernels::HeadTable;

    #[test]
    fn a_picture_tells_what_is_kept() {
        let grid = Grid::new(1, 8, 8);
        let (q, k) = made(grid, 16, 1);
        let head = Head { q: &q, k: &k, tq: 64, tk: 64, d: 16, scale: 0.25, causal: false };
        let near = HeadTable::from_lists(16, 16, (0..4).map(|i| vec![i]).collect());
        let p = of(&head, &HeadSelection::of_blocks(near));
        assert!((p.density - 0.25).abs() < 1e-9);
        assert!(p.recall > 0.4, "nearby places hold more than their share: {}", p.recall);
        let svg = p.svg("a < b");
        assert!(svg.contains("a &lt; b") && svg.matches("<image").count() == 3 && svg.contains("25.0% of the pairs"));
    }
}
