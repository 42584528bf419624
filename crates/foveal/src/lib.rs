//! foveal
