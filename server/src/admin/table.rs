//! Tables for people: columns as wide as their widest cell.

/// Cells that begin with this mark are aligned to the right, without it.
const RIGHT: char = '\u{1}';

/// A cell that is aligned to the right.
pub(super) fn right(text: impl std::fmt::Display) -> String {
    format!("{RIGHT}{text}")
}

/// Rows as text, two spaces between columns; the first row is the head.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let shown = |cell: &str| cell.trim_start_matches(RIGHT).to_owned();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| shown(cell).chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| match cell.starts_with(RIGHT) {
            true => format!("{:>width$}", shown(cell)),
            false => format!("{cell:<width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows =
            [vec!["name".into(), right("size")], vec!["a".into(), right(7)], vec!["longer".into()]];
        assert_eq!(table(&rows), "name    size\na          7\nlonger\n");
    }
}
