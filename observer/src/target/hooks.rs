//! Where in a process the places are that a profile names, and how the programs read them there.

use std::{fs::File, iter};

use observer_common::deferred::{
    Action, CLASS_STEPS, KEY_STEPS, REQUEST_ID_STEPS, Recipe, Step, ThreadLocal, register,
};
use procfs::process::MemoryMap;

use super::runtime::Runtime;
use crate::{
    profiles::{At, Case, Hook, Hop, Operand, Site as Wanted, Steps, Table, Test, VersionKind},
    stacks::{
        elf::Elf,
        instructions,
        mappings::{Mappings, inside, module_name},
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
    /// The file it is in.
    pub(crate) file: File,
    /// The places.
    pub(crate) places: Vec<FoundPlace>,
    /// How to read them, if what a function returns is in its own register.
    pub(crate) recipe: Recipe,
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
    pub(crate) fn recipe(self, of_hook: &Recipe) -> Recipe {
        let mut recipe = *of_hook;
        for step in recipe.key.iter_mut().chain(&mut recipe.class).chain(&mut recipe.request_id) {
            if step.action == Action::Register as u32 && step.value == register::RESULT {
                step.value = self.result;
            }
        }
        recipe
    }
}

/// The files of a process that its hooks are in.
pub(crate) struct Finder<'a> {
    mappings: &'a Mappings,
    runtime: &'a Runtime,
    memory: Live,
}

/// A module of the process, open.
struct Module<'a> {
    map: &'a MemoryMap,
    file: File,
    elf: Elf,
    /// The file with the symbols that were taken out of it.
    debug: Option<Elf>,
    /// What to add to its addresses.
    bias: u64,
}

impl<'a> Finder<'a> {
    /// Looks for the places of this runtime.
    pub(crate) fn of(mappings: &'a Mappings, runtime: &'a Runtime) -> Result<Self, String> {
        let memory = Live::of(mappings.pid).map_err(|error| error.to_string())?;
        Ok(Self { mappings, runtime, memory })
    }

    /// What its version is; `None` if the profile does not ask.
    pub(crate) fn version(&self) -> Result<Option<String>, String> {
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
    pub(crate) fn is_needed(&self, hook: &Hook) -> Result<bool, String> {
        if hook.unless.is_empty() {
            return Ok(true);
        }
        Ok(self.open(&self.runtime.module)?.functions(&hook.unless).is_err())
    }

    /// Finds one hook. An error says what is missing.
    pub(crate) fn find<'p>(&self, hook: &'p Hook) -> Result<Found<'p>, String> {
        let home = match &hook.module {
            None => &self.runtime.module,
            Some(beginning) => {
                self.mappings.module(beginning).ok_or_else(|| format!("no module {beginning} is loaded"))?
            }
        };
        let (module, functions) = match &hook.site {
            Wanted::Named(names) => {
                let module = self.open(home)?;
                let functions = module.functions(names)?;
                (module, functions)
            }
            Wanted::BehindJump(names) => {
                let module = self.open(home)?;
                let functions = module.functions(names)?.into_iter().map(|function| {
                    instructions::jump_target(&module.elf, function)
                        .ok_or_else(|| format!("{} does more than jump to another function", hook.place()))
                });
                let functions = functions.collect::<Result<Vec<_>, _>>()?;
                (module, functions)
            }
            Wanted::InTable(table) => self.behind(home, table)?,
        };
        let mut places = Vec::new();
        for function in functions {
            let elf = &module.elf;
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
            return Err(format!("{} stands for {} places", hook.place(), places.len()));
        }
        let name = format!("{} in {}", hook.place(), module_name(module.map).unwrap_or_default());
        let recipe = self.recipe(hook)?;
        Ok(Found { hook, name, file: module.file, places, recipe })
    }

    fn open(&self, map: &'a MemoryMap) -> Result<Module<'a>, String> {
        let file = self.mappings.open(map).map_err(|error| error.to_string())?;
        let elf = Elf::open(&file).map_err(|error| format!("{error:#}"))?;
        let bias = elf.bias(map).ok_or("its mapping is not understood")?;
        let debug = elf.debug_name().and_then(|name| {
            let path = inside(self.mappings.pid, "/usr/lib/debug/.build-id".as_ref()).join(name);
            Elf::open(&File::open(path).ok()?).ok()
        });
        Ok(Module { map, file, elf, debug, bias })
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
    fn recipe(&self, hook: &Hook) -> Result<Recipe, String> {
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
        let mut recipe = Recipe {
            key: [Step::END; KEY_STEPS],
            class: [Step::END; CLASS_STEPS],
            request_id: [Step::END; REQUEST_ID_STEPS],
            context: ThreadLocal::NONE,
        };
        recipe.key.iter_mut().zip(key).for_each(|(place, step)| *place = step);
        recipe.class.iter_mut().zip(class).for_each(|(place, step)| *place = step);
        recipe.request_id.iter_mut().zip(request_id).for_each(|(place, step)| *place = step);
        Ok(recipe)
    }

    fn case(&self, case: &Case) -> Result<Vec<Step>, String> {
        let mut all = vec![Step { action: Action::Case as u32, ..Step::END }];
        for test in &case.when {
            all.extend(self.test(test)?);
        }
        all.extend(steps(&case.is));
        all.push(take(case.named as u32));
        Ok(all)
    }

    fn test(&self, test: &Test) -> Result<Vec<Step>, String> {
        let value = match &test.with {
            Operand::Number(number) => *number,
            Operand::Symbol(name, add) => self
                .open(&self.runtime.module)?
                .symbol(name)
                .ok_or_else(|| format!("it has no symbol {name}"))?
                .wrapping_add(*add),
        };
        let compare = Step { action: Action::Test as u32, offset: 0, mask: test.mask, value };
        Ok(steps(&test.path).chain([compare]).collect())
    }
}

impl Module<'_> {
    /// Address in the process of what it defines by this name.
    fn symbol(&self, name: &str) -> Option<u64> {
        let [own] = self.elf.symbols([name]);
        let address = own.or_else(|| self.debug.as_ref()?.symbols([name])[0])?;
        Some(address.wrapping_add(self.bias))
    }

    /// Addresses in the file of what the first of these names stands for that stands for anything.
    fn functions(&self, names: &[String]) -> Result<Vec<u64>, String> {
        let all = names.iter().flat_map(|name| {
            let elves = iter::once(&self.elf).chain(&self.debug);
            elves.map(|elf| elf.functions(name))
        });
        let mut found = all.filter(|functions| !functions.is_empty());
        found.next().ok_or_else(|| {
            let module = module_name(self.map).unwrap_or_default();
            format!("{module} has no function {}, or its symbols were taken out of it", names.join(" or "))
        })
    }
}

/// The steps to a value.
fn steps(path: &Steps) -> impl Iterator<Item = Step> + '_ {
    let register = Step { action: Action::Register as u32, value: path.register, ..Step::END };
    let hop = |hop: &Hop| match *hop {
        Hop::Add(offset) => Step { action: Action::Add as u32, offset, ..Step::END },
        Hop::Load(offset) => Step { action: Action::Load as u32, offset, ..Step::END },
    };
    iter::once(register).chain(path.hops.iter().map(hop))
}

/// The last step.
fn take(naming: u32) -> Step {
    Step { action: Action::Take as u32, value: naming.into(), ..Step::END }
}
