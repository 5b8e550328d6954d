//! Numbers and times as a person reads them.

use std::time::Duration;

/// A metric's value, about four significant digits: `0.8659`, `123.5`, `1.250e-5`, `NaN`.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() || value == 0.0 {
        format!("{value}")
    } else if !(1e-3..1e6).contains(&size) {
        format!("{value:.3e}")
    } else if size < 100.0 {
        format!("{value:.4}")
    } else {
        format!("{value:.1}")
    }
}

/// A count with separators: `32,967`.
pub(super) fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A rate in few characters: `873`, `14.2k`, `1.3M`.
pub(super) fn short(rate: f64) -> String {
    if rate < 999.5 {
        format!("{rate:.0}")
    } else if rate < 999_950.0 {
        format!("{:.1}k", rate / 1e3)
    } else {
        format!("{:.1}M", rate / 1e6)
    }
}

/// A time that is over: `9.8 s`, `2 min 05 s`, `1 h 02 min`.
pub(super) fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    if time.as_secs_f64() < 119.95 {
        format!("{:.1} s", time.as_secs_f64())
    } else if seconds < 3600 {
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    } else {
        format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60)
    }
}

/// A time that is short: `12.3 ms`, `1.25 s`, `480 µs`.
pub(super) fn short_time(seconds: f64) -> String {
    if seconds >= 1.0 {
        format!("{seconds:.2} s")
    } else if seconds >= 9.995e-4 {
        format!("{:.1} ms", seconds * 1e3)
    } else {
        format!("{:.0} µs", seconds * 1e6)
    }
}

/// A running clock: `0:09`, `1:02:03`.
pub(super) fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_short() {
        let cases = [0.0, 0.86593, -0.25, 12.5, 123.456, 999_999.0, 1e6, 1.25e-5, f64::NAN, f64::NEG_INFINITY];
        let shown: Vec<String> = cases.into_iter().map(number).collect();
        let expected = ["0", "0.8659", "-0.2500", "12.5000", "123.5", "999999.0", "1.000e6", "1.250e-5", "NaN", "-inf"];
        assert_eq!(shown, expected);
    }

    #[test]
    fn counts_are_grouped() {
        assert_eq!([0, 999, 1_000, 32_967, 1_234_567].map(thousands), ["0", "999", "1,000", "32,967", "1,234,567"]);
    }

    #[test]
    fn rates_never_show_four_digits_before_the_unit() {
        let shown = [0.4, 873.0, 999.6, 14_230.0, 999_990.0, 1_300_000.0].map(short);
        assert_eq!(shown, ["0", "873", "1.0k", "14.2k", "1.0M", "1.3M"]);
    }

    #[test]
    fn short_times_have_their_unit() {
        let shown = [0.0, 0.00048, 0.0123, 0.9999, 1.25].map(short_time);
        assert_eq!(shown, ["0 µs", "480 µs", "12.3 ms", "999.9 ms", "1.25 s"]);
    }

    #[test]
    fn times_change_their_unit() {
        let shown = [0.04, 9.84, 119.9, 125.4, 3720.0].map(|s| duration(Duration::from_secs_f64(s)));
        assert_eq!(shown, ["0.0 s", "9.8 s", "119.9 s", "2 min 05 s", "1 h 02 min"]);
        assert_eq!([9, 75, 3723].map(|s| clock(Duration::from_secs(s))), ["0:09", "1:15", "1:02:03"]);
    }
}
