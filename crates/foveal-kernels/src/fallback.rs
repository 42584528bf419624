//! Fast paths that cannot serve a call say so: one line a process and reason, and
//! [`Work::fallback`](crate::Work::fallback) in what the call returns.

use std::sync::atomic::{AtomicU8, Ordering};

/// Why a slower path served a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Reason {
    /// Attention on AMX tiles takes maxima of unscaled scores.
    AttendScale = 1,
    /// So few queries share a list of keys that AMX tiles would stay nearly empty.
    AttendFewQueries = 2,
    /// Linear layers in int8 want AVX-512 VNNI and finite inputs.
    LinearInteger = 4,
    /// Decode on AMX tiles splits finite numbers, and int8 wants the byte products of AMX.
    DecodeTiles = 32,
}

impl Reason {
    fn text(self) -> &'static str {
        match self {
            Reason::AttendScale => {
                "bf16 attention with a scale of zero or less runs in f32, not on AMX tiles; \
                 a positive scale runs on tiles"
            }
            Reason::AttendFewQueries => {
                "bf16 attention of four or fewer queries to a list of keys runs in f32, not on AMX tiles; \
                 larger query blocks run on tiles"
            }
            Reason::LinearInteger => {
                "an int8 linear layer runs on floating point: the integer path needs AVX-512 VNNI and finite inputs"
            }
            Reason::DecodeTiles => {
                "decode over a bf16 or int8 store runs on vectors, not on AMX tiles, which need finite queries and \
                 scales, and AMX-INT8 for int8"
            }
        }
    }
}

/// Log the reason, the first time in this process. Returns whether it was the first.
pub(crate) fn tell(reason: Reason) -> bool {
    static TOLD: AtomicU8 = AtomicU8::new(0);
    let bit = reason as u8;
    // The load keeps the common case free of writes to a line that all threads share.
    let first = TOLD.load(Ordering::Relaxed) & bit == 0 && TOLD.fetch_or(bit, Ordering::Relaxed) & bit == 0;
    if first {
        tracing::info!("{}", reason.text());
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_told_once() {
        // No other unit test of this crate falls back for this reason.
        assert!(tell(Reason::AttendScale));
        assert!(!tell(Reason::AttendScale));
    }
}
