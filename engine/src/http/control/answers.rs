//! What commands answer with.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// What has become of the engine.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ControlStatus)]
pub struct Status {
    pub status: &'static str,
}

/// Whether the engine is paused.
#[derive(Debug, Serialize, ToSchema)]
pub struct IsPaused {
    pub is_paused: bool,
}

/// Whether memory has been given back.
#[derive(Debug, Serialize, ToSchema)]
pub struct IsSleeping {
    pub is_sleeping: bool,
}

/// Requests that were ended.
#[derive(Debug, Serialize, ToSchema)]
pub struct Aborted {
    pub status: &'static str,
    pub aborted: usize,
}

/// It was done.
#[derive(Debug, Serialize, ToSchema)]
pub struct Done {
    pub success: bool,
    pub message: &'static str,
}

/// The engine draws from new weights.
#[derive(Debug, Serialize, ToSchema)]
pub struct Updated {
    pub status: &'static str,
    pub message: &'static str,
    pub weight_version: String,
}

/// What the weights are called.
#[derive(Debug, Serialize, ToSchema)]
pub struct WeightVersion {
    pub weight_version: String,
}

/// The weights have another name.
#[derive(Debug, Serialize, ToSchema)]
pub struct Renamed {
    pub success: bool,
    pub message: String,
    pub new_version: String,
}

/// What a check of the weights has found.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Checked {
    /// The weights are those that the engine began with.
    Reset { status: &'static str },
    /// 64-bit hashes of the weights, in hexadecimal digits, by name.
    Checksums {
        #[schema(value_type = HashMap<String, String>)]
        checksums: Map<String, Value>,
    },
    /// Names of weights that differ.
    Compared {
        #[serde(rename = "match")]
        matches: bool,
        mismatches: Vec<String>,
    },
}

/// How many engines there are.
#[derive(Debug, Serialize, ToSchema)]
pub struct WorldSize {
    pub world_size: usize,
}

/// As `Updated`, in SGLang's shape.
#[derive(Debug, Serialize, ToSchema)]
pub struct UpdatedFromDisk {
    pub success: bool,
    pub message: String,
    pub num_paused_requests: usize,
    pub weight_version: String,
}

/// As `Status`, in SGLang's shape.
#[derive(Debug, Serialize, ToSchema)]
pub struct Message {
    pub message: &'static str,
    pub status: &'static str,
}

/// As `Aborted`, in SGLang's shape.
#[derive(Debug, Serialize, ToSchema)]
pub struct AbortedRequest {
    pub success: bool,
    pub aborted: usize,
}

/// It was done.
#[derive(Debug, Serialize, ToSchema)]
pub struct Success {
    pub success: bool,
}
