//! Keys as the defaults show them, and values as file, environment and flags spell them.

use std::fmt;

use serde_json::{Map, Value};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

/// What values a key takes, by its default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Switch,
    Whole,
    Number,
    Text,
    List,
    /// A table of names that the user chooses: only in the file.
    Table,
    /// The default is absent, so only the struct knows.
    Any,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Switch => "true or false",
            Self::Whole => "a whole number, 0 or more",
            Self::Number => "a number",
            Self::Text => "text in quotes",
            Self::List => "a list, such as [\"a\", \"b\"]",
            Self::Table => "a table",
            Self::Any => "a value",
        })
    }
}

impl Kind {
    fn of(default: &Value) -> Self {
        match default {
            Value::Bool(_) => Self::Switch,
            Value::Number(number) if number.is_f64() => Self::Number,
            Value::Number(_) => Self::Whole,
            Value::String(_) => Self::Text,
            Value::Array(_) => Self::List,
            Value::Object(_) => Self::Table,
            Value::Null => Self::Any,
        }
    }

    pub(super) fn fits(self, value: &Value) -> bool {
        match self {
            Self::Switch => value.is_boolean(),
            Self::Whole => value.is_u64(),
            Self::Number => value.is_number(),
            Self::Text => value.is_string(),
            Self::List => value.is_array(),
            Self::Table => value.is_object(),
            Self::Any => true,
        }
    }

    pub(super) fn value_name(self) -> &'static str {
        match self {
            Self::Switch => "true|false",
            Self::Whole | Self::Number => "NUMBER",
            Self::Text | Self::Any | Self::Table => "VALUE",
            Self::List => "LIST",
        }
    }
}

/// One key with its default.
#[derive(Debug)]
pub(super) struct Key {
    /// `key` or `section.key`.
    pub(super) name: String,
    pub(super) kind: Kind,
    default: Value,
}

impl Key {
    pub(super) fn variable(&self, prefix: &str) -> String {
        format!("{prefix}_{}", self.name.replace(['.', '-'], "_").to_uppercase())
    }

    pub(super) fn flag(&self) -> String {
        self.name.replace(['.', '_'], "-")
    }

    /// Id among a command's arguments; other arguments of a program never have a dot first.
    pub(super) fn flag_id(&self) -> String {
        format!(".{}", self.name)
    }

    pub(super) fn default_text(&self) -> String {
        match &self.default {
            Value::Null => "default: none".into(),
            Value::String(text) if text.is_empty() => "default: empty".into(),
            Value::String(text) => format!("default: {text}"),
            Value::Array(items) if items.is_empty() => "default: empty".into(),
            other => format!("default: {other}"),
        }
    }

    /// A value as an environment variable or a flag spells it.
    pub(super) fn parse_text(&self, text: &str) -> Result<Value, String> {
        let expected = || format!("expected {}", self.kind);
        Ok(match self.kind {
            Kind::Switch => Value::Bool(text.parse().map_err(|_| expected())?),
            Kind::Whole => match text.parse::<u64>() {
                Ok(number) => number.into(),
                Err(_) => text.parse::<i64>().map_err(|_| expected())?.into(),
            },
            Kind::Number => text.parse::<f64>().map_err(|_| expected())?.into(),
            Kind::Text => text.into(),
            Kind::List => text.split(',').map(str::trim).filter(|item| !item.is_empty()).collect(),
            Kind::Table => return Err("stands only in the settings file".into()),
            // Numbers and switches as themselves, anything else is text.
            Kind::Any => match serde_json::from_str::<Value>(text) {
                Ok(value) if value.is_number() || value.is_boolean() => value,
                _ => text.into(),
            },
        })
    }
}

/// All keys of the defaults, sections flattened.
pub(super) fn known_keys(defaults: &Value) -> Vec<Key> {
    let mut keys = Vec::new();
    if let Value::Object(table) = defaults {
        collect_keys(table, "", &mut keys);
    }
    keys
}

fn collect_keys(table: &Map<String, Value>, section: &str, keys: &mut Vec<Key>) {
    for (name, default) in table {
        let name = format!("{section}{name}");
        match default {
            Value::Object(inner) if !inner.is_empty() => {
                collect_keys(inner, &format!("{name}."), keys)
            }
            default => keys.push(Key { name, kind: Kind::of(default), default: default.clone() }),
        }
    }
}

