//! GGUF versions 2 and 3: a header parser that trusts no number in the file, and dequantisation to `f32`.
//!
//! The header is read alone and parsed into ranges over its bytes: strings and arrays stay where they are, so what a file makes this code
//! allocate is bounded by a small multiple of the file's own size whatever its counts claim. Every count, length, product and
//! offset is checked before it is used. Quantised blocks are decoded by candle.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{CpuStorage, Device};
use rayon::prelude::*;

use crate::error::{LlmError, Result};
use crate::weight_file::{Bytes, WeightFile};

/// Tensors may have at most this many dimensions, as in ggml.
const MAX_DIMS: u32 = 4;
/// Arrays of arrays deeper than this are refused; no real file nests at all.
const MAX_NESTING: u32 = 4;
/// Where tensor data is aligned unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Names longer than this are refused.
const MAX_NAME: u64 = 65_535;
/// What is read of a file at first; most headers are shorter.
const FIRST_READ: u64 = 8 << 20;
/// Headers longer than this are refused: the largest vocabularies take a tenth of it.
const MAX_HEADER: u64 = 256 << 20;

/// The tensor types that can be read, for messages.
pub const SUPPORTED_TYPES: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K";

/// How one tensor's numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgufType {
    /// ggml's number of the type.
    pub id: u32,
    /// ggml's name.
    pub name: &'static str,
    dtype: GgmlDType,
}

impl GgufType {
    fn from_id(id: u32) -> Result<Self, &'static str> {
        use GgmlDType::*;
        let (name, dtype) = match id {
            0 => ("F32", F32),
            1 => ("F16", F16),
            2 => ("Q4_0", Q4_0),
            3 => ("Q4_1", Q4_1),
            6 => ("Q5_0", Q5_0),
            7 => ("Q5_1", Q5_1),
            8 => ("Q8_0", Q8_0),
            10 => ("Q2_K", Q2K),
            11 => ("Q3_K", Q3K),
            12 => ("Q4_K", Q4K),
            13 => ("Q5_K", Q5K),
            14 => ("Q6_K", Q6K),
            30 => ("BF16", BF16),
            // Known to ggml, but nothing here decodes them: the name helps more than the number.
            9 => return Err("Q8_1"),
            15 => return Err("Q8_K"),
            16 => return Err("IQ2_XXS"),
            17 => return Err("IQ2_XS"),
            18 => return Err("IQ3_XXS"),
            19 => return Err("IQ1_S"),
            20 => return Err("IQ4_NL"),
            21 => return Err("IQ3_S"),
            22 => return Err("IQ2_S"),
            23 => return Err("IQ4_XS"),
            24 => return Err("I8"),
            25 => return Err("I16"),
            26 => return Err("I32"),
            27 => return Err("I64"),
            28 => return Err("F64"),
            29 => return Err("IQ1_M"),
            34 => return Err("TQ1_0"),
            35 => return Err("TQ2_0"),
            39 => return Err("MXFP4"),
            _ => return Err("unknown to ggml"),
        };
        Ok(GgufType { id, name, dtype })
    }

    /// candle's name of the type.
    pub fn dtype(self) -> GgmlDType {
        self.dtype
    }

    /// Weights in one block.
    pub fn block_len(self) -> usize {
        self.dtype.block_size()
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        self.dtype.type_size()
    }
}

/// Type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn from_id(id: u32) -> Option<Self> {
        use Kind::*;
        Some(match id {
            0 => U8,
            1 => I8,
            2 => U16,
            3 => I16,
            4 => U32,
            5 => I32,
            6 => F32,
            7 => Bool,
            8 => String,
            9 => Array,
            10 => U64,
            11 => I64,
            12 => F64,
            _ => return None,
        })
    }

    /// Bytes of a scalar; `None` for strings and arrays.
    fn size(self) -> Option<u64> {
        Some(match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::U64 | Kind::I64 | Kind::F64 => 8,
            Kind::String | Kind::Array => return None,
        })
    }
}

