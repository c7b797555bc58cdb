//! Dates on command lines: days and moments, in UTC.

use time::{
    Date, OffsetDateTime, format_description::well_known::Rfc3339, macros::format_description,
};

use super::AdminError;

/// Unix milliseconds of `2026-12-31`, which begins at midnight UTC, or `2026-12-31T18:00:00Z`.
pub(super) fn parse(text: &str) -> Result<i64, AdminError> {
    let day = Date::parse(text, format_description!("[year]-[month]-[day]"));
    let moment = day.map(|day| day.midnight().assume_utc());
    let moment = moment.or_else(|_| OffsetDateTime::parse(text, &Rfc3339));
    let moment = moment.map_err(|_| AdminError::Date { text: text.to_owned() })?;
    // Years of four digits fit.
    Ok(i64::try_from(moment.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_and_moments_are_of_utc() {
        assert_eq!(parse("1970-01-02").unwrap(), 86_400_000);
        assert_eq!(parse("1970-01-02T01:00:00+01:00").unwrap(), 86_400_000);
        assert_eq!(parse("1970-01-01T00:00:01.5Z").unwrap(), 1500);
        for none in ["", "tomorrow", "2026-13-01", "2026-12-31 18:00", "99999-01-01"] {
            assert!(parse(none).is_err(), "{none}");
        }
    }
}
