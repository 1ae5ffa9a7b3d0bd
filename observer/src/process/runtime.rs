//! Recognises the runtimes of a process by applying profiles to its mapped files, and locates their garbage collectors.

use std::{collections::HashMap, fs::File, io, sync::Arc};

use observer_common::gc::{PARTS, Totals as TotalsAddresses};
use procfs::process::MemoryMap;

use crate::{
    arch::{accessor::PointerChain, instructions},
    binary::{
        elf::Elf,
        image::Image,
        mappings::{FileId, Mappings, Version, file_id, module_name},
        memory::ProcessMemory,
    },
    kernel::uprobe::Site,
    profiles::{Collector, Functions, Profile, Totals, Usdt},
};

/// Maximum number of files whose result is cached, so that each file is read once for all processes.
const MAX_FILES: usize = 1024;

/// Maximum number of sites of one USDT probe.
const MAX_SITES: usize = 16;

/// Number of bytes of a function's code that are decoded.
const CODE_LENGTH: u64 = 64;

/// Recognises runtimes by profiles. Caches results by file.
pub(crate) struct Runtimes {
    profiles: Vec<Arc<Profile>>,
    /// Runtimes in each file; empty if it has none.
    files: HashMap<(FileId, Option<Version>), Vec<Arc<Module>>>,
    /// Profiles that the user asked for and that no process has matched so far.
    unmet: Vec<Arc<Profile>>,
}

/// A runtime in a file.
struct Module {
    profile: Arc<Profile>,
    /// How its collector can be watched, or why not; `None` if its profile has no `gc`.
    collector: Option<Result<CollectorInFile, String>>,
}

/// How a collector can be watched, by addresses in a file.
enum CollectorInFile {
    Probes(Probes),
    Totals { totals: Totals, version: u64, count: PointerChain },
}

/// Sites where collections start and end.
#[derive(Clone, Debug)]
pub(crate) struct Probes {
    pub(crate) start: Vec<Site>,
    pub(crate) done: Vec<Site>,
}

/// A runtime in a process.
pub(crate) struct Runtime {
    /// Display name, with its module: `CPython in python3.11`.
    pub(crate) name: String,
    /// The profile that matched.
    pub(crate) profile: Arc<Profile>,
    /// A mapping of the module's code.
    pub(crate) module: MemoryMap,
    /// How its collector can be watched, or why not; `None` if its profile has no `gc`.
    pub(crate) collector: Option<Result<Watch, String>>,
}

/// How a collector can be watched in a process.
pub(crate) enum Watch {
    /// By probes in this file.
    Probes(File, Probes),
    /// By totals in the process's memory.
    Totals(ProcessMemory, TotalsAddresses),
    /// Not yet: the runtime is not initialised.
    NotYet,
}

impl Runtimes {
    /// Recognises runtimes by these profiles.
    pub(crate) fn of_profiles(profiles: Vec<Arc<Profile>>) -> Self {
        Self { profiles, files: HashMap::new(), unmet: Vec::new() }
    }

    /// Tracks, of the profiles that match `is_asked_for`, which ones no process matches; see [`Self::unmet`].
    pub(crate) fn asked_for(mut self, is_asked_for: impl Fn(&Arc<Profile>) -> bool) -> Self {
        self.unmet = self.profiles.iter().filter(|profile| is_asked_for(profile)).cloned().collect();
        self
    }

    /// Profiles that the user asked for and that no process has matched so far: name, and the reason.
    pub(crate) fn unmet(&self) -> Vec<(String, String)> {
        let why = |profile: &Profile| match &profile.library {
            Some(library) => {
                format!("no process that was checked maps a file whose name begins with {library}")
            }
            None => {
                let markers = profile.marker.as_slice().join(" or ");
                format!("no process that was checked has a module that defines {markers}")
            }
        };
        self.unmet.iter().map(|profile| (profile.name.clone(), why(profile))).collect()
    }

    /// Runtimes of a process; empty if it has none that a profile describes.
    pub(crate) fn of(&mut self, mappings: &Mappings) -> Vec<Runtime> {
        let mut found = Vec::new();
        for map in mappings.modules() {
            let key = (file_id(map), mappings.version(map));
            if !self.files.contains_key(&key) {
                if self.files.len() >= MAX_FILES {
                    self.files.clear();
                }
                self.files.insert(key, self.in_file(mappings, map));
            }
            let here = self.files[&key].iter().filter(|module| module.profile.may_be_in(map));
            found.extend(here.map(|module| module.in_process(mappings, map)));
        }
        found.retain(|runtime| {
            let needs = runtime.profile.needs.as_deref();
            needs.is_none_or(|needs| mappings.modules_named(needs).next().is_some())
        });
        // A library named on the command line counts as found by its file name, so that missing functions are reported.
        let missing = self.profiles.iter().filter(|profile| {
            profile.library.is_some() && !found.iter().any(|runtime| Arc::ptr_eq(&runtime.profile, profile))
        });
        let named = missing.filter_map(|profile| {
            let map = mappings.modules_named(profile.library.as_deref()?).next()?;
            let module = Module { profile: Arc::clone(profile), collector: None };
            Some(module.in_process(mappings, map))
        });
        let named: Vec<_> = named.collect();
        found.extend(named);
        self.unmet.retain(|profile| !found.iter().any(|runtime| Arc::ptr_eq(&runtime.profile, profile)));
        found
    }

