//! Where in a process the places are that a profile names, and how the programs read them there.

use std::{
    cell::RefCell,
    collections::{HashMap, hash_map::Entry},
    iter,
    rc::Rc,
};

use observer_common::deferred::{
    Action, CLASS_STEPS, Extractor, KEY_STEPS, Op, REQUEST_ID_STEPS, ThreadLocal, register,
};
use procfs::process::MemoryMap;

use super::runtime::Runtime;
use crate::{
    profiles::{At, Case, Hook, Hop, Operand, Site as Wanted, Steps, Table, Test, VersionKind},
    stacks::{
        image::Image,
        instructions,
        mappings::{FileId, Mappings, file_id, module_name},
        memory::{Live, Memory as _},
    },
};

/// Most places that one hook stands for.
const PLACES: usize = 1024;

/// A hook of a profile, found in a process.
pub(crate) struct Found<'p> {
    /// What the profile says of it.
    pub(crate) hook: &'p Hook,
    /// What people call the place, its module included.
    pub(crate) name: String,
    /// The module it is in.
    pub(crate) image: Rc<Image>,
    /// Which file that is.
    pub(crate) file: FileId,
    /// The places.
    pub(crate) places: Vec<FoundPlace>,
    /// How to read them, if what a function returns is in its own register.
    pub(crate) extractor: Extractor,
}

/// A place of a hook.
#[derive(Clone, Copy)]
pub(crate) struct FoundPlace {
    /// In the file.
    pub(crate) offset: u64,
    /// Address in the process.
    pub(crate) address: u64,
    /// Number of the register that holds there what the function will return.
    pub(crate) result: u64,
}

impl FoundPlace {
    /// How to read this one.
    pub(crate) fn extractor(self, of_hook: &Extractor) -> Extractor {
        let mut extractor = *of_hook;
        for step in extractor.key.iter_mut().chain(&mut extractor.class).chain(&mut extractor.request_id) {
            if step.action == Action::Register as u32 && step.value == register::RESULT {
                step.value = self.result;
            }
        }
        extractor
    }
}

/// Which of a runtime's copies in a process it is: some libraries are loaded more than once.
#[derive(Clone, Copy)]
pub(crate) struct Copy {
    /// Its number, from 0.
    pub(crate) number: usize,
    /// How many there are.
    pub(crate) of: usize,
}

/// The files of a process that its hooks are in.
pub(crate) struct Finder<'a> {
    mappings: &'a Mappings,
    runtime: &'a Runtime,
    copy: Copy,
    memory: Live,
    /// Files that are open, by address of their mapping.
    images: RefCell<HashMap<u64, Rc<Image>>>,
}

/// A module of the process.
struct Module<'a> {
    map: &'a MemoryMap,
    image: Rc<Image>,
    /// What to add to its addresses.
    bias: u64,
}

impl<'a> Finder<'a> {
    /// Looks for the places of this runtime.
    pub(crate) fn of(mappings: &'a Mappings, runtime: &'a Runtime, copy: Copy) -> Result<Self, String> {
        let memory = Live::of(mappings.pid).map_err(|error| error.to_string())?;
        Ok(Self { mappings, runtime, copy, memory, images: RefCell::default() })
    }

    /// Finds all hooks that the runtime's profile has for a process like this. An error says which one is missing.
    pub(crate) fn all(&self) -> Result<Vec<Found<'a>>, String> {
        let version = self.version()?;
        let mut wanted = Vec::new();
        for hook in self.runtime.profile.hooks.iter().filter(|hook| hook.is_in(version.as_deref())) {
            if self.is_needed(hook)? {
                wanted.push(hook);
            }
        }
        if wanted.is_empty() {
            return Err(format!("how version {} puts work off is not known", version.unwrap_or_default()));
        }
        let found = wanted.into_iter().map(|hook| (hook.optional, self.find(hook)));
        let found = found.filter(|(optional, found)| !optional || found.is_ok()).map(|(_, found)| found);
        Ok(found.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
    }

    /// What its version is; `None` if the profile does not ask.
    fn version(&self) -> Result<Option<String>, String> {
        let Some(version) = &self.runtime.profile.version else { return Ok(None) };
        let module = self.open(&self.runtime.module)?;
        let symbol = module.symbol(&version.symbol);
        let address = symbol.ok_or_else(|| format!("it has no symbol {}", version.symbol))?;
        match version.is {
            VersionKind::Hex => {
                let number = self.memory.word(address).ok_or("its version cannot be read")?.to_le_bytes();
                Ok(Some(format!("{}.{}.{}", number[3], number[2], number[1])))
            }
            VersionKind::String => {
                self.memory.c_string(address, "version").map(Some).map_err(|error| format!("{error:#}"))
            }
        }
    }

    /// Whether a hook has a part in this process.
    fn is_needed(&self, hook: &Hook) -> Result<bool, String> {
        if hook.unless.is_empty() {
            return Ok(true);
        }
        Ok(self.open(&self.runtime.module)?.functions(&hook.unless).is_err())
    }

