//! Locates the hooks of a profile in a process, and compiles their expressions to steps for the eBPF programs.

use std::{
    cell::RefCell,
    collections::{HashMap, hash_map::Entry},
    iter,
    rc::Rc,
};

use observer_common::deferred::{
    CLASS_STEPS, Extractor, KEY_STEPS, Op, OpCode, REQUEST_ID_STEPS, ThreadLocal, register,
};
use procfs::process::MemoryMap;

use super::runtime::Runtime;
use crate::{
    arch::instructions,
    binary::{
        image::Image,
        mappings::{FileId, Mappings, file_id, module_name},
        memory::{Memory as _, ProcessMemory},
    },
    profiles::{At, Case, Hook, Hop, Operand, Site as HookSite, Steps, Table, Test, VersionKind},
};

/// Maximum number of attach points of one hook.
const MAX_POINTS: usize = 1024;

/// A hook of a profile, located in a process.
pub(crate) struct Found<'p> {
    /// The hook in the profile.
    pub(crate) hook: &'p Hook,
    /// Display name: function and module.
    pub(crate) name: String,
    /// The module of the attach points.
    pub(crate) image: Rc<Image>,
    /// The module's file.
    pub(crate) file: FileId,
    /// Instructions to attach to.
    pub(crate) points: Vec<AttachPoint>,
    /// Steps that read key, class and request id, with the return value in its ABI register.
    pub(crate) extractor: Extractor,
}

/// An instruction that a hook is attached to.
#[derive(Clone, Copy)]
pub(crate) struct AttachPoint {
    /// Offset in the file.
    pub(crate) offset: u64,
    /// Address in the process.
    pub(crate) address: u64,
    /// Number of the register that holds the return value at this instruction.
    pub(crate) result: u64,
}

impl AttachPoint {
    /// The hook's extractor, adapted to the register of the return value at this point.
    pub(crate) fn extractor(self, of_hook: &Extractor) -> Extractor {
        let mut extractor = *of_hook;
        for step in extractor.key.iter_mut().chain(&mut extractor.class).chain(&mut extractor.request_id) {
            if step.action == OpCode::Register as u32 && step.value == register::RESULT {
                step.value = self.result;
            }
        }
        extractor
    }
}

/// Identifies one of several copies of a runtime in a process: a library can be loaded more than once.
#[derive(Clone, Copy)]
pub(crate) struct Copy {
    /// Index of the copy, from 0.
    pub(crate) number: usize,
    /// Number of copies.
    pub(crate) of: usize,
}

/// Locates the hooks of one runtime in a process.
pub(crate) struct Finder<'a> {
    mappings: &'a Mappings,
    runtime: &'a Runtime,
    copy: Copy,
    memory: ProcessMemory,
    /// Opened files, by the address of their mapping.
    images: RefCell<HashMap<u64, Rc<Image>>>,
}

/// A module of the process.
struct Module<'a> {
    map: &'a MemoryMap,
    image: Rc<Image>,
    /// Difference between addresses in the process and in the file.
    bias: u64,
}

impl<'a> Finder<'a> {
    /// A finder for the hooks of this runtime. Fails if the memory of the process cannot be read.
    pub(crate) fn of(mappings: &'a Mappings, runtime: &'a Runtime, copy: Copy) -> Result<Self, String> {
        let memory = ProcessMemory::of(mappings.pid).map_err(|error| error.to_string())?;
        Ok(Self { mappings, runtime, copy, memory, images: RefCell::default() })
    }

    /// Locates all hooks of the profile that apply to this process. An error names what is missing.
    pub(crate) fn all(&self) -> Result<Vec<Found<'a>>, String> {
        let version = self.version()?;
        let mut wanted = Vec::new();
        for hook in self.runtime.profile.hooks.iter().filter(|hook| hook.is_in(version.as_deref())) {
            if self.is_needed(hook)? {
                wanted.push(hook);
            }
        }
        if wanted.is_empty() {
            return Err(format!("the profile has no hooks for version {}", version.unwrap_or_default()));
        }
        let found = wanted.into_iter().map(|hook| (hook.optional, self.find(hook)));
        let found = found.filter(|(optional, found)| !optional || found.is_ok()).map(|(_, found)| found);
        Ok(found.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
    }

