//! Rotary position embedding with given frequencies.

/// Rotation of head pairs (c, c + rotary_dim/2) by angle `position · inv_freq[c]`.
///
/// Which frequencies (default, linear, dynamic, YaRN, Llama 3) is the model's business; a cache
/// that stores keys before rotation (Palu) re-applies the same rotation on read.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// One frequency per rotated pair.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin (YaRN's attention factor), 1 otherwise.
    pub factor: f32,
}

impl Rope {
    /// The original frequencies base^(−2c/dim).
    pub fn new(rotary_dim: usize, base: f64) -> Self {
        let inv_freq = (0..rotary_dim / 2).map(|c| base.powf(-2.0 * c as f64 / rotary_dim as f64) as f32).collect();
        Self { inv_freq, factor: 1.0 }
    }

    /// No rotation at all.
    pub fn none() -> Self {
        Self { inv_freq: Vec::new(), factor: 1.0 }
    }

    /// cos and sin for positions `pos..pos + n`, each (n, pairs) row-major.
    pub fn tables(&self, pos: usize, n: usize) -> (Vec<f32>, Vec<f32>) {
        let mut cos = Vec::with_capacity(n * self.inv_freq.len());
        let mut sin = Vec::with_capacity(n * self.inv_freq.len());
        for p in pos..pos + n {
            for f in &self.inv_freq {
                // The angle in f32 as the reference implementations have it, the functions in f64.
                let a = f64::from(p as f32 * f);
                cos.push(a.cos() as f32 * self.factor);
                sin.push(a.sin() as f32 * self.factor);
            }
        }
        (cos, sin)
    }

    /// Rotate one head row in place with its row of the tables.
    #[inline]
    pub fn rotate_row(row: &mut [f32], cos: &[f32], sin: &[f32]) {
        let half = cos.len();
        let (a, b) = row[..2 * half].split_at_mut(half);
        for c in 0..half {
            let (x, y) = (a[c], b[c]);
            a[c] = x * cos[c] - y * sin[c];
            b[c] = y * cos[c] + x * sin[c];
        }
    }

    /// Rotate rows (n, width) in place; row i is at position `pos + i`.
    pub fn rotate(&self, rows: &mut [f32], width: usize, pos: usize) {
        let n = rows.len() / width.max(1);
        let (cos, sin) = self.tables(pos, n);
        let half = self.inv_freq.len();
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            Self::rotate_row(row, &cos[i * half..(i + 1) * half], &sin[i * half..(i + 1) * half]);
        }
    }
}
