//! CSV as RFC 4180 has it, for answers that people open in a spreadsheet.

use http::HeaderMap;
use http::header::ACCEPT;

/// Adds a line. A cell that a spreadsheet would take for a formula gets a `'` in front (OWASP, "CSV injection"); numbers of
/// ours are never negative.
pub fn push_line(text: &mut String, cells: &[&str]) {
    for (index, cell) in cells.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        let guarded = cell.starts_with(['=', '+', '-', '@', '\t', '\r']);
        let quoted = cell.contains([',', '"', '\r', '\n']);
        if quoted {
            text.push('"');
        }
        if guarded {
            text.push('\'');
        }
        if quoted {
            text.push_str(&cell.replace('"', "\"\""));
            text.push('"');
        } else {
            text.push_str(cell);
        }
    }
    text.push_str("\r\n");
}

/// Whether the caller names `text/csv` and wants nothing of JSON more (RFC 9110 §12.5.1).
#[must_use]
pub fn is_wanted(headers: &HeaderMap) -> bool {
    let mut csv = None;
    let mut json: f32 = 0.0;
    let values = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    for range in values.flat_map(|value| value.split(',')) {
        let mut parts = range.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
        let quality = parts.find_map(|part| part.strip_prefix("q=")).map_or(1.0, |text| text.parse().unwrap_or(0.0));
        match kind.as_str() {
            "text/csv" => csv = Some(quality),
            "application/json" => json = quality,
            _ => {}
        }
    }
    csv.is_some_and(|csv| csv > 0.0 && csv >= json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn cells_are_quoted_and_formulas_are_text() {
        let mut text = String::new();
        push_line(&mut text, &["plain", "a,b", "say \"hi\"", "two\r\nlines", "", "ü"]);
        push_line(&mut text, &["=1+1", "+1", "-1", "@SUM(A1)", "=\"a\",b", "a=b"]);
        let wanted = "plain,\"a,b\",\"say \"\"hi\"\"\",\"two\r\nlines\",,ü\r\n\
                      '=1+1,'+1,'-1,'@SUM(A1),\"'=\"\"a\"\",b\",a=b\r\n";
        assert_eq!(text, wanted);
    }

    #[test]
    fn csv_has_to_be_named() {
        let wanted = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_str(accept).unwrap());
            is_wanted(&headers)
        };
        for yes in ["text/csv", "TEXT/CSV", "text/csv;q=0.5, */*;q=0.1", "application/json;q=0.2, text/csv;q=0.3"] {
            assert!(wanted(yes), "{yes}");
        }
        for no in
            ["*/*", "application/json", "text/*", "text/csv;q=0", "text/csv;q=0.5, application/json", "text/csv;q=x"]
        {
            assert!(!wanted(no), "{no}");
        }
        assert!(!is_wanted(&HeaderMap::new()));
    }
}
