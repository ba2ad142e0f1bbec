//! `docs/configuration.md` tells what is read.

use std::path::Path;

use crate::config::{toml, xl_disk};

const PAGE: &str = include_str!("../../../../../docs/configuration.md");

#[test]
fn every_example_is_read() {
    let mut examples = 0;
    for block in PAGE.split("```toml\n").skip(1) {
        let (example, _) = block.split_once("```").unwrap();
        toml::parse(example, Path::new("example.toml")).unwrap_or_else(|e| panic!("{e}\n{example}"));
        examples += 1;
    }
    assert!(examples >= 5, "{examples}");
}

#[test]
fn every_key_has_its_line() {
    for (table, heading) in [
        ("", "### The process"),
        ("[limits]\n", "### `[limits]`"),
        ("[nbd]\n", "### `[nbd]`"),
        ("[nbd]\nlisten = 'a:1'\n[nbd.tls]\n", "### `[nbd]`"),
        ("[[disk]]\n", "### `[[disk]]`"),
        ("[[disk]]\n[disk.build]\n", "### `[disk.build]`"),
        ("[[disk]]\n[disk.tailor]\n", "### `[disk.tailor]`"),
        ("[[disk]]\n[[disk.tailor.user]]\n", "### `[disk.tailor]`"),
    ] {
        // The reader lists what it knows when it meets what it does not.
        let error = toml::parse(&format!("{table}bogus = 1"), Path::new("f")).unwrap_err().message;
        let (_, known) = error.split_once("expected ").unwrap();
        let section = PAGE.split_once(heading).unwrap().1.split("\n## ").next().unwrap();
        for key in known.split('`').skip(1).step_by(2) {
            // Tables have a heading of their own.
            let told = section.contains(&format!("| `{key}` |")) || section.contains(&format!("[{key}]"));
            assert!(told, "`{key}` is not explained under {heading}");
        }
    }
}

#[test]
fn every_disk_of_the_table_is_read() {
    let table = PAGE.split_once("| in the file | comes to |").unwrap().1;
    let row = |line: &str| line.strip_prefix("| ").and_then(|l| l.split(" | ").next()).map(str::to_owned);
    let specs = table
        .lines()
        .filter_map(row)
        .flat_map(|cell| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>());
    let specs: Vec<_> =
        specs.filter(|spec| spec.contains(',') && (spec.contains("xvd") || spec.contains("hdc"))).collect();
    assert!(specs.len() >= 8, "{specs:?}");
    for spec in specs {
        xl_disk::parse(&spec).unwrap_or_else(|e| panic!("{spec}: {e}"));
    }
}
