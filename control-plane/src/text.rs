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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_of_every_script_are_harmless_and_what_nobody_sees_is_not() {
        for text in ["Ноутбук", "老师的电脑", "O'Brien <x> \"y\" #1 %s ${z}", "n\u{303}", "📱", "שלום", "مرحبا", "한글"]
        {
            assert!(!text.contains(is_misleading), "{text}");
        }
        for c in ['\0', '\n', '\u{1b}', '\u{85}', '\u{ad}', '\u{200b}', '\u{2028}', '\u{202e}', '\u{2066}', '\u{e0041}']
        {
            assert!(is_misleading(c), "{c:?}");
        }
        assert!(is_misleading('\u{ffff}') && is_misleading('\u{10fffe}'));
    }
}
