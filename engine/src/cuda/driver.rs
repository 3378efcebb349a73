//! The driver's functions that the kernels need.

use super::{CudaError, library::Library, source::Element};
use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    ptr::{null, null_mut},
    sync::OnceLock,
};

type Code = c_int;
type Handle = *mut c_void;

/// A module that was loaded into a device's context.
#[derive(Debug, Clone, Copy)]
pub struct Module(usize);

/// A kernel of a module.
#[derive(Debug, Clone, Copy)]
pub struct Function(usize);

/// A property of a device.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub enum Attribute {
    /// Streaming multiprocessors.
    Multiprocessors = 16,
    /// First number of the compute capability.
    Major = 75,
    /// Second number of the compute capability.
    Minor = 76,
    /// Bytes of shared memory of a multiprocessor.
    SharedMemory = 81,
    /// Bytes of it that one block may have.
    SharedMemoryOfBlock = 97,
}

/// How much of a kernel is put into a queue, and how.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Blocks along x and y.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
    /// Blocks along x of a cluster; 1: there are none.
    pub cluster: u32,
    /// It may begin before the kernel before it has ended (programmatic dependent launch).
    pub overlaps: bool,
}

/// `CUlaunchConfig`.
#[repr(C)]
struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    stream: Handle,
    attributes: *const LaunchAttribute,
    count: c_uint,
}

/// `CUlaunchAttribute`: an identifier in eight bytes, a value in sixty-four.
#[repr(C, align(8))]
struct LaunchAttribute {
    id: c_int,
    padding: c_int,
    value: [c_int; 16],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`, which is allowed if its value is 1.
const PROGRAMMATIC: c_int = 6;

/// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`: blocks along x, y and z.
const CLUSTER: c_int = 4;

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const DYNAMIC_SHARED: c_int = 8;

/// `CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT`, in percent of what there is.
const SHARED_CARVEOUT: c_int = 9;

/// What is called in libcuda.
pub struct Driver {
    error_string: unsafe extern "C" fn(Code, *mut *const c_char) -> Code,
    attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> Code,
    device: unsafe extern "C" fn(*mut c_int, c_int) -> Code,
    retain: unsafe extern "C" fn(*mut Handle, c_int) -> Code,
    current: unsafe extern "C" fn(*mut Handle) -> Code,
    make_current: unsafe extern "C" fn(Handle) -> Code,
    load: unsafe extern "C" fn(*mut Handle, *const c_void) -> Code,
    function: unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> Code,
    set_attribute: unsafe extern "C" fn(Handle, c_int, c_int) -> Code,
    launch: unsafe extern "C" fn(
        *const LaunchConfig,
        Handle,
        *const *const c_void,
        *const *const c_void,
    ) -> Code,
    name: unsafe extern "C" fn(*mut c_char, c_int, c_int) -> Code,
    describe_boxes: DescribeBoxes,
}

/// `cuTensorMapEncodeTiled`: the map; type and axes of its elements; the address; lengths of the axes, and
/// bytes from one number to the next on all but the first; lengths of a box, and which elements of it are
/// taken; four ways to lay them out.
type DescribeBoxes = unsafe extern "C" fn(
    *mut u64,
    c_int,
    c_uint,
    *mut c_void,
    *const u64,
    *const u64,
    *const c_uint,
    *const c_uint,
    c_int,
    c_int,
    c_int,
    c_int,
) -> Code;

/// `CU_TENSOR_MAP_SWIZZLE_128B`, and `CU_TENSOR_MAP_L2_PROMOTION_L2_256B`.
const SWIZZLED_128: c_int = 3;
const PROMOTED_256: c_int = 3;

impl Driver {
    /// The driver, opened and initialised once.
    ///
    /// # Errors
    /// If there is none, or it finds no device.
    pub fn get() -> Result<&'static Self, CudaError> {
        static DRIVER: OnceLock<Result<Driver, CudaError>> = OnceLock::new();
        DRIVER.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Self, CudaError> {
        let missing = |why| CudaError::Missing {
            what: "the CUDA driver (libcuda.so.1)",
            why,
            advice: "run this where nvidia-smi lists a device, or take device = \"cpu\"",
        };
        let library =
            Library::open(&["libcuda.so.1".into(), "libcuda.so".into()]).map_err(missing)?;
        let (init, driver) = Self::functions(&library).map_err(missing)?;
        // SAFETY: as the driver's documentation has it.
        driver.check("cuInit", unsafe { init(0) }).map_err(|error| missing(error.to_string()))?;
        Ok(driver)
    }

