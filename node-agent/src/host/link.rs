//! Link, MTU and addresses of the tunnel's interface, by netlink. The route to the overlay follows from the address's
//! prefix.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context as _;
use futures::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use rtnetlink::{Handle, LinkUnspec};

use crate::interface::Interface;

const TIMEOUT: Duration = Duration::from_secs(5);

/// Makes the link have exactly these addresses and this MTU, and puts it up.
pub(crate) async fn set_up(name: &str, interface: &Interface) -> anyhow::Result<()> {
    with_netlink(async |handle| {
        let index = index_of(&handle, name).await?.context("the tunnel made no such interface")?;
        let link = LinkUnspec::new_with_index(index).mtu(interface.mtu).up().build();
        handle.link().set(link).execute().await.context("the MTU cannot be set or the link be put up")?;
        set_addresses(&handle, index, &interface.addresses).await
    })
    .await
    .with_context(|| format!("cannot set up the interface {name}"))
}

/// Removes the link when it exists.
pub(crate) async fn delete(name: &str) -> anyhow::Result<()> {
    with_netlink(async |handle| {
        if let Some(index) = index_of(&handle, name).await? {
            handle.link().del(index).execute().await?;
        }
        Ok(())
    })
    .await
    .with_context(|| format!("cannot remove the interface {name}"))
}

/// The addresses that the server has elsewhere than on the tunnel, loopback and link-local ones left out.
pub(crate) async fn own_addresses(tunnel: &str) -> anyhow::Result<Vec<IpAddr>> {
    with_netlink(async |handle| {
        let tunnel = index_of(&handle, tunnel).await?;
        let messages: Vec<AddressMessage> = handle.address().get().execute().try_collect().await?;
        let elsewhere = messages.iter().filter(|message| Some(message.header.index) != tunnel);
        let reachable = elsewhere.filter(|message| message.header.scope == AddressScope::Universe);
        Ok(reachable.filter_map(address_of).map(|address| address.addr()).collect())
    })
    .await
    .context("the server's addresses cannot be listed")
}

async fn with_netlink<T>(work: impl AsyncFnOnce(Handle) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let (connection, handle, _) = rtnetlink::new_connection().context("netlink does not answer")?;
    let connection = tokio::spawn(connection);
    let done = tokio::time::timeout(TIMEOUT, work(handle)).await;
    connection.abort();
    done.context("netlink took too long")?
}

async fn index_of(handle: &Handle, name: &str) -> anyhow::Result<Option<u32>> {
    match handle.link().get().match_name(name).execute().try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn set_addresses(handle: &Handle, index: u32, wanted: &[IpNet]) -> anyhow::Result<()> {
    let messages: Vec<AddressMessage> = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute()
        .try_collect()
        .await
        .context("the addresses cannot be listed")?;
    let mut present = Vec::new();
    for message in messages.into_iter().filter(|message| message.header.scope != AddressScope::Link) {
        match address_of(&message) {
            Some(address) if wanted.contains(&address) => present.push(address),
            _ => handle.address().del(message).execute().await.context("an address cannot be removed")?,
        }
    }
    for address in wanted.iter().filter(|address| !present.contains(address)) {
        let mut request = handle.address().add(index, address.addr(), address.prefix_len());
        if address.addr().is_ipv6() {
            // Nobody else can have it: no duplicate address detection, so that it can be used at once.
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.execute().await.with_context(|| format!("the address {address} cannot be added"))?;
    }
    Ok(())
}

fn address_of(message: &AddressMessage) -> Option<IpNet> {
    let address = message.attributes.iter().find_map(|attribute| {
        if let AddressAttribute::Address(address) = attribute { Some(IpAddr::clone(address)) } else { None }
    })?;
    IpNet::new(address, message.header.prefix_len).ok()
}
