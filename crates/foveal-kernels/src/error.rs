//! Errors of the kernel layer: shapes and tables that do not fit together.

/// Why a kernel refused a call. Nothing was written to the output.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// Two operands disagree on a dimension.
    #[error("{op}: {left} has {dim} = {left_len} but {right} has {right_len}; make them equal")]
    Mismatch {
        /// The operation.
        op: &'static str,
        /// The dimension's name.
        dim: &'static str,
        /// First operand.
        left: &'static str,
        /// Its length.
        left_len: usize,
        /// Second operand.
        right: &'static str,
        /// Its length.
        right_len: usize,
    },
    /// A view reaches past the end of its data.
    #[error(
        "{op}: view of {what} with shape {shape:?} and strides {strides:?} needs {need} elements but the data has {have}"
    )]
    View {
        /// The operation.
        op: &'static str,
        /// The operand.
        what: &'static str,
        /// (batch, heads, tokens, head_dim).
        shape: [usize; 4],
        /// Strides of batch, heads and tokens in elements.
        strides: [usize; 3],
        /// Elements needed.
        need: usize,
        /// Elements there.
        have: usize,
    },
    /// The number of query heads is no multiple of the number of K/V heads.
    #[error("{op}: {heads} query heads are not a multiple of {kv_heads} key/value heads")]
    Groups {
        /// The operation.
        op: &'static str,
        /// Query heads.
        heads: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
    /// A parameter is out of its range.
    #[error("{op}: {name} = {value}: {remedy}")]
    Param {
        /// The operation.
        op: &'static str,
        /// The parameter.
        name: &'static str,
        /// What was given.
        value: String,
        /// What to do.
        remedy: String,
    },
}

/// Result of a kernel call.
pub type Result<T> = std::result::Result<T, KernelError>;

/// Error unless the two lengths are equal.
pub(crate) fn same(
    op: &'static str,
    dim: &'static str,
    left: &'static str,
    a: usize,
    right: &'static str,
    b: usize,
) -> Result<()> {
    if a == b {
        return Ok(());
    }
    Err(KernelError::Mismatch { op, dim, left, left_len: a, right, right_len: b })
}