    #[allow(clippy::type_complexity)]
    fn functions(
        library: &Library,
    ) -> Result<(unsafe extern "C" fn(c_uint) -> Code, Self), String> {
        // SAFETY: the signatures are those of cuda.h, CUDA 13.0; the names are of the same version.
        unsafe {
            let driver = Self {
                error_string: library.function("cuGetErrorString")?,
                attribute: library.function("cuDeviceGetAttribute")?,
                device: library.function("cuDeviceGet")?,
                retain: library.function("cuDevicePrimaryCtxRetain")?,
                current: library.function("cuCtxGetCurrent")?,
                make_current: library.function("cuCtxSetCurrent")?,
                load: library.function("cuModuleLoadData")?,
                function: library.function("cuModuleGetFunction")?,
                set_attribute: library.function("cuFuncSetAttribute")?,
                launch: library.function("cuLaunchKernelEx")?,
                name: library.function("cuDeviceGetName")?,
                describe_boxes: library.function("cuTensorMapEncodeTiled")?,
            };
            Ok((library.function("cuInit")?, driver))
        }
    }

    fn check(&self, call: &'static str, code: Code) -> Result<(), CudaError> {
        if code == 0 {
            return Ok(());
        }
        let mut text = null();
        // SAFETY: `text` is a place for the answer: a C string that lives for ever, or null.
        let text = unsafe {
            let known = (self.error_string)(code, &raw mut text) == 0 && !text.is_null();
            known.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        };
        Err(CudaError::Driver { call, text: text.unwrap_or_else(|| format!("error {code}")) })
    }

    /// A property of device `index`.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn attribute(&self, index: usize, attribute: Attribute) -> Result<i32, CudaError> {
        let (mut device, mut value) = (0, 0);
        // SAFETY: both are places for the answers.
        unsafe {
            self.check("cuDeviceGet", (self.device)(&raw mut device, index as c_int))?;
            let code = (self.attribute)(&raw mut value, attribute as c_int, device);
            self.check("cuDeviceGetAttribute", code)?;
        }
        Ok(value)
    }

