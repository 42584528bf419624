//! Fashion-MNIST as patches on a grid: ten classes of clothes (Xiao et al. 2017, arXiv 1708.07747).

use super::{Batch, Split, Task, generator};
use crate::error::{Result, TuneError, setting};
use crate::model::{Input, Output};
use candle_core::{Device, Tensor};
use flate2::read::GzDecoder;
use foveal::sparse::Grid;
use rand::Rng;
use std::io::Read;
use std::path::Path;

/// Pixels of a side.
const SIDE: usize = 28;
/// More images than the set has: a file that claims more is not it.
const MOST: usize = 60_000;

/// The task.
pub struct Fashion {
    patch: usize,
    train: Images,
    test: Images,
}

struct Images {
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

impl Fashion {
    /// Images of `folder` cut into patches of `patch` × `patch` pixels (a divisor of 28).
    ///
    /// Errors: a patch that does not divide, files that are missing or not what their names say.
    pub fn new(folder: &Path, patch: usize) -> Result<Self> {
        if patch == 0 || !SIDE.is_multiple_of(patch) {
            return Err(setting("patch", patch, format!("use a divisor of {SIDE}, such as 2 or 4")));
        }
        Ok(Self { patch, train: Images::read(folder, "train")?, test: Images::read(folder, "t10k")? })
    }

    fn side(&self) -> usize {
        SIDE / self.patch
    }
}

impl Images {
    fn read(folder: &Path, part: &str) -> Result<Self> {
        let pixels = idx(&folder.join(format!("{part}-images-idx3-ubyte.gz")), &[SIDE, SIDE])?;
        let labels = idx(&folder.join(format!("{part}-labels-idx1-ubyte.gz")), &[])?;
        if labels.len() * SIDE * SIDE != pixels.len() || labels.is_empty() || labels.iter().any(|&l| l > 9) {
            return Err(TuneError::File {
                path: folder.into(),
                action: "read images from",
                message: format!("{} labels up to 9 for {} pixels; fetch the files again", labels.len(), pixels.len()),
            });
        }
        Ok(Self { pixels, labels })
    }
}

/// The bytes of a gzipped IDX file of unsigned bytes: a count, then `sides`, then that many elements.
fn idx(path: &Path, sides: &[usize]) -> Result<Vec<u8>> {
    let bad = |message: String| TuneError::File { path: path.into(), action: "read", message };
    let file = std::fs::File::open(path).map_err(|e| bad(e.to_string()))?;
    let each: usize = sides.iter().product();
    let header = 4 * (2 + sides.len());
    let mut bytes = Vec::new();
    // Bounded, so that a small file cannot unpack into more memory than the real one.
    let limit = (header + MOST * each + 1) as u64;
    GzDecoder::new(file).take(limit).read_to_end(&mut bytes).map_err(|e| bad(e.to_string()))?;
    let number = |i: usize| bytes.get(4 * i..4 * i + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize);
    let dims: Vec<Option<usize>> = (2..2 + sides.len()).map(number).collect();
    match number(0).zip(number(1)) {
        Some((magic, count))
            if magic == 0x800 + 1 + sides.len()
                && dims.iter().zip(sides).all(|(a, b)| *a == Some(*b))
                && count <= MOST
                && bytes.len() == header + count * each =>
        {
            Ok(bytes.split_off(header))
        }
        _ => Err(bad("it is no IDX file of the set; fetch it again".into())),
    }
}

impl Task for Fashion {
    fn name(&self) -> &'static str {
        "fashion"
    }
    fn input(&self) -> Input {
        Input::Vectors(self.patch * self.patch)
    }
    fn output(&self) -> Output {
        Output::Classes(10)
    }
    fn tokens(&self) -> usize {
        self.side() * self.side()
    }
    fn causal(&self) -> bool {
        false
    }
    fn grid(&self) -> Option<Grid> {
        Some(Grid::new(1, self.side(), self.side()))
    }

    fn batch(&self, split: Split, seed: u64, n: u64, size: usize) -> Result<Batch> {
        let images = match split {
            Split::Train => &self.train,
            Split::Test => &self.test,
        };
        let mut rng = generator(split, seed, n);
        let (p, side) = (self.patch, self.side());
        let mut x = Vec::with_capacity(size * SIDE * SIDE);
        let mut answers = Vec::with_capacity(size);
        for _ in 0..size {
            let i = rng.random_range(0..images.labels.len());
            let pixels = &images.pixels[i * SIDE * SIDE..(i + 1) * SIDE * SIDE];
            for (r, c) in (0..side).flat_map(|r| (0..side).map(move |c| (r, c))) {
                for y in r * p..(r + 1) * p {
                    // Mean 73 and deviation 90 of the set's pixels.
                    x.extend(
                        pixels[y * SIDE + c * p..y * SIDE + (c + 1) * p].iter().map(|&v| (f32::from(v) - 73.0) / 90.0),
                    );
                }
            }
            answers.push(u32::from(images.labels[i]));
        }
        let input = Tensor::from_vec(x, (size, side * side, p * p), &Device::Cpu)?;
        Ok(Batch { input, rows: (0..size as u32).collect(), answers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    fn put(path: &Path, header: &[u32], data: &[u8]) {
        let mut z = GzEncoder::new(std::fs::File::create(path).unwrap(), Compression::fast());
        header.iter().for_each(|x| z.write_all(&x.to_be_bytes()).unwrap());
        z.write_all(data).unwrap();
        z.finish().unwrap();
    }

    #[test]
    fn patches_are_the_image_and_damaged_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let at = |n: &str| folder.path().join(n);
        let pixels: Vec<u8> = (0..SIDE * SIDE).map(|i| (i % 251) as u8).collect();
        for part in ["train", "t10k"] {
            put(&at(&format!("{part}-images-idx3-ubyte.gz")), &[0x803, 1, 28, 28], &pixels);
            put(&at(&format!("{part}-labels-idx1-ubyte.gz")), &[0x801, 1], &[7]);
        }
        let task = Fashion::new(folder.path(), 4).unwrap();
        let b = task.batch(Split::Test, 1, 0, 2).unwrap();
        assert_eq!((b.input.dims(), &b.answers[..], task.tokens()), (&[2, 49, 16][..], &[7, 7][..], 49));
        let x: Vec<Vec<Vec<f32>>> = b.input.to_vec3().unwrap();
        // Patch (2, 3), its pixel (1, 2).
        let want = (f32::from(pixels[(2 * 4 + 1) * SIDE + 3 * 4 + 2]) - 73.0) / 90.0;
        assert_eq!(x[1][2 * 7 + 3][4 + 2], want);
        assert!(Fashion::new(folder.path(), 3).is_err());
        put(&at("t10k-images-idx3-ubyte.gz"), &[0x803, 2, 28, 28], &pixels);
        let e = Fashion::new(folder.path(), 4).err().unwrap().to_string();
        assert!(e.contains("t10k-images") && e.contains("IDX"), "{e}");
        put(&at("t10k-images-idx3-ubyte.gz"), &[0x803, u32::MAX, 28, 28], &pixels);
        assert!(Fashion::new(folder.path(), 4).is_err());
    }
}
