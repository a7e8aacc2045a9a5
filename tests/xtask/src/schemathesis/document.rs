//! What the committed OpenAPI document offers.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::host;

/// `METHOD /path`, as schemathesis names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) method: String,
    pub(super) path: String,
}

impl Operation {
    /// The name in the path's braces; none of ours has two.
    pub(super) fn parameter(&self) -> Option<&str> {
        let (_, rest) = self.path.split_once('{')?;
        rest.split('}').next()
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}

pub(super) fn path() -> PathBuf {
    host::root().join("docs/openapi/v1.json")
}

pub(super) fn operations() -> Result<Vec<Operation>> {
    let document: Value = serde_json::from_slice(&std::fs::read(path())?)?;
    let paths = document["paths"].as_object().context("the document has no paths")?;
    let operations = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().into_iter().flat_map(|methods| methods.keys());
        methods.map(move |method| Operation { method: method.to_uppercase(), path: path.clone() })
    });
    Ok(operations.collect())
}
