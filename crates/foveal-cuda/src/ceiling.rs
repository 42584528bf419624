//! What a device gives at most: bytes copied and read, and products on its tensor cores. Kernels are held against it.

use crate::compile::Spec;
use crate::device::{Device, Launch, arg};
use crate::error::Result;
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

/// Rounds of [`products`].
const ROUNDS: i32 = 4096;

/// Copy one buffer to the other of the same length (a multiple of 8): reads and writes 2 bytes an element.
pub fn copy(device: &Device, from: &CudaSlice<u16>, to: &mut CudaSlice<u16>) -> Result<()> {
    let kernel = device.prepare(&Spec::ceiling(), "copy")?;
    let n = (from.len().min(to.len()) / 8) as u64;
    let (src, dst) = (from.device_ptr(device.stream()).0, to.device_ptr_mut(device.stream()).0);
    let at = Launch { blocks: [4 * device.facts().multiprocessors, 1], threads: 512, shared: 0 };
    // SAFETY: both buffers hold n pieces of 16 bytes.
    unsafe { device.launch("copy", &kernel, at, &mut [arg(&dst), arg(&src), arg(&n)]) }
}

/// Read a buffer whose length is a multiple of 8: 2 bytes an element.
pub fn read(device: &Device, from: &CudaSlice<u16>, sink: &mut CudaSlice<u16>) -> Result<()> {
    let kernel = device.prepare(&Spec::ceiling(), "read")?;
    let n = (from.len() / 8) as u64;
    let (src, dst) = (from.device_ptr(device.stream()).0, sink.device_ptr_mut(device.stream()).0);
    let at = Launch { blocks: [4 * device.facts().multiprocessors, 1], threads: 512, shared: 0 };
    // SAFETY: the buffer holds n pieces of 16 bytes, the sink at least one word.
    unsafe { device.launch("read", &kernel, at, &mut [arg(&dst), arg(&src), arg(&n)]) }
}

/// Products of bf16 tiles that lie in shared memory (`data`: 24,576 elements); returns the FLOPs launched.
pub fn products(device: &Device, data: &CudaSlice<u16>, out: &mut CudaSlice<f32>) -> Result<f64> {
    let kernel = device.prepare(&Spec::ceiling(), "products")?;
    let blocks = device.facts().multiprocessors.min(out.len() / 256);
    let (src, dst) = (data.device_ptr(device.stream()).0, out.device_ptr_mut(device.stream()).0);
    if data.len() < 24576 {
        return crate::error::bad("products", "data", data.len(), "give 24576 elements");
    }
    let hopper = device.facts().hopper();
    let at = Launch { blocks: [blocks, 1], threads: 256, shared: if hopper { 50 << 10 } else { 0 } };
    // SAFETY: `data` and `out` are as large as the kernel reads and writes.
    unsafe { device.launch("products", &kernel, at, &mut [arg(&dst), arg(&src), arg(&ROUNDS)]) }?;
    let each = if hopper { 2.0 * 2.0 * 64.0 * 64.0 * 256.0 } else { 8.0 * 16.0 * 2.0 * 16.0 * 8.0 * 16.0 };
    Ok(blocks as f64 * f64::from(ROUNDS) * each)
}
