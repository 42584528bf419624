//! foveal-lab
