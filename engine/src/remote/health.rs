//! Looks at a server now and then: a sick one is taken out, one that is well again let back in.

use super::{pool::Pool, server::Standing};
use std::sync::Weak;

/// Watches server `index` for as long as the pool lives.
pub(super) async fn watch(pool: Weak<Pool>, index: usize) {
    loop {
        let Some(period) = pool.upgrade().map(|pool| pool.options.health_period()) else { return };
        tokio::time::sleep(period).await;
        let Some(pool) = pool.upgrade() else { return };
        look(&pool, index).await;
    }
}

async fn look(pool: &Pool, index: usize) {
    let server = &pool.servers[index];
    let standing = server.state().standing.clone();
    match standing {
        Standing::Updating => {}
        Standing::Serving => {
            let limit = pool.options.health_timeout();
            match server.health(&pool.client, limit).await {
                Err(fault) => pool.failed(server, &fault),
                Ok(()) => {
                    server.state().failures = 0;
                    if let Err(fault) = pool.check_version(server).await {
                        pool.failed(server, &fault);
                    }
                }
            }
        }
        Standing::Out(_) => {
            if let Err(fault) = pool.revive(server).await {
                tracing::debug!(url = server.url, reason = fault.reason(), "still out");
                server.state().standing = Standing::Out(fault.reason());
            }
        }
    }
}