    /// Finds one hook, in each copy of its module that belongs to this copy of the runtime. An error says what is missing.
    pub(crate) fn find<'p>(&self, hook: &'p Hook) -> Result<Vec<Found<'p>>, String> {
        let Some(beginning) = &hook.module else {
            return Ok(vec![self.find_in(&self.runtime.module, hook)?]);
        };
        let own = &self.runtime.module;
        if module_name(own).is_some_and(|name| name.starts_with(beginning)) {
            return Ok(vec![self.find_in(own, hook)?]);
        }
        let mut homes: Vec<_> = self.mappings.modules_named(beginning).collect();
        let Some(&first) = homes.first() else { return Err(format!("no module {beginning} is loaded")) };
        homes.retain(|home| self.has(home, hook));
        match homes.as_slice() {
            [] => Ok(vec![self.find_in(first, hook)?]),
            // What was loaded together is in the same order.
            each if each.len() == self.copy.of => Ok(vec![self.find_in(each[self.copy.number], hook)?]),
            all => all.iter().map(|home| self.find_in(home, hook)).collect(),
        }
    }

    /// Whether a module has what a hook names: another one's name may begin alike.
    fn has(&self, home: &'a MemoryMap, hook: &Hook) -> bool {
        self.open(home).is_ok_and(|module| match &hook.site {
            Wanted::Named(names) | Wanted::BehindJump(names) => module.functions(names).is_ok(),
            Wanted::InTable(table) => module.symbol(&table.symbol).is_some(),
        })
    }

    fn find_in<'p>(&self, home: &'a MemoryMap, hook: &'p Hook) -> Result<Found<'p>, String> {
        let (module, functions) = match &hook.site {
            Wanted::Named(names) => {
                let module = self.open(home)?;
                let functions = module.functions(names)?;
                (module, functions)
            }
            Wanted::BehindJump(names) => {
                let module = self.open(home)?;
                let functions = module.functions(names)?.into_iter().map(|function| {
                    instructions::jump_target(&module.image.elf, function)
                        .ok_or_else(|| format!("{} does more than jump to another function", hook.place()))
                });
                let functions = functions.collect::<Result<Vec<_>, _>>()?;
                (module, functions)
            }
            Wanted::InTable(table) => self.behind(home, table)?,
        };
        let too_many = |count| format!("{} stands for {count} places", hook.place());
        if functions.len() > PLACES {
            return Err(too_many(functions.len()));
        }
        let mut places = Vec::new();
        for function in functions {
            let elf = &module.image.elf;
            let needs_result = hook.key.as_ref().is_some_and(|key| key.register == register::RESULT);
            let addresses = match hook.at {
                At::Entry => {
                    let entry = instructions::entry(elf, function, &hook.registers());
                    entry.into_iter().map(|address| (address, register::RESULT)).collect()
                }
                At::Return => instructions::ends(elf, function, needs_result)
                    .map_err(|why| format!("where {} returns is not known: {why}", hook.place()))?
                    .into_iter()
                    .map(|end| (end.address, end.result))
                    .collect::<Vec<_>>(),
            };
            for (address, result) in addresses {
                let offset = elf.file_offset(address).ok_or("a function is not in its file")?;
                places.push(FoundPlace { offset, address: address.wrapping_add(module.bias), result });
            }
        }
        if places.is_empty() || places.len() > PLACES {
            return Err(too_many(places.len()));
        }
        let name = format!("{} in {}", hook.place(), module_name(module.map).unwrap_or_default());
        let extractor = self.extractor(hook)?;
        Ok(Found { hook, name, image: module.image, file: file_id(module.map), places, extractor })
    }

    fn open(&self, map: &'a MemoryMap) -> Result<Module<'a>, String> {
        let mut images = self.images.borrow_mut();
        let image = match images.entry(map.address.0) {
            Entry::Occupied(known) => Rc::clone(known.get()),
            Entry::Vacant(place) => {
                let image = Image::of(self.mappings, map).map_err(|error| format!("{error:#}"))?;
                Rc::clone(place.insert(Rc::new(image)))
            }
        };
        let bias = image.elf.bias(map).ok_or("its mapping is not understood")?;
        Ok(Module { map, image, bias })
    }

    /// The function that pointers in memory lead to, and the module it is in.
    fn behind(&self, home: &'a MemoryMap, table: &Table) -> Result<(Module<'a>, Vec<u64>), String> {
        let start = self.open(home)?.symbol(&table.symbol);
        let mut address = start.ok_or_else(|| format!("it has no symbol {}", table.symbol))?;
        for offset in &table.path {
            address = self
                .memory
                .word(address.wrapping_add(*offset))
                .ok_or_else(|| format!("{} leads nowhere", table.symbol))?;
        }
        let map = self.mappings.code(address).ok_or_else(|| format!("{} leads to no code", table.symbol))?;
        let module = self.open(map)?;
        let function = address.wrapping_sub(module.bias);
        Ok((module, vec![function]))
    }

    /// The steps that the programs take at a hook.
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
        if let Some(told) = &hook.request_id {
            for test in &told.when {
                request_id.extend(self.test(test)?);
            }
            request_id.extend(steps(&told.is).chain([take(0)]));
        }
        let mut extractor = Extractor {
            key: [Op::END; KEY_STEPS],
            class: [Op::END; CLASS_STEPS],
            request_id: [Op::END; REQUEST_ID_STEPS],
            context: ThreadLocal::NONE,
        };
        extractor.key.iter_mut().zip(key).for_each(|(place, step)| *place = step);
        extractor.class.iter_mut().zip(class).for_each(|(place, step)| *place = step);
        extractor.request_id.iter_mut().zip(request_id).for_each(|(place, step)| *place = step);
        Ok(extractor)
    }

    fn case(&self, case: &Case) -> Result<Vec<Op>, String> {
        let mut all = vec![Op { action: Action::Case as u32, ..Op::END }];
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
                .ok_or_else(|| format!("it has no symbol {name}"))?
                .wrapping_add(*add),
        };
        let compare = Op { action: Action::Test as u32, offset: 0, mask: test.mask, value };
        Ok(steps(&test.path).chain([compare]).collect())
    }
}