    /// Runtimes in the file behind a mapping; empty if it is not valid ELF.
    fn in_file(&self, mappings: &Mappings, map: &MemoryMap) -> Vec<Arc<Module>> {
        let Ok(image) = Image::of(mappings, map) else { return Vec::new() };
        let markers: Vec<_> = self.profiles.iter().flat_map(|profile| profile.marker.as_slice()).collect();
        let markers: Vec<_> = markers.into_iter().map(String::as_str).collect();
        let mut found = image.symbols(&markers).into_iter();
        let is_there = |profile: &&Arc<Profile>| {
            let markers = found.by_ref().take(profile.marker.as_slice().len());
            // Symbols are in the order of the markers: each profile consumes its share.
            markers.filter(Option::is_some).count() > 0
        };
        self.profiles.iter().filter(is_there).map(|profile| Arc::new(Module::of(profile, &image))).collect()
    }
}

impl Module {
    fn of(profile: &Arc<Profile>, image: &Image) -> Self {
        let collector = profile.gc.as_ref().map(|collector| match collector {
            Collector::Usdt(usdt) => usdt.find(&image.elf).map(CollectorInFile::Probes),
            Collector::Functions(functions) => functions.find(image).map(CollectorInFile::Probes),
            Collector::Totals(totals) => totals.find(image),
        });
        Self { profile: Arc::clone(profile), collector }
    }

    fn in_process(&self, mappings: &Mappings, map: &MemoryMap) -> Runtime {
        let module = module_name(map).unwrap_or_default();
        let collector = self.collector.as_ref().map(|collector| {
            let collector = collector.as_ref().map_err(Clone::clone);
            collector.and_then(|in_file| in_file.in_process(mappings, map))
        });
        Runtime {
            name: format!("{} in {module}", self.profile.name),
            profile: Arc::clone(&self.profile),
            module: map.clone(),
            collector,
        }
    }
}

impl CollectorInFile {
    fn in_process(&self, mappings: &Mappings, map: &MemoryMap) -> Result<Watch, String> {
        let text = |error: io::Error| error.to_string();
        match self {
            Self::Probes(probes) => Ok(Watch::Probes(mappings.open(map).map_err(text)?, probes.clone())),
            Self::Totals { totals, version, count } => {
                let elf = mappings.open(map).map_err(text)?;
                let elf = Elf::open(&elf).map_err(|error| error.to_string())?;
                let bias = elf.bias(map).ok_or("its load address cannot be determined")?;
                let memory = ProcessMemory::of(mappings.pid).map_err(text)?;
                let version = memory.c_string(version.wrapping_add(bias), "version");
                let version = version.map_err(|error| format!("{error:#}"))?;
                let offsets = totals.nanoseconds_of(&version);
                let offsets =
                    offsets.ok_or_else(|| format!("the profile has no offsets for version {version}"))?;
                let Some(count) = count.follow(&memory, bias) else { return Ok(Watch::NotYet) };
                let mut ns_addresses = [0; PARTS];
                for (address, offset) in ns_addresses.iter_mut().zip(offsets) {
                    *address = count.wrapping_add(*offset);
                }
                Ok(Watch::Totals(
                    memory,
                    TotalsAddresses { count_address: count, ns_addresses, count: 0, ns: 0 },
                ))
            }
        }
    }
}

impl Usdt {
    fn find(&self, elf: &Elf) -> Result<Probes, String> {
        let sites = |name: &str| {
            let found = elf.usdt(&self.provider, name);
            let offset = |address| elf.file_offset(address).ok_or("a USDT probe is not in its file");
            let sites = found.iter().take(MAX_SITES).map(|probe| {
                if instructions::is_unsafe_place(elf, probe.location) {
                    return Err("its USDT probe is on an instruction that some kernels replace by a call");
                }
                let counter = if probe.semaphore == 0 { 0 } else { offset(probe.semaphore)? };
                Ok(Site { instruction: offset(probe.location)?, counter })
            });
            match sites.collect::<Result<Vec<_>, &str>>() {
                Ok(sites) if sites.is_empty() => {
                    Err(format!("it was built without the USDT probe {}:{name}", self.provider))
                }
                other => other.map_err(Into::into),
            }
        };
        Ok(Probes { start: sites(&self.start)?, done: sites(&self.done)? })
    }
}

impl Functions {
    fn find(&self, image: &Image) -> Result<Probes, String> {
        let site = |names: &[String]| {
            let names: Vec<_> = names.iter().map(String::as_str).collect();
            let address = image.symbols(&names).into_iter().flatten().next();
            let address = address.ok_or_else(|| format!("it has no function {}", names.join(" or ")))?;
            let first =
                instructions::entry(&image.elf, address, &[]).ok_or("a function is not in its file")?;
            let instruction = image.elf.file_offset(first).ok_or("a function is not in its file")?;
            Ok::<_, String>(vec![Site { instruction, counter: 0 }])
        };
        Ok(Probes { start: site(&self.start)?, done: site(&self.done)? })
    }
}

impl Totals {
    fn find(&self, image: &Image) -> Result<CollectorInFile, String> {
        let version = image.symbol(&self.version);
        let count = image.symbol(&self.count);
        let version = version.ok_or_else(|| format!("it has no symbol {}", self.version))?;
        let count = count.ok_or_else(|| format!("it has no function {}", self.count))?;
        let chain = image.elf.code(count, CODE_LENGTH).and_then(|code| PointerChain::of(code, count));
        let count =
            chain.ok_or_else(|| format!("the code of its function {} is not recognised", self.count))?;
        Ok(CollectorInFile::Totals { totals: self.clone(), version, count })
    }
}