/// Dotted names of what differs; what only one side has differs.
pub(super) fn differing(old: &Value, new: &Value, name: &str, found: &mut Vec<String>) {
    let (Value::Object(before), Value::Object(after)) = (old, new) else {
        if old != new {
            found.push(name.to_owned());
        }
        return;
    };
    let section = if name.is_empty() { String::new() } else { format!("{name}.") };
    let only_before = before.keys().filter(|key| !after.contains_key(*key));
    for key in after.keys().chain(only_before) {
        let (old, new) = (before.get(key), after.get(key));
        let absent = Value::Null;
        let name = format!("{section}{key}");
        differing(old.unwrap_or(&absent), new.unwrap_or(&absent), &name, found);
    }
}

/// A dotted name as a JSON pointer.
pub(super) fn pointer(name: &str) -> String {
    format!("/{}", name.replace('.', "/"))
}

/// Puts a value at a dotted name.
pub(super) fn place(tree: &mut Value, name: &str, value: Value) {
    if let Some(slot) = tree.pointer_mut(&pointer(name)) {
        *slot = value;
    }
}

/// `did you mean …?`, or where to find the list when nothing is near. That all begin with `prefix` doesn't make them near.
pub(super) fn nearest(name: &str, prefix: &str, known: impl Iterator<Item = String>) -> String {
    let plain = |text: &str| {
        text.strip_prefix(prefix).unwrap_or(text).to_lowercase().replace(['_', '-', '.'], "")
    };
    let wanted = plain(name);
    let rated =
        known.map(|known| (strsim::normalized_damerau_levenshtein(&wanted, &plain(&known)), known));
    match rated.max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((rate, known)) if rate >= 0.6 => format!("did you mean {known:?}?"),
        _ => "--help lists all keys".into(),
    }
}

/// A value of a TOML file: dotted name, line, value.
pub(super) type TomlValue = (String, usize, Value);

fn line_at(text: &str, offset: usize) -> usize {
    1 + text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count()
}

/// What is wrong with a TOML text, as one line: its line, where that is known, and why.
pub fn toml_problem(text: &str, error: &toml::de::Error) -> (Option<usize>, String) {
    let line = error.span().map(|span| line_at(text, span.start));
    (line, error.message().split_whitespace().collect::<Vec<_>>().join(" "))
}

/// All values of a TOML file in its order, sections flattened but for those that `is_table` names; or the line and text of
/// what is wrong.
pub(super) fn toml_values(
    text: &str,
    is_table: &dyn Fn(&str) -> bool,
) -> Result<Vec<TomlValue>, (Option<usize>, String)> {
    let syntax = |error: toml::de::Error| toml_problem(text, &error);
    let spans = DeTable::parse(text).map_err(syntax)?;
    let values: Value = toml::from_str(text).map_err(syntax)?;
    let mut found = Vec::new();
    collect_values(spans.get_ref(), &values, "", is_table, &mut |name, offset, value| {
        found.push((name, line_at(text, offset), value));
    });
    Ok(found)
}

/// Takes the values of a section for all, where the file has it, and those of `shared` where it has none of that.
pub(super) fn only_section(found: &mut Vec<TomlValue>, section: &str, shared: &str) {
    let within =
        |name: &str, section: &str| Some(name.strip_prefix(section)?.strip_prefix('.')?.to_owned());
    let own = |name: &str| within(name, section);
    if found.iter().all(|(name, ..)| own(name).is_none()) {
        return;
    }
    let has_shared =
        found.iter().any(|(name, ..)| own(name).is_some_and(|own| within(&own, shared).is_some()));
    found.retain_mut(|(name, ..)| match own(name) {
        Some(own) => {
            *name = own;
            true
        }
        None => !has_shared && within(name, shared).is_some(),
    });
}

fn collect_values(
    spans: &DeTable<'_>,
    values: &Value,
    section: &str,
    is_table: &dyn Fn(&str) -> bool,
    found: &mut dyn FnMut(String, usize, Value),
) {
    for (key, inner) in spans {
        let name = format!("{section}{}", key.get_ref());
        let value = values.get(key.get_ref().as_ref()).cloned().unwrap_or_default();
        match Spanned::get_ref(inner) {
            DeValue::Table(table) if !is_table(&name) => {
                collect_values(table, &value, &format!("{name}."), is_table, found);
            }
            _ => found(name, key.span().start, value),
        }
    }
}
