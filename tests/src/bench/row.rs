//! One line of a bench: a measure, our figure, the best peer's beside it, what it must be and whether it is.

use std::fmt;

use serde_json::{Value, json};

/// Which of two figures is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    More,
    Less,
}

/// What a figure must be: by itself, or as a multiple of the peer's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Must {
    AtLeast(f64),
    AtMost(f64),
    TimesAtLeast(f64),
    TimesAtMost(f64),
}

impl fmt::Display for Must {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(limit) => write!(f, ">= {limit}"),
            Self::AtMost(limit) => write!(f, "<= {limit}"),
            Self::TimesAtLeast(limit) => write!(f, ">= {limit}x"),
            Self::TimesAtMost(limit) => write!(f, "<= {limit}x"),
        }
    }
}

/// A figure that could not be taken is absent, and so is everything that follows from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub measure: String,
    pub unit: String,
    pub ours: Option<f64>,
    pub peer: Option<String>,
    pub peer_figure: Option<f64>,
    pub must: Option<Must>,
    /// False where the sizes of the run are not those the demand is made for.
    pub judged: bool,
}

impl Row {
    /// A figure without a peer and without a demand.
    #[must_use]
    pub fn figure(measure: &str, unit: &str, ours: f64) -> Self {
        Self {
            measure: measure.to_owned(),
            unit: unit.to_owned(),
            ours: Some(ours),
            peer: None,
            peer_figure: None,
            must: None,
            judged: true,
        }
    }

    /// Ours divided by the peer's.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        let ratio = self.ours? / self.peer_figure?;
        ratio.is_finite().then_some(ratio)
    }

    #[must_use]
    pub fn met(&self) -> Option<bool> {
        if !self.judged {
            return None;
        }
        Some(match self.must? {
            Must::AtLeast(limit) => self.ours? >= limit,
            Must::AtMost(limit) => self.ours? <= limit,
            Must::TimesAtLeast(limit) => self.ratio()? >= limit,
            Must::TimesAtMost(limit) => self.ratio()? <= limit,
        })
    }

    /// The object of `--json`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "measure": self.measure,
            "unit": self.unit,
            "ours": self.ours,
            "peer": self.peer,
            "peer_figure": self.peer_figure,
            "ratio": self.ratio(),
            "must": self.must.map(|must| must.to_string()),
            "met": self.met(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ours: Option<f64>, peer: Option<f64>, must: Must) -> Row {
        Row {
            measure: "tcp_1_stream".to_owned(),
            unit: "Mbit/s".to_owned(),
            ours,
            peer: peer.map(|_| "wireguard-go 0.0.1".to_owned()),
            peer_figure: peer,
            must: Some(must),
            judged: true,
        }
    }

    #[test]
    fn a_line_has_the_fields_that_scripts_read() {
        let line = row(Some(3900.0), Some(3000.0), Must::TimesAtLeast(1.3)).to_json().to_string();
        let wanted = r#"{"measure":"tcp_1_stream","met":true,"must":">= 1.3x","ours":3900.0,"peer":"wireguard-go 0.0.1","peer_figure":3000.0,"ratio":1.3,"unit":"Mbit/s"}"#;
        let parsed: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(parsed, serde_json::from_str::<Value>(wanted).unwrap());
        assert!(!line.contains('\n'));
    }

    #[test]
    fn a_demand_is_met_by_the_figure_itself_or_by_the_ratio() {
        assert_eq!(row(Some(0.6), Some(4.5), Must::AtMost(0.5)).met(), Some(false));
        assert_eq!(row(Some(0.4), None, Must::AtMost(0.5)).met(), Some(true));
        assert_eq!(row(Some(6000.0), None, Must::AtLeast(6000.0)).met(), Some(true));
        assert_eq!(row(Some(4.7), Some(4.6), Must::TimesAtMost(1.0)).met(), Some(false));
        assert_eq!(row(Some(4.5), Some(4.6), Must::TimesAtMost(1.0)).met(), Some(true));
    }

    #[test]
    fn nothing_is_claimed_of_what_was_not_measured_or_not_at_full_size() {
        assert_eq!(row(None, Some(4.6), Must::AtMost(1.0)).met(), None);
        assert_eq!(row(Some(1.0), None, Must::TimesAtMost(1.0)).met(), None);
        assert_eq!(row(Some(0.0), Some(0.0), Must::TimesAtMost(1.0)).to_json()["ratio"], Value::Null);
        let small = Row { judged: false, ..row(Some(0.1), Some(4.5), Must::AtMost(0.5)) };
        assert_eq!((small.met(), small.to_json()["must"].as_str()), (None, Some("<= 0.5")));
    }
}