/// A metadata value as bytes of the file.
#[derive(Debug, Clone)]
struct Value {
    kind: Kind,
    /// For arrays: element kind and count.
    array: Option<(Kind, u64)>,
    /// The value's bytes: a scalar's, a string's characters, or an array's elements.
    bytes: Range<usize>,
}

/// Where one tensor lies.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Name as stored.
    pub name: String,
    /// Shape, rows first (the reverse of the file's order).
    pub shape: Vec<usize>,
    /// Storage type.
    pub dtype: GgufType,
    /// Its bytes within the file.
    pub bytes: Range<usize>,
}

/// A parsed header: metadata and tensor directory as ranges over the file.
#[derive(Debug)]
pub struct Header {
    /// GGUF version, 2 or 3.
    pub version: u32,
    values: HashMap<String, Value>,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    /// Bytes of the file that the header takes.
    end: usize,
}

/// A refusal of the parser before the file's path is attached to it.
#[derive(Debug)]
enum Refusal {
    /// No refusal yet: so many bytes of the file must be there to go on.
    More(u64),
    Damaged {
        offset: u64,
        problem: String,
    },
    Unsupported {
        what: String,
        value: String,
        supported: String,
        remedy: &'static str,
    },
}

impl Refusal {
    fn at(self, path: &Path) -> LlmError {
        let path = path.to_path_buf();
        match self {
            Refusal::More(need) => LlmError::Damaged {
                path,
                format: "GGUF",
                problem: format!("the header takes {need} bytes or more; at most {MAX_HEADER} are allowed"),
                offset: 0,
            },
            Refusal::Damaged { offset, problem } => LlmError::Damaged { path, format: "GGUF", problem, offset },
            Refusal::Unsupported { what, value, supported, remedy } => {
                LlmError::Unsupported { path, what, value, supported, remedy }
            }
        }
    }
}

/// Reads forward through the bytes; no read passes the end of them or of the file.
struct Cursor<'a> {
    /// The beginning of the file.
    data: &'a [u8],
    at: usize,
    /// Bytes of the whole file.
    len: u64,
}

impl<'a> Cursor<'a> {
    fn damaged<T>(&self, problem: impl Into<String>) -> Result<T, Refusal> {
        Err(Refusal::Damaged { offset: self.at as u64, problem: problem.into() })
    }

    fn left(&self) -> u64 {
        self.len - self.at as u64
    }