    /// The runtime's version; `None` if the profile does not say where it is.
    fn version(&self) -> Result<Option<String>, String> {
        let Some(version) = &self.runtime.profile.version else { return Ok(None) };
        let module = self.open(&self.runtime.module)?;
        let symbol = module.symbol(&version.symbol);
        let address = symbol.ok_or_else(|| format!("the module has no symbol {}", version.symbol))?;
        match version.is {
            VersionKind::Hex => {
                let number = self.memory.word(address).ok_or("cannot read its version")?.to_le_bytes();
                Ok(Some(format!("{}.{}.{}", number[3], number[2], number[1])))
            }
            VersionKind::String => {
                self.memory.c_string(address, "version").map(Some).map_err(|error| format!("{error:#}"))
            }
        }
    }

    /// Whether a hook is needed: none of the functions in `unless` is present.
    fn is_needed(&self, hook: &Hook) -> Result<bool, String> {
        if hook.unless.is_empty() {
            return Ok(true);
        }
        Ok(self.open(&self.runtime.module)?.functions(&hook.unless).is_err())
    }

    /// Locates one hook, in each copy of its module that belongs to this copy of the runtime. An error names what is
    /// missing.
    pub(crate) fn find<'p>(&self, hook: &'p Hook) -> Result<Vec<Found<'p>>, String> {
        let Some(prefix) = &hook.module else {
            return Ok(vec![self.find_in(&self.runtime.module, hook)?]);
        };
        let own = &self.runtime.module;
        if module_name(own).is_some_and(|name| name.starts_with(prefix)) {
            return Ok(vec![self.find_in(own, hook)?]);
        }
        let mut modules: Vec<_> = self.mappings.modules_named(prefix).collect();
        let Some(&first) = modules.first() else {
            return Err(format!("no module is loaded whose name begins with {prefix}"));
        };
        modules.retain(|map| self.has(map, hook));
        match modules.as_slice() {
            [] => Ok(vec![self.find_in(first, hook)?]),
            // Libraries that are loaded together are mapped in the same order.
            each if each.len() == self.copy.of => Ok(vec![self.find_in(each[self.copy.number], hook)?]),
            all => all.iter().map(|map| self.find_in(map, hook)).collect(),
        }
    }

    /// Whether a module defines what the hook names: the name of another module can have the same prefix.
    fn has(&self, map: &'a MemoryMap, hook: &Hook) -> bool {
        self.open(map).is_ok_and(|module| match &hook.site {
            HookSite::Named(names) | HookSite::BehindJump(names) => module.functions(names).is_ok(),
            HookSite::InTable(table) => module.symbol(&table.symbol).is_some(),
        })
    }

    fn find_in<'p>(&self, map: &'a MemoryMap, hook: &'p Hook) -> Result<Found<'p>, String> {
        let (module, functions) = match &hook.site {
            HookSite::Named(names) => {
                let module = self.open(map)?;
                let functions = module.functions(names)?;
                (module, functions)
            }
            HookSite::BehindJump(names) => {
                let module = self.open(map)?;
                let functions = module.functions(names)?.into_iter().map(|function| {
                    instructions::jump_target(&module.image.elf, function)
                        .ok_or_else(|| format!("{} is not a single jump to another function", hook.place()))
                });
                let functions = functions.collect::<Result<Vec<_>, _>>()?;
                (module, functions)
            }
            HookSite::InTable(table) => self.behind(map, table)?,
        };
        let wrong_count =
            |count| format!("{} matches {count} attach points (allowed: 1 to {MAX_POINTS})", hook.place());
        if functions.len() > MAX_POINTS {
            return Err(wrong_count(functions.len()));
        }
        let mut points = Vec::new();
        for function in functions {
            let elf = &module.image.elf;
            let needs_result = hook.key.as_ref().is_some_and(|key| key.register == register::RESULT);
            let addresses = match hook.at {
                At::Entry => {
                    let entry = instructions::entry(elf, function, &hook.registers());
                    entry.into_iter().map(|address| (address, register::RESULT)).collect()
                }
                At::Return => instructions::ends(elf, function, needs_result)
                    .map_err(|why| format!("cannot find where {} returns: {why}", hook.place()))?
                    .into_iter()
                    .map(|end| (end.address, end.result))
                    .collect::<Vec<_>>(),
            };
            for (address, result) in addresses {
                let offset = elf
                    .file_offset(address)
                    .ok_or_else(|| format!("the address of {} is not in its file", hook.place()))?;
                points.push(AttachPoint { offset, address: address.wrapping_add(module.bias), result });
            }
        }
        if points.is_empty() || points.len() > MAX_POINTS {
            return Err(wrong_count(points.len()));
        }
        let name = format!("{} in {}", hook.place(), module_name(module.map).unwrap_or_default());
        let extractor = self.extractor(hook)?;
        Ok(Found { hook, name, image: module.image, file: file_id(module.map), points, extractor })
    }

    fn open(&self, map: &'a MemoryMap) -> Result<Module<'a>, String> {
        let mut images = self.images.borrow_mut();
        let image = match images.entry(map.address.0) {
            Entry::Occupied(known) => Rc::clone(known.get()),
            Entry::Vacant(vacant) => {
                let image = Image::of(self.mappings, map).map_err(|error| format!("{error:#}"))?;
                Rc::clone(vacant.insert(Rc::new(image)))
            }
        };
        let bias = image.elf.bias(map).ok_or("its load address cannot be determined")?;
        Ok(Module { map, image, bias })
    }

    /// Follows the pointers of a table to a function. Returns it with its module.
    fn behind(&self, map: &'a MemoryMap, table: &Table) -> Result<(Module<'a>, Vec<u64>), String> {
        let start = self.open(map)?.symbol(&table.symbol);
        let mut address = start.ok_or_else(|| format!("the module has no symbol {}", table.symbol))?;
        for offset in &table.path {
            address = self
                .memory
                .word(address.wrapping_add(*offset))
                .ok_or_else(|| format!("a pointer in {} cannot be read", table.symbol))?;
        }
        let map =
            self.mappings.code(address).ok_or_else(|| format!("{} does not point to code", table.symbol))?;
        let module = self.open(map)?;
        let function = address.wrapping_sub(module.bias);
        Ok((module, vec![function]))
    }

    /// Compiles the expressions of a hook to steps for the programs. Unused steps are [`Op::END`].
    fn extractor(&self, hook: &Hook) -> Result<Extractor, String> {
        let mut key = Vec::new();
        for test in &hook.when {
            key.extend(self.test(test)?);
        }
        if let Some(path) = &hook.key {
            key.extend(steps(path).chain([take(0)]));
        }
        let mut class = Vec::new();
        for case in &hook.class {
            class.extend(self.case(case)?);
        }
        let mut request_id = Vec::new();
        if let Some(text) = &hook.request_id {
            for test in &text.when {
                request_id.extend(self.test(test)?);
            }
            request_id.extend(steps(&text.is).chain([take(0)]));
        }
        let mut extractor = Extractor {
            key: [Op::END; KEY_STEPS],
            class: [Op::END; CLASS_STEPS],
            request_id: [Op::END; REQUEST_ID_STEPS],
            context: ThreadLocal::NONE,
        };
        extractor.key.iter_mut().zip(key).for_each(|(slot, step)| *slot = step);
        extractor.class.iter_mut().zip(class).for_each(|(slot, step)| *slot = step);
        extractor.request_id.iter_mut().zip(request_id).for_each(|(slot, step)| *slot = step);
        Ok(extractor)
    }

    fn case(&self, case: &Case) -> Result<Vec<Op>, String> {
        let mut all = vec![Op { action: OpCode::Case as u32, ..Op::END }];
        for test in &case.when {
            all.extend(self.test(test)?);
        }
        all.extend(steps(&case.is));
        all.push(take(case.named as u32));
        Ok(all)
    }

    fn test(&self, test: &Test) -> Result<Vec<Op>, String> {
        let value = match &test.with {
            Operand::Number(number) => *number,
            Operand::Symbol(name, add) => self
                .open(&self.runtime.module)?
                .symbol(name)
                .ok_or_else(|| format!("the module has no symbol {name}"))?
                .wrapping_add(*add),
        };
        let compare = Op { action: OpCode::Test as u32, offset: 0, mask: test.mask, value };
        Ok(steps(&test.path).chain([compare]).collect())
    }
}

