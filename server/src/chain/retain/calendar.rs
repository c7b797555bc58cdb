//! Days, weeks, months and years of UTC, numbered.

use time::OffsetDateTime;

const DAY_SECONDS: i64 = 86_400;

/// A length of the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Period {
    Day,
    /// From Monday.
    Week,
    Month,
    Year,
}

impl Period {
    /// Number of the period that a time (Unix milliseconds) lies in: equal for equal periods.
    pub(super) fn of(self, ms: i64) -> i64 {
        let seconds = ms.div_euclid(1000);
        let days = seconds.div_euclid(DAY_SECONDS);
        // 1970-01-01 was a Thursday.
        let week = (days + 3).div_euclid(7);
        // Years beyond 9999 have no months for us; their days still tell them apart.
        let date = OffsetDateTime::from_unix_timestamp(seconds).ok();
        let year = date.map_or(days, |date| i64::from(date.year()));
        let month = date.map_or(days, |date| year * 12 + i64::from(u8::from(date.month())));
        match self {
            Self::Day => days,
            Self::Week => week,
            Self::Month => month,
            Self::Year => year,
        }
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    fn of(period: Period, time: OffsetDateTime) -> i64 {
        period.of(time.unix_timestamp() * 1000)
    }

    #[test]
    fn periods_end_at_midnight_of_utc() {
        let (before, after) =
            (datetime!(2026-12-31 23:59:59 UTC), datetime!(2027-01-01 00:00:00 UTC));
        for period in [Period::Day, Period::Month, Period::Year] {
            assert_eq!(of(period, before) + 1, of(period, after), "{period:?}");
        }
        assert_eq!(of(Period::Week, before), of(Period::Week, after), "Thursday and Friday");
        let (sunday, monday) =
            (datetime!(2026-11-29 23:59:59 UTC), datetime!(2026-11-30 00:00:00 UTC));
        assert_eq!(of(Period::Week, sunday) + 1, of(Period::Week, monday));
    }

    #[test]
    fn every_time_has_a_period() {
        for ms in [i64::MIN, -1, 0, i64::MAX] {
            for period in [Period::Day, Period::Week, Period::Month, Period::Year] {
                period.of(ms);
            }
        }
    }
}
