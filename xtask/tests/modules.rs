//! Checks that the modules of each crate import in one direction. A file declares its modules from the lowest layer to
//! the highest. A module may use only modules that are declared before it, and not the file that declares it. So
//! imports have no cycles, and the declarations in `lib.rs` show the architecture. Code that is compiled only for tests
//! may import anything.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    slice,
};

use anyhow::{Context as _, Result};
use proc_macro2::{Span, TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, File, Item, ItemMod, ItemUse, Macro, UseTree};

/// Root files of the crates.
const CRATES: [&str; 5] = [
    "bench/src/main.rs",
    "observer-common/src/lib.rs",
    "observer-ebpf/src/main.rs",
    "observer/src/lib.rs",
    "xtask/src/main.rs",
];

#[test]
fn modules_import_in_one_direction() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let found: Vec<_> = CRATES.iter().flat_map(|start| violations(&root.join(start)).unwrap()).collect();
    let list: BTreeSet<_> = found.iter().map(|violation| violation.format(root)).collect();
    let list = list.into_iter().collect::<Vec<_>>().join("\n");
    assert!(list.is_empty(), "move what both use to a module that is declared before them:\n{list}");
}

/// All imports of a crate that violate the order.
fn violations(start: &Path) -> Result<Vec<Violation>> {
    let tree = Module::read(start, Vec::new())?;
    let mut found = Vec::new();
    tree.check(&tree, &mut found);
    Ok(found)
}

/// A module with a file of its own.
struct Module {
    /// Path from the root of the crate.
    path: Vec<String>,
    file: PathBuf,
    /// In the order of their declarations.
    children: Vec<Module>,
    /// Imports from this crate: the path from its root, and the line.
    imports: Vec<(Vec<String>, usize)>,
}

impl Module {
    /// Reads a file and the modules that it declares.
    fn read(file: &Path, path: Vec<String>) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let syntax = syn::parse_file(&text).with_context(|| format!("cannot parse {}", file.display()))?;
        let names = declared(&syntax);
        let children = names.iter().map(|name| {
            let path = [&path[..], slice::from_ref(name)].concat();
            Self::read(&find(file, name)?, path)
        });
        let children = children.collect::<Result<_>>()?;
        let mut reader = Reader { module: path.clone(), names, inline: Vec::new(), imports: Vec::new() };
        reader.visit_file(&syntax);
        Ok(Self { path, file: file.to_owned(), children, imports: reader.imports })
    }

    /// The module that contains what the path names; the last names of the path may be an item in it.
    fn resolve(&self, path: &[String]) -> &Self {
        let child = path.first().and_then(|name| self.children.iter().find(|child| child.is_named(name)));
        child.map_or(self, |child| child.resolve(&path[1..]))
    }

    fn is_named(&self, name: &str) -> bool {
        self.path.last().is_some_and(|last| last == name)
    }

    /// Position among the modules that this one declares.
    fn position(&self, name: &str) -> Option<usize> {
        self.children.iter().position(|child| child.is_named(name))
    }

    fn check(&self, tree: &Self, found: &mut Vec<Violation>) {
        for (path, line) in &self.imports {
            let imported = tree.resolve(path);
            if let Some(why) = tree.why_forbidden(&self.path, &imported.path) {
                let imported =
                    imported.path.iter().fold("crate".to_owned(), |path, name| format!("{path}::{name}"));
                let file = self.file.clone();
                found.push(Violation { file, line: *line, imported, why });
            }
        }
        self.children.iter().for_each(|child| child.check(tree, found));
    }

    /// Why the module `from` must not use the module `to`; `None` if it may.
    fn why_forbidden(&self, from: &[String], to: &[String]) -> Option<Why> {
        match (from.split_first(), to.split_first()) {
            // A module may use itself and the modules that it declares.
            (None, _) => None,
            (Some(_), None) => Some(Why::Declares),
            (Some((from, format)), Some((to, rest))) if from == to => {
                self.children[self.position(from)?].why_forbidden(format, rest)
            }
            (Some((from, _)), Some((to, _))) => {
                (self.position(from) < self.position(to)).then(|| Why::Later(from.clone()))
            }
        }
    }
}

struct Violation {
    file: PathBuf,
    line: usize,
    imported: String,
    why: Why,
}

enum Why {
    /// The imported module declares the importing one.
    Declares,
    /// The imported module is declared after this module.
    Later(String),
}

impl Violation {
    /// Formats the violation as a line, with the file relative to `folder`.
    fn format(&self, folder: &Path) -> String {
        let file = self.file.strip_prefix(folder).unwrap_or(&self.file).display();
        let why = match &self.why {
            Why::Declares => "declares this module".to_owned(),
            Why::Later(module) => format!("is declared after `{module}`"),
        };
        format!("{file}:{}: uses `{}`, which {why}", self.line, self.imported)
    }
}

/// File of a module that is declared in `file`.
fn find(file: &Path, name: &str) -> Result<PathBuf> {
    let folder = file.parent().context("a file has a folder")?;
    let folder = match file.file_stem().and_then(|stem| stem.to_str()) {
        Some("lib" | "main" | "mod") => folder.to_owned(),
        stem => folder.join(stem.unwrap_or_default()),
    };
    let candidates = [folder.join(name).with_extension("rs"), folder.join(name).join("mod.rs")];
    let found = candidates.into_iter().find(|candidate| candidate.exists());
    found.with_context(|| format!("{} declares `{name}`, which has no file", file.display()))
}

/// Names of the modules that a file declares and that have files of their own.
fn declared(syntax: &File) -> Vec<String> {
    let modules = syntax.items.iter().filter_map(|item| match item {
        Item::Mod(module) if module.content.is_none() && !is_for_tests(&module.attrs) => Some(module),
        _ => None,
    });
    modules.map(|module| module.ident.to_string()).collect()
}