    /// What device `index` is called.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn name(&self, index: usize) -> Result<String, CudaError> {
        let (mut device, mut name) = (0, [0; 256]);
        // SAFETY: places for the answers, the second of as many bytes as are said.
        unsafe {
            self.check("cuDeviceGet", (self.device)(&raw mut device, index as c_int))?;
            let code = (self.name)(name.as_mut_ptr(), name.len() as c_int - 1, device);
            self.check("cuDeviceGetName", code)?;
            Ok(CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned())
        }
    }

    /// Makes the context that libtorch uses on device `index` this thread's, if it has none yet.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn enter(&self, index: usize) -> Result<(), CudaError> {
        let (mut device, mut context) = (0, null_mut());
        // SAFETY: places for answers. The primary context is retained for good.
        unsafe {
            self.check("cuCtxGetCurrent", (self.current)(&raw mut context))?;
            if !context.is_null() {
                return Ok(());
            }
            self.check("cuDeviceGet", (self.device)(&raw mut device, index as c_int))?;
            self.check("cuDevicePrimaryCtxRetain", (self.retain)(&raw mut context, device))?;
            self.check("cuCtxSetCurrent", (self.make_current)(context))
        }
    }

    /// Loads compiled code into this thread's context, for good.
    ///
    /// # Errors
    /// Code for another device, or what else the driver refuses.
    pub fn load(&self, cubin: &[u8]) -> Result<Module, CudaError> {
        let mut module = null_mut();
        // SAFETY: a cubin says how long it is.
        self.check("cuModuleLoadData", unsafe {
            (self.load)(&raw mut module, cubin.as_ptr().cast())
        })?;
        Ok(Module(module as usize))
    }

    /// The module's kernel of this name, with so much dynamic shared memory, in bytes. All kernels want
    /// memory divided alike between shared memory and cache: a processor that has to divide it anew
    /// first ends what it runs.
    ///
    /// # Errors
    /// If it has none, or the device has not so much.
    pub fn function(&self, module: Module, name: &str, shared: u32) -> Result<Function, CudaError> {
        let mut function = null_mut();
        let name = CString::new(name).expect("kernels have plain names");
        // SAFETY: a module that was loaded, a C string, and a place for the answer.
        unsafe {
            let code = (self.function)(&raw mut function, module.0 as Handle, name.as_ptr());
            self.check("cuModuleGetFunction", code)?;
            let code = (self.set_attribute)(function, SHARED_CARVEOUT, 100);
            self.check("cuFuncSetAttribute", code)?;
            // More than 48 KiB, what the kernel has besides included, are had by asking alone.
            if shared > 0 {
                let code = (self.set_attribute)(function, DYNAMIC_SHARED, shared as c_int);
                self.check("cuFuncSetAttribute", code)?;
            }
        }
        Ok(Function(function as usize))
    }

    /// Describes a matrix of 16-bit numbers, `columns` by `rows` of them one after the other, that is read in
    /// boxes of 64 or fewer columns by so many rows: their rows' lines of 16 bytes lie where the tensor cores
    /// look for them.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn describe_boxes(
        &self,
        map: &mut [u64; 16],
        element: Element,
        address: usize,
        ([columns, rows], of_box): ([u64; 2], [u32; 2]),
    ) -> Result<(), CudaError> {
        // CU_TENSOR_MAP_DATA_TYPE_FLOAT16 and _BFLOAT16.
        let kind = if element == Element::F16 { 6 } else { 9 };
        let (lengths, apart, each) = ([columns, rows], [2 * columns], [1; 2]);
        // SAFETY: a place for the map, at a multiple of 64, and arrays of as many numbers as there are axes,
        // or one less.
        let code = unsafe {
            (self.describe_boxes)(
                map.as_mut_ptr(),
                kind,
                2,
                address as *mut c_void,
                lengths.as_ptr(),
                apart.as_ptr(),
                of_box.as_ptr(),
                each.as_ptr(),
                0,
                SWIZZLED_128,
                PROMOTED_256,
                0,
            )
        };
        self.check("cuTensorMapEncodeTiled", code)
    }

    /// Puts a kernel with one argument into the queue of `stream`.
    ///
    /// # Errors
    /// What the driver refuses; also the error of an earlier kernel.
    ///
    /// # Safety
    /// `argument` is of the type that the kernel takes, and what it points to is on the device, as
    /// large as the kernel takes it to be, until the kernel has run.
    pub unsafe fn launch<A>(
        &self,
        function: Function,
        extent: Extent,
        stream: *mut c_void,
        argument: &A,
    ) -> Result<(), CudaError> {
        let arguments = [std::ptr::from_ref(argument).cast::<c_void>()];
        let attribute = |id, first: [c_int; 3]| {
            let mut value = [0; 16];
            value[..3].copy_from_slice(&first);
            LaunchAttribute { id, padding: 0, value }
        };
        let all = [
            attribute(CLUSTER, [extent.cluster as c_int, 1, 1]),
            attribute(PROGRAMMATIC, [1, 0, 0]),
        ];
        let attributes = &all[usize::from(extent.cluster == 1)..1 + usize::from(extent.overlaps)];
        let config = LaunchConfig {
            grid: [extent.grid[0], extent.grid[1], 1],
            block: [extent.threads, 1, 1],
            shared: extent.shared,
            stream,
            attributes: attributes.as_ptr(),
            count: attributes.len() as c_uint,
        };
        // SAFETY: the driver copies the configuration and the argument before it returns.
        self.check("cuLaunchKernelEx", unsafe {
            (self.launch)(&raw const config, function.0 as Handle, arguments.as_ptr(), null())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// As cuda.h of CUDA 13.0 has them.
    #[test]
    fn configurations_lie_as_the_driver_reads_them() {
        assert_eq!(size_of::<LaunchAttribute>(), 72);
        assert_eq!(offset_of!(LaunchAttribute, value), 8);
        assert_eq!(size_of::<LaunchConfig>(), 56);
        assert_eq!(offset_of!(LaunchConfig, shared), 24);
        assert_eq!(offset_of!(LaunchConfig, stream), 32);
        assert_eq!(offset_of!(LaunchConfig, attributes), 40);
        assert_eq!(offset_of!(LaunchConfig, count), 48);
    }
}
