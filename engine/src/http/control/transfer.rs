//! Routes that need what is not built in. Each says so, and what to do in its place.

use super::not_built_in;
use super::weights::FROM_DISK;
use crate::http::{AppState, error::ApiError};
use axum::Router;
use axum::routing::any;
use std::sync::Arc;

/// Weights that come over NCCL, IPC or RDMA: vLLM's four phases, TRL's communicator, prime-rl's
/// broadcaster, SGLang's groups and tensors.
const TRANSFER: [&str; 17] = [
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/start_draft_weight_update",
    "/finish_weight_update",
    "/init_communicator",
    "/init_communicator/",
    "/update_named_param",
    "/update_named_param/",
    "/close_communicator",
    "/close_communicator/",
    "/init_broadcaster",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/update_weights_from_distributed",
    "/update_weights_from_tensor",
    "/update_weights_from_ipc",
    "/send_weights_to_remote_instance",
];

const ADAPTERS: [&str; 4] = [
    "/load_lora_adapter",
    "/unload_lora_adapter",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
];

/// All of the routes, but for those that differ from another one in a slash at the end.
pub fn paths() -> impl Iterator<Item = &'static str> {
    let all = TRANSFER.into_iter().chain(ADAPTERS).chain(["/collective_rpc"]);
    all.filter(|path| !path.ends_with('/'))
}

pub(super) fn router() -> Router<Arc<AppState>> {
    let mut router = Router::new().route("/collective_rpc", any(rpc));
    for path in TRANSFER {
        router = router.route(path, any(transfer));
    }
    for path in ADAPTERS {
        router = router.route(path, any(adapter));
    }
    router
}

async fn transfer() -> ApiError {
    not_built_in(format!("weights over NCCL, IPC or RDMA are not built in; {FROM_DISK}"))
}

async fn adapter() -> ApiError {
    not_built_in(format!(
        "LoRA adapters are not built in; merge them into the weights, {FROM_DISK}"
    ))
}

async fn rpc() -> ApiError {
    let message = "there are no workers to call functions of; /pause, /sleep, /update_weights and \
                   the other control routes say what may be asked for";
    not_built_in(message)
}