/// Whether an item is compiled only for tests.
fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let condition = attribute.path().is_ident("cfg").then(|| attribute.parse_args::<syn::Path>());
        condition.is_some_and(|condition| condition.is_ok_and(|path| path.is_ident("test")))
    })
}

/// Collects the paths in a file.
struct Reader {
    module: Vec<String>,
    names: Vec<String>,
    /// Inline modules around the current item.
    inline: Vec<String>,
    imports: Vec<(Vec<String>, usize)>,
}

impl Reader {
    /// Records a path if it is in this crate.
    fn add(&mut self, path: &[String], span: Span) {
        let here = [&self.module[..], &self.inline].concat();
        let Some(first) = path.first() else { return };
        let whole = match first.as_str() {
            "crate" => path[1..].to_vec(),
            "self" => [&here, &path[1..]].concat(),
            "super" => {
                let levels = path.iter().take_while(|name| *name == "super").count();
                [&here[..here.len().saturating_sub(levels)], &path[levels..]].concat()
            }
            name if self.inline.is_empty() && self.names.iter().any(|child| child == name) => {
                [&here, path].concat()
            }
            _ => return,
        };
        self.imports.push((whole, span.start().line));
    }

    fn add_use(&mut self, before: &[String], tree: &UseTree) {
        let with = |name: String| [before, &[name]].concat();
        match tree {
            UseTree::Path(path) => self.add_use(&with(path.ident.to_string()), &path.tree),
            UseTree::Name(name) => self.add(&with(name.ident.to_string()), name.ident.span()),
            UseTree::Rename(rename) => self.add(&with(rename.ident.to_string()), rename.ident.span()),
            UseTree::Glob(glob) => self.add(before, glob.star_token.spans[0]),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.add_use(before, tree)),
        }
    }

    /// Records paths in the arguments of a macro. They are found by token, because their grammar is unknown.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<(String, Span)> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                TokenTree::Ident(name) => {
                    if colons != 2 {
                        self.add_tokens_as_path(&mut path);
                    }
                    colons = 0;
                    path.push((name.to_string(), name.span()));
                }
                other => {
                    colons = 0;
                    self.add_tokens_as_path(&mut path);
                    if let TokenTree::Group(group) = other {
                        self.add_tokens(group.stream());
                    }
                }
            }
        }
        self.add_tokens_as_path(&mut path);
    }

    fn add_tokens_as_path(&mut self, path: &mut Vec<(String, Span)>) {
        let (names, spans): (Vec<_>, Vec<_>) = path.drain(..).unzip();
        // A single name is in scope already.
        if let [span, _, ..] = spans[..] {
            self.add(&names, span);
        }
    }
}

impl Visit<'_> for Reader {
    fn visit_item(&mut self, item: &Item) {
        let attributes = match item {
            Item::Mod(it) => &it.attrs,
            Item::Use(it) => &it.attrs,
            Item::Fn(it) => &it.attrs,
            Item::Impl(it) => &it.attrs,
            Item::Const(it) => &it.attrs,
            Item::Struct(it) => &it.attrs,
            _ => &Vec::new(),
        };
        if !is_for_tests(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, module: &ItemMod) {
        self.inline.push(module.ident.to_string());
        visit::visit_item_mod(self, module);
        self.inline.pop();
    }

    fn visit_item_use(&mut self, item: &ItemUse) {
        self.add_use(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &syn::Path) {
        let names: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if let [_, _, ..] = names[..] {
            self.add(&names, path.segments[0].ident.span());
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &Macro) {
        self.add_tokens(call.tokens.clone());
        visit::visit_macro(self, call);
    }
}

/// Violations in a crate of two modules, where `lower` is the source of the first.
fn violations_in(lower: &str) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lib.rs"), "mod lower;\nmod upper;\npub struct Item;\n").unwrap();
    fs::write(folder.path().join("lower.rs"), lower).unwrap();
    fs::create_dir(folder.path().join("upper")).unwrap();
    fs::write(folder.path().join("upper/mod.rs"), "mod part;\nuse part::Part;\nuse crate::lower;\n").unwrap();
    fs::write(folder.path().join("upper/part.rs"), "use crate::lower::Thing;\npub struct Part;\n").unwrap();
    let found = violations(&folder.path().join("lib.rs")).unwrap();
    found.iter().map(|violation| violation.format(folder.path())).collect()
}

#[test]
fn import_of_a_later_module_is_reported() {
    let message = "lower.rs:1: uses `crate::upper::part`, which is declared after `lower`";
    for text in [
        "use crate::upper::part::Part;",
        "use super::upper::{part::Part};",
        "fn f() { crate::upper::part::f(); }",
        "fn f() { println!(\"{}\", crate::upper::part::X); }",
        "mod inner { use crate::upper::part::*; }",
    ] {
        assert_eq!(violations_in(text), [message], "{text}");
    }
}

#[test]
fn import_of_the_declaring_module_is_reported() {
    assert_eq!(violations_in("\nuse super::Item;"), ["lower.rs:2: uses `crate`, which declares this module"]);
}

#[test]
fn code_for_tests_and_other_crates_are_ignored() {
    for text in [
        "",
        "use std::fs;",
        "use upper::Other;",
        "#[cfg(test)]\nmod tests { use crate::upper::part::Part; }",
        "#[cfg(test)]\nuse crate::upper::part::Part;",
        "pub(crate) fn f() { self::g(); }",
    ] {
        assert_eq!(violations_in(text), Vec::<String>::new(), "{text}");
    }
}
