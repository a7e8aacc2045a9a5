//! What the control plane says it has answered, by operation and status.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::document::Operation;

const METRIC: &str = "cvault_http_requests_total";

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Answers(BTreeMap<(String, String), BTreeMap<u16, u64>>);

impl Answers {
    /// From the text of `/metrics`.
    pub(super) fn of(text: &str) -> Self {
        let mut answers = Self::default();
        for line in text.lines() {
            let Some((labels, count)) = line.strip_prefix(METRIC).and_then(|rest| rest.rsplit_once(' ')) else {
                continue;
            };
            let label = |name: &str| {
                let (_, rest) = labels.split_once(&format!("{name}=\""))?;
                rest.split_once('"').map(|(value, _)| value.to_owned())
            };
            if let (Some(method), Some(route), Some(status), Ok(count)) =
                (label("method"), label("route"), label("status").and_then(|text| text.parse().ok()), count.parse())
            {
                answers.0.entry((method, route)).or_default().insert(status, count);
            }
        }
        answers
    }

    /// Those that were not yet `before`.
    pub(super) fn since(mut self, before: &Self) -> Self {
        for (operation, statuses) in &mut self.0 {
            for (status, count) in statuses {
                let earlier = before.0.get(operation).and_then(|statuses| statuses.get(status));
                *count = count.saturating_sub(earlier.copied().unwrap_or_default());
            }
        }
        self
    }

    /// Says what was answered.
    ///
    /// # Errors
    /// When an operation was always answered with what says nothing of it.
    pub(super) fn reached(&self, asked: &[&Operation], turned_away: &[u16]) -> Result<()> {
        let mut missed = Vec::new();
        for operation in asked {
            let statuses = self.0.get(&(operation.method.clone(), operation.path.clone()));
            let statuses: BTreeMap<_, _> = statuses.into_iter().flatten().filter(|(_, count)| **count > 0).collect();
            println!("xtask: {operation}: {statuses:?}");
            if statuses.keys().all(|status| turned_away.contains(status)) {
                missed.push(operation.to_string());
            }
        }
        if !missed.is_empty() {
            bail!("schemathesis has not got as far as {}", missed.join(", "));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "# TYPE cvault_http_requests_total counter\n\
        cvault_http_requests_total{route=\"/health\",method=\"GET\",status=\"200\"} 2\n";
    const AFTER: &str = "cvault_http_requests_total{route=\"/health\",method=\"GET\",status=\"200\"} 2\n\
        cvault_http_requests_total{route=\"/metrics\",method=\"GET\",status=\"200\"} 3\n\
        cvault_http_requests_total{route=\"/health\",method=\"GET\",status=\"429\"} 4\n\
        cvault_http_request_duration_seconds_count{route=\"/health\"} 9\n";

    fn operation(path: &str) -> Operation {
        Operation { method: "GET".to_owned(), path: path.to_owned() }
    }

    #[test]
    fn an_operation_is_reached_when_it_was_answered_with_something_of_its_own() {
        let answers = Answers::of(AFTER).since(&Answers::of(BEFORE));
        assert!(answers.reached(&[&operation("/metrics")], &[401, 429]).is_ok());
        for path in ["/health", "/never-asked"] {
            let missed = answers.reached(&[&operation(path)], &[401, 429]).unwrap_err();
            assert!(missed.to_string().contains(path), "{missed}");
        }
        assert!(answers.reached(&[&operation("/health")], &[401]).is_ok());
    }
}
