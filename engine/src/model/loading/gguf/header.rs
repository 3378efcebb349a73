//! The head of a GGUF file: metadata, and where each tensor lies.
//!
//! Every length in the file is checked against what is left of it before anything of that length
//! is allocated, so that a damaged file is an error and never takes the process down.

use super::super::LoadError;
use super::values::{Metadata, Value};
use candle_core::quantized::GgmlDType;
use std::{
    collections::HashMap,
    fs::File,
    io::{BufReader, Read},
    path::Path,
};

/// Where a tensor lies, and what it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorInfo {
    pub dtype: GgmlDType,
    /// Outermost dimension first, as torch has it.
    pub shape: Vec<usize>,
    /// Of its first byte, from the beginning of the file.
    pub offset: u64,
}

/// The head of a file.
#[derive(Debug)]
pub(super) struct Header {
    pub metadata: Metadata,
    pub tensors: HashMap<String, TensorInfo>,
}

impl Header {
    /// Reads the head of `file` and checks that every tensor is within the file.
    pub fn read(file: &File, path: &Path) -> Result<Self, LoadError> {
        let length = file.metadata().map_err(LoadError::io(path))?.len();
        let mut reader = Reader { inner: BufReader::new(file), length, left: length };
        reader.header().map_err(|problem| match problem {
            Problem::CutOff => {
                LoadError::corrupt(path, "is cut off, or damaged, in its header; fetch it again")
            }
            Problem::Io(source) => LoadError::Io { path: path.to_path_buf(), source },
            Problem::Malformed(reason) => LoadError::corrupt(path, reason),
            Problem::Unsupported(error) => error,
        })
    }
}

/// What can be wrong with a header.
enum Problem {
    CutOff,
    Io(std::io::Error),
    Malformed(String),
    Unsupported(LoadError),
}

type Parsed<T> = Result<T, Problem>;

/// Most dimensions of a tensor.
const MAX_DIMENSIONS: u32 = 4;

struct Reader<R> {
    inner: R,
    length: u64,
    left: u64,
}

impl<R: Read> Reader<R> {
    fn header(&mut self) -> Parsed<Header> {
        if self.bytes()? != *b"GGUF" {
            return Err(Problem::Malformed("is not a GGUF file".to_string()));
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            let found = version.to_string();
            return Err(Problem::Unsupported(LoadError::unsupported(
                "GGUF version",
                found,
                "2, 3",
            )));
        }
        let (tensor_count, value_count) = (self.u64()?, self.u64()?);
        let mut metadata = Metadata::default();
        for _ in 0..value_count {
            let key = self.text()?;
            let kind = self.u32()?;
            let value = self.value(kind)?;
            metadata.0.insert(key, value);
        }
        let mut tensors = HashMap::new();
        for _ in 0..tensor_count {
            let (name, info) = self.tensor_info()?;
            tensors.insert(name, info);
        }
        self.place_tensors(&metadata, &mut tensors)?;
        Ok(Header { metadata, tensors })
    }

    /// Turns offsets into the data section into offsets into the file, and checks the ends.
    fn place_tensors(
        &self,
        metadata: &Metadata,
        tensors: &mut HashMap<String, TensorInfo>,
    ) -> Parsed<()> {
        let alignment =
            metadata.optional_count("general.alignment").map_err(Problem::Unsupported)?;
        let alignment = alignment.unwrap_or(32).max(1) as u64;
        let data = (self.length - self.left).next_multiple_of(alignment);
        for (name, info) in tensors {
            let end = info.byte_size(&info.shape).and_then(|size| {
                info.offset = info.offset.checked_add(data)?;
                info.offset.checked_add(size as u64)
            });
            let Some(end) = end else {
                let reason = format!("gives tensor {name} a size that it cannot have");
                return Err(Problem::Malformed(reason));
            };
            if end > self.length {
                let reason = format!(
                    "is cut off: tensor {name} ends at byte {end}, but the file has {}; fetch it \
                     again",
                    self.length
                );
                return Err(Problem::Malformed(reason));
            }
        }
        Ok(())
    }

    fn tensor_info(&mut self) -> Parsed<(String, TensorInfo)> {
        let name = self.text()?;
        let rank = self.u32()?;
        if rank > MAX_DIMENSIONS {
            let reason = format!("gives tensor {name} {rank} dimensions; there are at most 4");
            return Err(Problem::Malformed(reason));
        }
        let mut shape = Vec::new();
        for _ in 0..rank {
            let size = usize::try_from(self.u64()?).map_err(|_| Problem::CutOff)?;
            shape.insert(0, size);
        }
        let dtype = dtype(self.u32()?, &name).map_err(Problem::Unsupported)?;
        Ok((name, TensorInfo { dtype, shape, offset: self.u64()? }))
    }

    fn value(&mut self, kind: u32) -> Parsed<Value> {
        match kind {
            9 => self.list(),
            _ => self.scalar(kind),
        }
    }

    fn list(&mut self) -> Parsed<Value> {
        let kind = self.u32()?;
        let length = self.u64()?;
        // Every item takes at least a byte, so a longer list is not in the file.
        if length > self.left {
            return Err(Problem::CutOff);
        }
        let mut items = Vec::new();
        for _ in 0..length {
            items.push(self.scalar(kind)?);
        }
        Ok(Value::List(items))
    }

    fn scalar(&mut self, kind: u32) -> Parsed<Value> {
        Ok(match kind {
            0 => Value::Integer(u8::from_le_bytes(self.bytes()?).into()),
            1 => Value::Integer(i8::from_le_bytes(self.bytes()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::Float(decimal(f32::from_le_bytes(self.bytes()?))),
            7 => Value::Flag(self.bytes::<1>()? != [0]),
            8 => Value::Text(self.text()?),
            // Numbers beyond i64 are seeds and the like; none is read here.
            10 => Value::Integer(i64::try_from(self.u64()?).unwrap_or(i64::MAX)),
            11 => Value::Integer(i64::from_le_bytes(self.bytes()?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            other => {
                return Err(Problem::Malformed(format!("has a metadata value of type {other}")));
            }
        })
    }

    fn text(&mut self) -> Parsed<String> {
        let length = self.u64()?;
        if length > self.left {
            return Err(Problem::CutOff);
        }
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn bytes<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Parsed<()> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or(Problem::CutOff)?;
        self.inner.read_exact(bytes).map_err(Problem::Io)
    }
}

impl TensorInfo {
    /// Bytes that a tensor of this type and of `shape` takes; none if blocks do not divide its
    /// rows, or if it is too large to be.
    pub fn byte_size(&self, shape: &[usize]) -> Option<usize> {
        let elements = shape.iter().try_fold(1usize, |product, n| product.checked_mul(*n))?;
        let block = self.dtype.block_size();
        let whole_blocks = shape.last().is_none_or(|row| row.is_multiple_of(block));
        whole_blocks.then_some(elements / block)?.checked_mul(self.dtype.type_size())
    }
}

/// The number that the f32 was written for: 1e-5, not 9.999999747378752e-6.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// The tensor types that can be dequantised, by their number in the file.
fn dtype(number: u32, name: &str) -> Result<GgmlDType, LoadError> {
    Ok(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        other => {
            return Err(LoadError::unsupported(
                format!("GGUF type of tensor {name}"),
                other.to_string(),
                "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K",
            ));
        }
    })
}
