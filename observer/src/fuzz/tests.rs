//! Runs the corpus of each fuzz target as a regression test.

use std::{fs, path::Path};

use super::TARGETS;

fn corpus() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus")
}

#[test]
fn no_target_panics_on_its_corpus() {
    for (name, target) in TARGETS {
        let files = fs::read_dir(corpus().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        assert!(!files.is_empty(), "the corpus of {name} is empty");
        for file in files {
            eprintln!("{}", file.display());
            target(&fs::read(file).unwrap());
        }
        // The empty input belongs to every corpus.
        target(&[]);
    }
}

#[test]
fn every_corpus_has_a_target() {
    for folder in fs::read_dir(corpus()).unwrap() {
        let name = folder.unwrap().file_name().into_string().unwrap();
        assert!(TARGETS.iter().any(|(target, _)| *target == name), "{name}");
    }
}
