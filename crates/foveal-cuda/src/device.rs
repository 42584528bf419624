//! A GPU: what it is, its stream, its compiled kernels, and launches of which each is checked.

use crate::compile::{Spec, cache_folder, compile_cached};
use crate::error::{CudaError, During, Result};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits, sys};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Compute capability, ten times: 90 for Hopper.
    pub capability: u32,
    /// What its kernels are compiled for: `sm_90a`.
    pub arch: String,
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Most shared memory of a block, in bytes.
    pub shared: usize,
    /// Second-level cache in bytes.
    pub l2: usize,
    /// Device memory in bytes.
    pub memory: usize,
    /// Version of the driver's interface: 13000 for CUDA 13.0.
    pub driver: i32,
}

impl Facts {
    /// Whether the kernels for Hopper alone (TMA, wgmma) run there.
    pub fn hopper(&self) -> bool {
        self.arch == "sm_90a"
    }
}

type Loaded = HashMap<(Spec, &'static str), CudaFunction>;

/// An open device with one stream, in whose order all calls run.
#[derive(Debug)]
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    facts: Facts,
    loaded: Mutex<Loaded>,
}

/// A block of memory as a kernel parameter.
pub(crate) fn arg<T>(x: &T) -> *mut c_void {
    std::ptr::from_ref(x).cast_mut().cast()
}

/// Blocks, threads of a block, and bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    pub(crate) blocks: [usize; 2],
    pub(crate) threads: usize,
    pub(crate) shared: usize,
}

impl Device {
    /// Open device `ordinal`.
    ///
    /// Errors: no driver, no such device, a device older than sm_80.
    pub fn open(ordinal: usize) -> Result<Self> {
        // SAFETY: loads a library by its well-known names and drops it.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        let count = CudaContext::device_count().during("counting devices");
        let count = match count {
            Err(CudaError::Driver { code, .. }) if code == "CUDA_ERROR_NO_DEVICE" => 0,
            other => other? as usize,
        };
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).during("opening the device")?;
        use sys::CUdevice_attribute as A;
        let ask = |a| context.attribute(a).during("asking for the device's attributes");
        let (major, minor) = context.compute_capability().during("asking for the compute capability")?;
        let capability = (10 * major + minor) as u32;
        let name = context.name().during("asking for the device's name")?;
        if capability < 80 {
            return Err(CudaError::TooOld { name, arch: capability });
        }
        let mut driver = 0;
        // SAFETY: the pointer is to an integer.
        let said = unsafe { sys::cuDriverGetVersion(&mut driver) };
        said.result().during("asking for the driver's version")?;
        let facts = Facts {
            name,
            capability,
            arch: if capability == 90 { "sm_90a".into() } else { format!("sm_{capability}") },
            multiprocessors: ask(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            shared: ask(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
            l2: ask(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            memory: context.total_mem().during("asking for the device's memory")?,
            driver,
        };
        let stream = context.default_stream();
        Ok(Self { context, stream, facts, loaded: Mutex::new(Loaded::new()) })
    }

    /// What it is.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Its stream.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Wait for all that was launched, and hear of its errors.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().during("waiting for the device")
    }

    /// Copy to the device.
    pub fn upload<T: DeviceRepr + Clone>(&self, data: &[T]) -> Result<CudaSlice<T>> {
        // The driver refuses to allocate nothing.
        if data.is_empty() {
            return self.uninit(0);
        }
        self.stream.clone_htod(data).during("copying to the device")
    }

    /// Copy from the device, once all that was launched is done.
    pub fn download<T: DeviceRepr>(&self, data: &CudaSlice<T>) -> Result<Vec<T>> {
        let copy = self.stream.clone_dtoh(data).during("copying from the device")?;
        self.synchronize()?;
        Ok(copy)
    }

    /// Zeroed memory.
    pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, len: usize) -> Result<CudaSlice<T>> {
        self.stream.alloc_zeros(len.max(1)).during("allocating device memory")
    }

    /// Memory in which anything may be.
    pub(crate) fn uninit<T: DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>> {
        // SAFETY: device memory of plain numbers, of which any bits are valid.
        unsafe { self.stream.alloc(len.max(1)) }.during("allocating device memory")
    }

    /// Memory in which anything may be.
    pub(crate) fn scratch(&self, len: usize) -> Result<CudaSlice<f32>> {
        self.uninit(len)
    }

    /// An event that keeps time.
    pub fn mark(&self) -> Result<CudaEvent> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        self.stream.record_event(flags).during("recording an event")
    }

    /// Milliseconds between two events of [`Device::mark`], once the later one has happened.
    pub fn between(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f32> {
        from.elapsed_ms(to).during("reading events")
    }

    /// Compile (or take from the cache) and load the function `entry` of a kernel.
    pub fn prepare(&self, spec: &Spec, entry: &'static str) -> Result<CudaFunction> {
        let key = (spec.clone(), entry);
        if let Some(f) = self.loaded.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(f.clone());
        }
        let folder = cache_folder();
        let binary = compile_cached(spec, &self.facts.arch, self.facts.driver, folder.as_deref())?;
        let what = format!("loading {}", spec.name());
        let module = self.context.load_module(cudarc::nvrtc::Ptx::from_binary(binary.code)).during(&what)?;
        let f = module.load_function(entry).during(&what)?;
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner).insert(key, f.clone());
        Ok(f)
    }

    /// Launch. A launch without blocks does nothing.
    ///
    /// # Safety
    /// `args` are pointers to what the kernel takes, in order and of its types, and what they point to on the device
    /// is as large as the kernel expects and lives until it is done.
    pub(crate) unsafe fn launch(
        &self,
        name: &str,
        f: &CudaFunction,
        at: Launch,
        args: &mut [*mut c_void],
    ) -> Result<()> {
        if at.blocks.contains(&0) {
            return Ok(());
        }
        if at.blocks[0] > i32::MAX as usize || at.blocks[1] > 65535 {
            return crate::error::bad("launch", "blocks", format!("{:?}", at.blocks), "split the batch");
        }
        if at.shared > 48 << 10 {
            let kind = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            f.set_attribute(kind, at.shared as i32)
                .during(&format!("giving {name} {} bytes of shared memory", at.shared))?;
        }
        self.context.bind_to_thread().during("choosing the device")?;
        // SAFETY: the caller's promise.
        unsafe {
            cudarc::driver::result::launch_kernel(
                f.cu_function(),
                (at.blocks[0] as u32, at.blocks[1] as u32, 1),
                (at.threads as u32, 1, 1),
                at.shared as u32,
                self.stream.cu_stream(),
                args,
            )
        }
        .during(&format!("launching {name}"))
    }
}