impl Module<'_> {
    /// Address in the process of what it defines by this name.
    fn symbol(&self, name: &str) -> Option<u64> {
        Some(self.image.symbol(name)?.wrapping_add(self.bias))
    }

    /// Addresses in the file of what the first of these names stands for that stands for anything.
    fn functions(&self, names: &[String]) -> Result<Vec<u64>, String> {
        let all = names.iter().map(|name| self.image.functions(name));
        let mut found = all.filter(|functions| !functions.is_empty());
        found.next().ok_or_else(|| {
            let module = module_name(self.map).unwrap_or_default();
            format!("{module} has no function {}, or its symbols were taken out of it", names.join(" or "))
        })
    }
}

/// The steps to a value.
fn steps(path: &Steps) -> impl Iterator<Item = Op> + '_ {
    let register = Op { action: Action::Register as u32, value: path.register, ..Op::END };
    let hop = |hop: &Hop| match *hop {
        Hop::Add(offset) => Op { action: Action::Add as u32, offset, ..Op::END },
        Hop::Load(offset) => Op { action: Action::Load as u32, offset, ..Op::END },
    };
    iter::once(register).chain(path.hops.iter().map(hop))
}

/// The last step.
fn take(naming: u32) -> Op {
    Op { action: Action::Take as u32, value: naming.into(), ..Op::END }
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

    /// Two folders, each with a library that puts work off and another one that goes on with it.
    #[test]
    fn copies_of_two_libraries_belong_together_as_they_were_loaded() {
        const SCRIPT: &str = "import ctypes, sys
loaded = [ctypes.CDLL(path) for path in sys.argv[1:]]
print(flush=True)
sys.stdin.read()";
        if Command::new("gcc").arg("--version").output().is_err() {
            eprintln!("skipped: copies_of_two_libraries_belong_together: there is no gcc here");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for (part, name, function) in [
            ("one", "libputting.so", "put_off"),
            ("one", "libgoing.so", "go_on"),
            ("other", "libputting.so", "put_off"),
            ("other", "libgoing.so", "go_on"),
            // What begins alike and has no such function is another library.
            ("other", "libgoing-on.so", "stand_still"),
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
        let (snapshot, restore) = (hook("libputting:put_off:arg0"), hook("libgoing:go_on:arg0"));
        let profile = Profile::of_own_library(&snapshot, &restore, None);
        let copies = Runtimes::of_profiles(vec![Arc::new(profile)]).of(&mappings);
        let folders = copies.iter().enumerate().map(|(number, runtime)| {
            let finder = Finder::of(&mappings, runtime, Copy { number, of: copies.len() }).unwrap();
            let found = runtime.profile.hooks.iter().flat_map(|hook| finder.find(hook).unwrap());
            let places: Vec<_> = found.flat_map(|found| found.places).collect();
            let folder_of = |place: &FoundPlace| match &mappings.code(place.address).unwrap().pathname {
                MMapPath::Path(path) => path.parent().unwrap().to_owned(),
                other => panic!("{other:?}"),
            };
            assert_eq!(places.len(), 2);
            assert_eq!(folder_of(&places[0]), folder_of(&places[1]));
            folder_of(&places[0])
        });
        let folders: BTreeSet<_> = folders.collect();
        // It waits for its standard input to end.
        drop(python.stdin.take());
        python.wait().unwrap();
        assert_eq!(folders, ["one", "other"].map(|part| folder.path().join(part)).into());
    }
}