impl Module<'_> {
    /// Address in the process of a symbol that the module defines.
    fn symbol(&self, name: &str) -> Option<u64> {
        Some(self.image.symbol(name)?.wrapping_add(self.bias))
    }

    /// Addresses in the file of all functions that match the first name with any match.
    fn functions(&self, names: &[String]) -> Result<Vec<u64>, String> {
        let all = names.iter().map(|name| self.image.functions(name));
        let mut found = all.filter(|functions| !functions.is_empty());
        found.next().ok_or_else(|| {
            let module = module_name(self.map).unwrap_or_default();
            format!("{module} has no function {}, or is stripped", names.join(" or "))
        })
    }
}

/// Steps that compute the value of a path.
fn steps(path: &Steps) -> impl Iterator<Item = Op> + '_ {
    let register = Op { action: OpCode::Register as u32, value: path.register, ..Op::END };
    let hop = |hop: &Hop| match *hop {
        Hop::Add(offset) => Op { action: OpCode::Add as u32, offset, ..Op::END },
        Hop::Load(offset) => Op { action: OpCode::Load as u32, offset, ..Op::END },
    };
    iter::once(register).chain(path.hops.iter().map(hop))
}

/// The final step, which takes the value as the result. `naming` says how a class is named; 0 for other results.
fn take(naming: u32) -> Op {
    Op { action: OpCode::Take as u32, value: naming.into(), ..Op::END }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        fs,
        io::{BufRead as _, BufReader},
        process::{Command, Stdio},
        sync::Arc,
    };

    use procfs::process::MMapPath;

    use super::*;
    use crate::{process::runtime::Runtimes, profiles::Profile};

    /// Two folders, each with a library that enqueues tasks and another one that runs them.
    #[test]
    fn copies_of_two_libraries_are_paired_in_load_order() {
        const SCRIPT: &str = "import ctypes, sys
loaded = [ctypes.CDLL(path) for path in sys.argv[1:]]
print(flush=True)
sys.stdin.read()";
        if Command::new("gcc").arg("--version").output().is_err() {
            eprintln!("skipped: copies_of_two_libraries_are_paired_in_load_order: there is no gcc here");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for (part, name, function) in [
            ("one", "libputting.so", "put_task"),
            ("one", "libgoing.so", "run_task"),
            ("other", "libputting.so", "put_task"),
            ("other", "libgoing.so", "run_task"),
            // A library whose name has the same prefix, but which lacks the function.
            ("other", "libgoing-on.so", "other_function"),
        ] {
            let path = folder.path().join(part).join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let code = folder.path().join("code.c");
            fs::write(&code, format!("void {function}(void *task) {{}}")).unwrap();
            let mut gcc = Command::new("gcc");
            gcc.args(["-shared", "-fPIC", "-o"]).args([&path, &code]);
            assert!(gcc.status().unwrap().success());
            paths.push(path);
        }
        let mut python = Command::new("/usr/bin/python3")
            .args(["-c", SCRIPT])
            .args(paths)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        BufReader::new(python.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        let mappings = Mappings::of(python.id()).unwrap();
        let hook = |text: &str| text.parse().unwrap();
        let (snapshot, restore) = (hook("libputting:put_task:arg0"), hook("libgoing:run_task:arg0"));
        let profile = Profile::of_own_library(&snapshot, &restore, None);
        let copies = Runtimes::of_profiles(vec![Arc::new(profile)]).of(&mappings);
        let folders = copies.iter().enumerate().map(|(number, runtime)| {
            let finder = Finder::of(&mappings, runtime, Copy { number, of: copies.len() }).unwrap();
            let found = runtime.profile.hooks.iter().flat_map(|hook| finder.find(hook).unwrap());
            let points: Vec<_> = found.flat_map(|found| found.points).collect();
            let folder_of = |point: &AttachPoint| match &mappings.code(point.address).unwrap().pathname {
                MMapPath::Path(path) => path.parent().unwrap().to_owned(),
                other => panic!("{other:?}"),
            };
            assert_eq!(points.len(), 2);
            assert_eq!(folder_of(&points[0]), folder_of(&points[1]));
            folder_of(&points[0])
        });
        let folders: BTreeSet<_> = folders.collect();
        // The script exits when its standard input is closed.
        drop(python.stdin.take());
        python.wait().unwrap();
        assert_eq!(folders, ["one", "other"].map(|part| folder.path().join(part)).into());
    }
}
