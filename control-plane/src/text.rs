//! Which texts may be kept to be shown again: in a table, a terminal, a log or a configuration.

/// Control characters, line and paragraph separators, bidirectional controls (UAX #9), zero-width and interlinear
/// marks, letters and hyphens that nobody sees, and code points that are no characters.
#[must_use]
pub fn is_misleading(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
        || (u32::from(c) & 0xfffe) == 0xfffe
}

/// Whether a text has any of these. Joiners and non-joiners may stand between two letters of scripts that are written with
/// them (Persian, Hindi) and between the parts of an emoji; between letters of ASCII nobody would see them.
#[must_use]
pub fn misleads(text: &str) -> bool {
    let mut before = None;
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let joins = |other: Option<char>| other.is_some_and(|other| !other.is_ascii() && !is_misleading(other));
        let is_joined = matches!(c, '\u{200c}' | '\u{200d}') && joins(before) && joins(rest.peek().copied());
        if is_misleading(c) && !is_joined {
            return true;
        }
        before = Some(c);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_of_every_script_are_harmless_and_what_nobody_sees_is_not() {
        for text in [
            "Ноутбук",
            "老师的电脑",
            "O'Brien <x> \"y\" #1 %s ${z}",
            "n\u{303}",
            "📱",
            "שלום",
            "مرحبا",
            "한글",
            "می\u{200c}خواهم",
            "क्\u{200d}ष",
            "👩\u{200d}💻",
            "",
        ] {
            assert!(!misleads(text), "{text}");
        }
        for text in
            ["pay\u{200d}pal", "\u{200d}م", "م\u{200c}", "م\u{200c}\u{200d}م", "é\u{200d}a", "م\u{200b}م", "a\nb"]
        {
            assert!(misleads(text), "{text:?}");
        }
        for c in ['\0', '\n', '\u{1b}', '\u{85}', '\u{ad}', '\u{200b}', '\u{2028}', '\u{202e}', '\u{2066}', '\u{e0041}']
        {
            assert!(is_misleading(c), "{c:?}");
        }
        assert!(is_misleading('\u{ffff}') && is_misleading('\u{10fffe}'));
    }
}