    fn take(&mut self, len: u64, what: &str) -> Result<Range<usize>, Refusal> {
        if len > self.left() {
            let left = self.left();
            return self.damaged(format!("{what} needs {len} bytes but only {left} are left"));
        }
        if len > (self.data.len() - self.at) as u64 {
            return Err(Refusal::More(self.at as u64 + len));
        }
        // `len` fits in usize because it is at most the length of a slice.
        let range = self.at..self.at + len as usize;
        self.at = range.end;
        Ok(range)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Refusal> {
        let range = self.take(N as u64, what)?;
        let mut out = [0; N];
        out.copy_from_slice(&self.data[range]);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, Refusal> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, Refusal> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A length-prefixed string's bytes.
    fn string(&mut self, what: &str) -> Result<Range<usize>, Refusal> {
        let len = self.u64(what)?;
        self.take(len, what)
    }

    fn name(&mut self, what: &str) -> Result<String, Refusal> {
        let len = self.u64(what)?;
        if len > MAX_NAME {
            return self.damaged(format!("{what} is {len} bytes long; at most {MAX_NAME} are allowed"));
        }
        let range = self.take(len, what)?;
        match std::str::from_utf8(&self.data[range]) {
            Ok(s) => Ok(s.to_owned()),
            Err(_) => self.damaged(format!("{what} is not UTF-8")),
        }
    }

    fn kind(&mut self, key: &str) -> Result<Kind, Refusal> {
        let id = self.u32("a value type")?;
        match Kind::from_id(id) {
            Some(kind) => Ok(kind),
            None => self.damaged(format!("key `{key}` has value type {id}; types are 0 to 12")),
        }
    }

    fn value(&mut self, key: &str) -> Result<Value, Refusal> {
        let kind = self.kind(key)?;
        match kind {
            Kind::String => Ok(Value { kind, array: None, bytes: self.string(key)? }),
            Kind::Array => {
                let (element, count, bytes) = self.elements(key, 1)?;
                Ok(Value { kind, array: Some((element, count)), bytes })
            }
            scalar => {
                // `size` is `Some` for every scalar.
                let bytes = self.take(scalar.size().unwrap_or(0), key)?;
                Ok(Value { kind, array: None, bytes })
            }
        }
    }

    /// Walks an array without storing its elements.
    fn elements(&mut self, key: &str, depth: u32) -> Result<(Kind, u64, Range<usize>), Refusal> {
        if depth > MAX_NESTING {
            return self.damaged(format!("key `{key}` nests arrays more than {MAX_NESTING} deep"));
        }
        let element = self.kind(key)?;
        let count = self.u64("an array length")?;
        let start = self.at;
        match element.size() {
            Some(size) => {
                let Some(bytes) = count.checked_mul(size) else {
                    return self.damaged(format!("key `{key}` claims {count} array elements"));
                };
                self.take(bytes, &format!("array `{key}` of {count} elements"))?;
            }
            None => {
                // Every string or inner array takes at least 8 bytes, so an impossible count fails here and not after a long walk.
                if count > self.left() / 8 {
                    let left = self.left();
                    return self
                        .damaged(format!("key `{key}` claims {count} array elements but only {left} bytes are left"));
                }
                for _ in 0..count {
                    if element == Kind::String {
                        self.string(key)?;
                    } else {
                        self.elements(key, depth + 1)?;
                    }
                }
            }
        }
        Ok((element, count, start..self.at))
    }
}

impl Header {
    /// Parses the header in `data`, which must be the whole file (offsets are checked against its length). `path` is for messages.
    pub fn parse(data: &[u8], path: &Path) -> Result<Self> {
        Self::parse_inner(data, data.len() as u64).map_err(|refusal| refusal.at(path))
    }

    /// The header of `file`, and its bytes.
    fn read(file: &WeightFile) -> Result<(Self, Vec<u8>)> {
        let mut want = FIRST_READ;
        loop {
            let mut head = file.head(want)?;
            match Self::parse_inner(&head, file.len()) {
                Ok(header) => {
                    head.truncate(header.end);
                    head.shrink_to_fit();
                    return Ok((header, head));
                }
                Err(Refusal::More(need)) if need <= MAX_HEADER => want = need.max(2 * want).min(MAX_HEADER),
                Err(refusal) => return Err(refusal.at(file.path())),
            }
        }
    }

    /// `data` is the beginning of a file of `len` bytes.
    fn parse_inner(data: &[u8], len: u64) -> Result<Self, Refusal> {
        let mut c = Cursor { data, at: 0, len };
        let magic: [u8; 4] = c.array("the magic number")?;
        if &magic != b"GGUF" {
            return Err(Refusal::Damaged {
                offset: 0,
                problem: format!("the magic number is {magic:02x?}, not `GGUF`"),
            });
        }
        let version = c.u32("the version")?;
        if !(2..=3).contains(&version) {
            let (value, remedy) = if matches!(version.swap_bytes(), 1..=3) {
                (format!("{} in big-endian order", version.swap_bytes()), "Convert it on a little-endian machine.")
            } else {
                (version.to_string(), "Convert the original weights again with a current converter.")
            };
            return Err(Refusal::Unsupported {
                what: "GGUF version".into(),
                value,
                supported: "2, 3 (little-endian)".into(),
                remedy,
            });
        }
        let num_tensors = c.u64("the tensor count")?;
        let num_values = c.u64("the metadata count")?;
        // The smallest metadata entry is 13 bytes, the smallest tensor entry 24.
        if num_values > c.left() / 13 {
            return c.damaged(format!("{num_values} metadata entries claimed in a file of {len} bytes"));
        }
        if num_tensors > c.left() / 24 {
            return c.damaged(format!("{num_tensors} tensors claimed in a file of {len} bytes"));
        }
        let mut values = HashMap::new();
        for _ in 0..num_values {
            let key = c.name("a metadata key")?;
            let value = c.value(&key)?;
            if values.contains_key(&key) {
                return c.damaged(format!("metadata key `{key}` appears twice"));
            }
            values.insert(key, value);
        }
        let alignment = match values.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value { kind: Kind::U32, bytes, .. }) => {
                let mut four = [0; 4];
                four.copy_from_slice(&data[bytes.clone()]);
                u64::from(u32::from_le_bytes(four))
            }
            Some(_) => return c.damaged("general.alignment is not a 32-bit unsigned number"),
        };
        // The format asks for a multiple of 8; decoding in place relies on at least 4.
        if !alignment.is_power_of_two() || alignment < 8 {
            return c.damaged(format!("general.alignment = {alignment}; it must be a power of two of at least 8"));
        }

        // First pass: names, shapes and relative offsets. The data section starts where the directory ends, rounded up.
        let mut raw = Vec::new();
        let mut index = HashMap::new();
        for number in 0..num_tensors as usize {
            let name = c.name("a tensor name")?;
            let num_dims = c.u32("a dimension count")?;
            if num_dims == 0 || num_dims > MAX_DIMS {
                return c.damaged(format!("tensor `{name}` has {num_dims} dimensions; 1 to {MAX_DIMS} are allowed"));
            }
            let mut shape = Vec::with_capacity(num_dims as usize);
            let mut count = 1u64;
            for _ in 0..num_dims {
                let dim = c.u64("a dimension")?;
                if dim == 0 {
                    return c.damaged(format!("tensor `{name}` has a dimension of 0"));
                }
                match count.checked_mul(dim).filter(|&n| n <= i64::MAX as u64) {
                    Some(n) => count = n,
                    None => return c.damaged(format!("tensor `{name}` has too many elements: a dimension of {dim}")),
                }
                match usize::try_from(dim) {
                    Ok(dim) => shape.push(dim),
                    Err(_) => return c.damaged(format!("tensor `{name}` has a dimension of {dim}")),
                }
            }
            let id = c.u32("a tensor type")?;
            let dtype = GgufType::from_id(id).map_err(|known| Refusal::Unsupported {
                what: format!("the type of tensor `{name}`"),
                value: format!("{id} ({known})"),
                supported: SUPPORTED_TYPES.into(),
                remedy: "Convert the model to one of these.",
            })?;
            if shape[0] % dtype.block_len() != 0 {
                return c.damaged(format!(
                    "tensor `{name}` has rows of {} but {} stores blocks of {}",
                    shape[0],
                    dtype.name,
                    dtype.block_len()
                ));
            }
            let bytes = (count / dtype.block_len() as u64).checked_mul(dtype.block_bytes() as u64);
            let Some(bytes) = bytes else {
                return c.damaged(format!("tensor `{name}` of {count} elements is too large"));
            };
            let offset = c.u64("a tensor offset")?;
            if offset % alignment != 0 {
                return c.damaged(format!("tensor `{name}` at offset {offset}, not a multiple of {alignment}"));
            }
            if index.insert(name.clone(), number).is_some() {
                return c.damaged(format!("tensor `{name}` appears twice"));
            }
            shape.reverse();
            raw.push((name, shape, dtype, offset, bytes));
        }
        let start = (c.at as u64).next_multiple_of(alignment);

        let mut tensors = Vec::with_capacity(raw.len());
        for (name, shape, dtype, offset, bytes) in raw {
            let end = start.checked_add(offset).and_then(|begin| begin.checked_add(bytes));
            let Some(end) = end.filter(|&end| end <= len) else {
                return c.damaged(format!(
                    "tensor `{name}` at data offset {offset} with {bytes} bytes reaches past the end of the file ({len} bytes, data from {start})"
                ));
            };
            tensors.push(TensorInfo { name, shape, dtype, bytes: (end - bytes) as usize..end as usize });
        }
        // Overlapping tensors would let a small file stand for an unbounded model.
        let mut order: Vec<&TensorInfo> = tensors.iter().collect();
        order.sort_by_key(|t| t.bytes.start);
        for pair in order.windows(2) {
            if pair[0].bytes.end > pair[1].bytes.start {
                return c.damaged(format!("tensors `{}` and `{}` overlap", pair[0].name, pair[1].name));
            }
        }
        Ok(Header { version, values, tensors, index, end: c.at })
    }

