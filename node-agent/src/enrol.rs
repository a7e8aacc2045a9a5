//! `enroll`: exchanges a single-use token for this server's identity.
//!
//! The keys are made here and never leave. Nothing replaces an existing identity before the control plane has answered.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use cvault_dataplane::{counters, journal};
use cvault_node_protocol::token::EnrolToken;
use cvault_node_protocol::v1;

use crate::clock::Moment;
use crate::connect::{self, ConnectError};
use crate::enrolment::{self, Enrolment};
use crate::state_dir::StateDir;
use crate::{meter, store};

const TIMEOUT: Duration = Duration::from_secs(15);

/// What `enroll` was asked to do.
#[derive(clap::Args)]
pub(crate) struct EnrolArgs {
    /// Where the control plane listens for servers.
    #[arg(long, value_name = "HOST:PORT")]
    control_plane: String,
    /// The token that `cvault-control-plane admin server create` printed; `-` reads it from standard input.
    #[arg(long)]
    token: String,
    /// Where this server keeps its keys and its state.
    #[arg(long, default_value = crate::DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Replace the identity of a server that is enrolled already.
    #[arg(long)]
    force: bool,
}

pub(crate) async fn enrol(args: &EnrolArgs) -> anyhow::Result<Enrolment> {
    let token = parse_token(&args.token)?;
    check_address(&args.control_plane)?;
    let dir = StateDir::open(&args.state_dir)?;
    if enrolment::exists(&dir) && !args.force {
        anyhow::bail!(
            "this server is enrolled already ({}): give --force to replace its identity, or another --state-dir",
            args.state_dir.display()
        );
    }
    let keys = enrolment::pending_keys(&dir, token.id)?;
    let answer = ask(&args.control_plane, &token, &keys).await?;
    let enrolment = Enrolment {
        server_id: answer.server_id.as_ref().try_into().context("the control plane answered without a server id")?,
        server_name: answer.server_name,
        control_plane: args.control_plane.clone(),
        pin: token.control_plane_pin,
        keys,
    };
    set_old_state_aside(&dir, enrolment.server_id)?;
    enrolment::save(&dir, token.id, &enrolment)?;
    Ok(enrolment)
}

/// What another server left here must not be served, billed or acknowledged as this one's.
fn set_old_state_aside(dir: &StateDir, server_id: [u8; 16]) -> anyhow::Result<()> {
    if matches!(enrolment::load(dir), Ok(Some(old)) if old.server_id == server_id) || !enrolment::exists(dir) {
        return Ok(());
    }
    let mut files: Vec<_> =
        [store::FILE, meter::SPOOL_FILE, journal::FILE_NAME, counters::FILE_NAME].map(|name| dir.file(name)).into();
    files.extend(counters::previous_files(dir.path())?);
    let wall_ms = Moment::now().wall_ms;
    for name in files.iter().filter(|file| file.exists()).filter_map(|file| file.file_name()?.to_str()) {
        dir.set_aside(name, "replaced", wall_ms).with_context(|| format!("the old {name} cannot be renamed"))?;
    }
    Ok(())
}

fn parse_token(argument: &str) -> anyhow::Result<EnrolToken> {
    if argument != "-" {
        return Ok(EnrolToken::parse(argument)?);
    }
    let mut line = zeroize::Zeroizing::new(String::new());
    std::io::stdin().read_line(&mut line).context("the token cannot be read from standard input")?;
    Ok(EnrolToken::parse(&line)?)
}

async fn ask(address: &str, token: &EnrolToken, keys: &enrolment::Keys) -> anyhow::Result<v1::EnrollResponse> {
    let connected = connect::connect(address, &keys.tls, token.control_plane_pin).await;
    let mut gateway = connected.map_err(|error| {
        if let ConnectError::Pin { .. } = error {
            anyhow::anyhow!(
                "the control plane at {address} is not the one that made this token (its key differs): check --control-plane"
            )
        } else {
            anyhow::Error::new(error)
                .context("the control plane cannot be reached: check --control-plane and the firewall, then run this again")
        }
    })?;
    let request = v1::EnrollRequest {
        token: token.expose().to_string(),
        wireguard_public_key: keys.wireguard_public().to_vec().into(),
        agent_version: crate::VERSION.to_owned(),
    };
    let answered = tokio::time::timeout(TIMEOUT, gateway.enroll(request)).await;
    match answered.context("the control plane did not answer: run this again, with the same token")? {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) => Err(refusal(&status)),
    }
}

fn refusal(status: &tonic::Status) -> anyhow::Error {
    use tonic::Code;
    let said = status.message();
    match status.code() {
        Code::Unauthenticated
        | Code::PermissionDenied
        | Code::NotFound
        | Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::AlreadyExists => anyhow::anyhow!(
            "the control plane refused the token ({said}): make a new one with `cvault-control-plane admin server create`"
        ),
        code @ (Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss) => {
            anyhow::anyhow!("the control plane could not answer ({code}: {said}): run this again, with the same token")
        }
    }
}

fn check_address(address: &str) -> anyhow::Result<()> {
    let port =
        address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
    anyhow::ensure!(
        port.is_some_and(|port| port != 0),
        "--control-plane needs HOST:PORT, for example cp.example.com:8443 or [2001:db8::1]:8443"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_port_is_refused() {
        assert!(check_address("cp.example.com:8443").is_ok() && check_address("[2001:db8::1]:8443").is_ok());
        for wrong in ["cp.example.com", "cp.example.com:", ":8443", "cp:0", "https://cp"] {
            assert!(check_address(wrong).is_err(), "{wrong}");
        }
    }
}
