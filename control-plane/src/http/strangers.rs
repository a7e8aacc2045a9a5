//! Bodies of callers without credentials: whoever sends them slowly takes no more than a share of the API's places.

use std::sync::Arc;

use cvault_types::ErrorCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Problem;
use super::router::MAX_IN_FLIGHT;
use super::serve::Peer;
use crate::network::{Network, Place, Places};

/// Bodies of one network that are read at once: the streams of one connection of HTTP/2.
const OF_A_NETWORK: u32 = 100;

/// One for the process.
#[derive(Debug)]
pub struct Strangers {
    all: Arc<Semaphore>,
    networks: Places,
}

/// Held while a body is read.
#[derive(Debug)]
pub struct Reading {
    _all: OwnedSemaphorePermit,
    _network: Option<Place>,
}

impl Default for Strangers {
    fn default() -> Self {
        Self::at_most(MAX_IN_FLIGHT / 2, OF_A_NETWORK)
    }
}

impl Strangers {
    fn at_most(all: usize, of_a_network: u32) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), networks: Places::new(of_a_network) }
    }

    /// # Errors
    /// `RATE_LIMITED` for a network that sends too many bodies, `OVERLOADED` when all networks do.
    pub fn take(&self, peer: Peer) -> Result<Reading, Problem> {
        let network = match peer.ip().map(Network::of) {
            None => None,
            Some(network) => Some(self.networks.take(network).ok_or_else(|| {
                Problem::new(ErrorCode::RateLimited)
                    .detail("Too many requests of this network are arriving at this moment.")
                    .retry_after(1)
            })?),
        };
        let all = Arc::clone(&self.all).try_acquire_owned();
        let all = all.map_err(|_| Problem::new(ErrorCode::Overloaded).retry_after(1))?;
        Ok(Reading { _all: all, _network: network })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_has_its_share_and_all_of_them_theirs() {
        let strangers = Strangers::at_most(3, 2);
        let take = |last: u8| strangers.take(Peer::from(std::net::IpAddr::from([192, 0, 2, last])));
        let held = (take(1).unwrap(), take(1).unwrap());
        assert_eq!(take(1).unwrap_err().code(), ErrorCode::RateLimited);
        let _other = take(2).unwrap();
        assert_eq!(take(3).unwrap_err().code(), ErrorCode::Overloaded);
        drop(held);
        assert!(take(3).is_ok() && take(1).is_ok());
    }
}