    /// The tensor directory in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// One tensor's entry.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }
}

/// A GGUF file: its header in memory, its tensors on disk.
pub struct Gguf {
    file: WeightFile,
    /// The file's bytes up to the end of the header.
    head: Vec<u8>,
    header: Header,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf").field("path", &self.path()).field("tensors", &self.header.tensors.len()).finish()
    }
}

impl Gguf {
    /// Opens the file at `path` and parses its header.
    ///
    /// # Errors
    /// A file that cannot be opened, or whose header contradicts itself or the file's length.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(WeightFile::open(path, "GGUF")?)
    }

    /// Parses bytes in memory (copied once). For tests and fuzzing.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_bytes(data: &[u8]) -> Result<Self> {
        Self::of(WeightFile::memory(data.to_vec(), "GGUF"))
    }

    fn of(file: WeightFile) -> Result<Self> {
        let (header, head) = Header::read(&file)?;
        Ok(Gguf { file, head, header })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Metadata and tensor directory.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file.len()
    }

    /// Whether the metadata has `key`.
    pub fn has_key(&self, key: &str) -> bool {
        self.header.values.contains_key(key)
    }

    /// All metadata keys, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.header.values.keys().map(String::as_str)
    }

    fn bad(&self, key: &str, value: impl Into<String>, need: impl Into<String>) -> LlmError {
        LlmError::BadValue { path: self.path().into(), key: key.into(), value: value.into(), need: need.into() }
    }

    /// A whole number that fits `u64`, of whatever integer type it is stored as. `None` when absent.
    ///
    /// # Errors
    /// The value is negative or no integer.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.header.values.get(key) else { return Ok(None) };
        match scalar(&self.head, value.kind, value.bytes.clone()) {
            Some(Scalar::Int(v)) => match u64::try_from(v) {
                Ok(v) => Ok(Some(v)),
                Err(_) => Err(self.bad(key, v.to_string(), "needs a whole number of at least 0")),
            },
            _ => Err(self.bad(key, format!("{:?}", value.kind), "needs a whole number")),
        }
    }

    /// A number, of whatever type it is stored as. `None` when absent.
    ///
    /// # Errors
    /// The value is no number.
    pub fn get_f64(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.header.values.get(key) else { return Ok(None) };
        match scalar(&self.head, value.kind, value.bytes.clone()) {
            Some(Scalar::Int(v)) => Ok(Some(v as f64)),
            Some(Scalar::Float(v)) => Ok(Some(v)),
            _ => Err(self.bad(key, format!("{:?}", value.kind), "needs a number")),
        }
    }

    /// A truth value. `None` when absent.
    ///
    /// # Errors
    /// The value is no truth value.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.header.values.get(key) else { return Ok(None) };
        if value.kind != Kind::Bool {
            return Err(self.bad(key, format!("{:?}", value.kind), "needs true or false"));
        }
        Ok(Some(self.head[value.bytes.start] != 0))
    }

    /// A string. `None` when absent.
    ///
    /// # Errors
    /// The value is no UTF-8 string.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.header.values.get(key) else { return Ok(None) };
        if value.kind != Kind::String {
            return Err(self.bad(key, format!("{:?}", value.kind), "needs a string"));
        }
        match std::str::from_utf8(&self.head[value.bytes.clone()]) {
            Ok(s) => Ok(Some(s)),
            Err(e) => Err(self.bad(key, "bytes", format!("needs UTF-8 ({e})"))),
        }
    }

    /// An array of strings as byte slices (token pieces need not be UTF-8). `None` when absent.
    ///
    /// # Errors
    /// The value is no array of strings.
    pub fn get_strings(&self, key: &str) -> Result<Option<Vec<&[u8]>>> {
        let Some(value) = self.header.values.get(key) else { return Ok(None) };
        let Some((Kind::String, count)) = value.array else {
            return Err(self.bad(key, format!("{:?}", value.kind), "needs an array of strings"));
        };
        // The header parser walked this array, so every read below succeeds; a miss is still an error and not a panic.
        let mut cursor = Cursor { data: &self.head, at: value.bytes.start, len: value.bytes.end as u64 };
        let mut out = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let range = cursor.string(key).map_err(|refusal| refusal.at(self.path()))?;
            out.push(&self.head[range]);
        }
        Ok(Some(out))
    }

    fn numbers<T>(&self, key: &str, need: &str, pick: impl Fn(Scalar) -> Option<T>) -> Result<Option<Vec<T>>> {
        let Some(value) = self.header.values.get(key) else { return Ok(None) };
        let Some((kind, count)) = value.array else {
            return Err(self.bad(key, format!("{:?}", value.kind), need));
        };
        let Some(size) = kind.size() else {
            return Err(self.bad(key, format!("an array of {kind:?}"), need));
        };
        let mut out = Vec::with_capacity(count as usize);
        for i in 0..count as usize {
            let at = value.bytes.start + i * size as usize;
            match scalar(&self.head, kind, at..at + size as usize).and_then(&pick) {
                Some(v) => out.push(v),
                None => return Err(self.bad(key, format!("element {i} of type {kind:?}"), need)),
            }
        }
        Ok(Some(out))
    }

    /// An array of numbers as `f32`. `None` when absent.
    ///
    /// # Errors
    /// The value is no array of numbers.
    pub fn get_f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.numbers(key, "needs an array of numbers", |s| match s {
            Scalar::Int(v) => Some(v as f32),
            Scalar::Float(v) => Some(v as f32),
            Scalar::Bool => None,
        })
    }

    /// An array of integers. `None` when absent.
    ///
    /// # Errors
    /// The value is no array of integers.
    pub fn get_i64s(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.numbers(key, "needs an array of integers", |s| match s {
            Scalar::Int(v) => i64::try_from(v).ok(),
            _ => None,
        })
    }

    fn bytes_of(&self, info: &TensorInfo) -> Result<Bytes> {
        self.file.read(&info.name, info.bytes.clone())
    }

    /// Dequantises a tensor to row-major `f32`, rows in the order `order` gives (`None` keeps the file's).
    /// `order` maps each output row to a stored row; a row is the last dimension.
    ///
    /// # Errors
    /// A weight that is NaN or infinite, named with its index in the output; a file that was shortened since it was opened.
    pub fn dequantize(&self, info: &TensorInfo, order: Option<&[usize]>) -> Result<Vec<f32>> {
        let cols = info.shape[info.shape.len() - 1];
        let total = info.shape.iter().product::<usize>();
        let row_bytes = cols / info.dtype.block_len() * info.dtype.block_bytes();
        let bytes = self.bytes_of(info)?;
        let mut out = vec![0f32; total];
        // About 16 Ki weights a task: small enough that the decoder's own buffer stays in cache.
        let rows_per_task = (16_384 / cols).max(1);
        let first_bad = out
            .par_chunks_mut(rows_per_task * cols)
            .enumerate()
            .map(|(task, out)| {
                let first_row = task * rows_per_task;
                match order {
                    None => {
                        let rows = out.len() / cols;
                        decode(info, &bytes[first_row * row_bytes..(first_row + rows) * row_bytes], out)?;
                    }
                    Some(order) => {
                        for (r, out) in out.chunks_exact_mut(cols).enumerate() {
                            let from = order[first_row + r];
                            decode(info, &bytes[from * row_bytes..(from + 1) * row_bytes], out)?;
                        }
                    }
                }
                Ok(first_non_finite(out).map(|i| (first_row * cols + i, out[i])))
            })
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .flatten()
            .next();
        match first_bad {
            Some((index, value)) => {
                Err(LlmError::NonFinite { path: self.path().into(), tensor: info.name.clone(), index, value })
            }
            None => Ok(out),
        }
    }

    /// The tensor as candle's quantised tensor on the CPU, rows in the order `order` gives. Blocks never span rows, so a permutation
    /// of rows is exact. The weights are not searched for NaN.
    ///
    /// # Errors
    /// candle refuses the tensor, or the file was shortened since it was opened.
    pub fn qtensor(&self, info: &TensorInfo, order: Option<&[usize]>) -> Result<QTensor> {
        let cols = info.shape[info.shape.len() - 1];
        let row_bytes = cols / info.dtype.block_len() * info.dtype.block_bytes();
        let bytes = self.bytes_of(info)?;
        let data: Cow<'_, [u8]> = match order {
            None => Cow::Borrowed(&*bytes),
            Some(order) => {
                let mut data = Vec::with_capacity(bytes.len());
                for &from in order {
                    data.extend_from_slice(&bytes[from * row_bytes..(from + 1) * row_bytes]);
                }
                Cow::Owned(data)
            }
        };
        QStorage::from_data(data, &Device::Cpu, info.dtype.dtype())
            .and_then(|storage| QTensor::new(storage, info.shape.as_slice()))
            .map_err(|e| LlmError::Tensor { tensor: info.name.clone(), problem: e.to_string() })
    }
}

