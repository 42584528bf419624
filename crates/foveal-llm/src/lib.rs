//! foveal-llm
