//! `cvault-control-plane`: reads the command line, starts logging, and calls the library.
#![forbid(unsafe_code)]

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use cvault_control_plane::auth::passwords;
use cvault_control_plane::config::{self, Config, LogConfig, LogFormat, Overrides, ServeConfig, environment};
use cvault_control_plane::http::{openapi, problem};
use cvault_control_plane::{admin, db, dev, serve, telemetry};

/// CVault's control plane: tenants, users, devices and servers of a VPN platform
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the HTTP API and the gateway of the server agents; configured by the environment (see `config`)
    Serve,
    /// A whole platform from nothing: embedded PostgreSQL, a demo tenant, and then as `serve`
    Dev {
        /// Folder of the database and the keys; made when it is not there
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
        /// Address of the HTTP API, instead of CVAULT_LISTEN
        #[arg(long, value_name = "ADDRESS")]
        listen: Option<SocketAddr>,
        /// Address of the gateway for server agents, instead of CVAULT_NODE_LISTEN
        #[arg(long, value_name = "ADDRESS")]
        node_listen: Option<SocketAddr>,
        /// host:port under which agents reach the gateway, instead of CVAULT_NODE_ENDPOINT
        #[arg(long, value_name = "HOST:PORT")]
        node_endpoint: Option<String>,
    },
    /// Create the roles, if that is allowed, and bring the schema up to date
    Migrate,
    /// Tenants, pools, servers, tokens, the ledger
    Admin(admin::AdminArgs),
    /// What `serve` and `dev` start for themselves
    #[command(hide = true, name = passwords::COMMAND)]
    PasswordChecks,
    /// Print the OpenAPI document (docs/openapi/v1.json)
    Openapi,
    /// Print every environment variable and its meaning (docs/operations/configuration.md)
    Config,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentences) => {
            for sentence in sentences {
                eprintln!("error: {sentence}");
            }
            ExitCode::FAILURE
        }
    }
}

/// What went wrong, a sentence each.
type Sentences = Vec<String>;

fn run(command: Command) -> Result<(), Sentences> {
    let mut log = LogConfig::from_env(&environment).map_err(|faults| faults.0)?;
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(|error| one(&error));
    match command {
        Command::Serve => {
            let config = ServeConfig::from_env(&environment).map_err(|faults| faults.0)?;
            telemetry::start(log);
            runtime()?.block_on(serve::run(config)).map_err(|error| one(&error))
        }
        Command::Dev { data_dir, listen, node_listen, node_endpoint } => {
            let overrides = Overrides { listen, node_listen, node_endpoint };
            let config = Config::from_env(&environment, &overrides).map_err(|faults| faults.0)?;
            telemetry::start(log);
            let pg_bin = environment("CVAULT_PG_BIN").map(PathBuf::from);
            runtime()?.block_on(dev::run(config, &data_dir, pg_bin)).map_err(|error| one(&error))
        }
        Command::Migrate => {
            let owner = config::owner_database(&environment).map_err(|faults| faults.0)?;
            telemetry::start(log);
            runtime()?.block_on(db::migrate(&owner)).map_err(|error| one(&error))
        }
        Command::Admin(args) => {
            // a person reads the answer on the same terminal
            if environment("CVAULT_LOG_FORMAT").is_none() {
                log.format = LogFormat::Text;
            }
            telemetry::start(log);
            runtime()?
                .block_on(admin::run(args, &environment))
                .map_err(|error| if let admin::AdminError::Config(faults) = error { faults.0 } else { one(&error) })
        }
        Command::PasswordChecks => {
            let single =
                tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(|error| one(&error))?;
            single.block_on(passwords::answer_all()).map_err(|error| one(&error))
        }
        Command::Openapi => print(openapi::document_text()),
        Command::Config => print(&config::markdown()),
    }
}

fn one(error: &dyn std::error::Error) -> Sentences {
    vec![problem::chain(error)]
}

fn print(text: &str) -> Result<(), Sentences> {
    std::io::stdout().lock().write_all(text.as_bytes()).map_err(|error| one(&error))
}