/// Index of the first NaN or infinity.
pub(crate) fn first_non_finite(values: &[f32]) -> Option<usize> {
    // A branch-free scan first: x·0 is 0 for finite x and NaN otherwise, and NaN stays in a sum.
    let sum: f32 = values.iter().map(|v| v * 0.0).sum();
    if sum == 0.0 { None } else { values.iter().position(|v| !v.is_finite()) }
}

/// Decodes whole blocks into `out`.
fn decode(info: &TensorInfo, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    match info.dtype.dtype() {
        GgmlDType::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
            Ok(())
        }
        GgmlDType::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = half::f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
            Ok(())
        }
        GgmlDType::BF16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
            Ok(())
        }
        dtype => {
            let blocks = dtype.from_data(Cow::Borrowed(bytes));
            match blocks.dequantize(out.len()) {
                Ok(CpuStorage::F32(values)) => {
                    out.copy_from_slice(&values);
                    Ok(())
                }
                Ok(_) => Err(LlmError::Tensor { tensor: info.name.clone(), problem: "decoded to no f32".into() }),
                Err(e) => Err(LlmError::Tensor { tensor: info.name.clone(), problem: e.to_string() }),
            }
        }
    }
}

/// A number or truth value.
enum Scalar {
    Int(i128),
    Float(f64),
    Bool,
}

/// Decodes the scalar at `range`, whose length the header parser has checked.
fn scalar(data: &[u8], kind: Kind, range: Range<usize>) -> Option<Scalar> {
    let bytes = data.get(range)?;
    let mut wide = [0u8; 8];
    wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
    let raw = u64::from_le_bytes(wide);
    Some(match kind {
        Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => Scalar::Int(raw.into()),
        Kind::I8 => Scalar::Int((raw as i8).into()),
        Kind::I16 => Scalar::Int((raw as i16).into()),
        Kind::I32 => Scalar::Int((raw as i32).into()),
        Kind::I64 => Scalar::Int((raw as i64).into()),
        Kind::F32 => Scalar::Float(f32::from_bits(raw as u32).into()),
        Kind::F64 => Scalar::Float(f64::from_bits(raw)),
        Kind::Bool => Scalar::Bool,
        Kind::String | Kind::Array => return None,
    })
}
