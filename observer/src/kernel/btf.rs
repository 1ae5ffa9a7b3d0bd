//! Reads BTF, the kernel's description of its own types, as far as field offsets and argument lists need it.
//! The loader's library relocates C programs with it but shows nobody a structure's members.

use anyhow::{Context as _, Result, bail, ensure};

const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;

// Kinds, as in include/uapi/linux/btf.h.
const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// How deep structures without a name are in each other, at most; deeper ones are in themselves, in a broken file.
const DEPTH: usize = 8;

/// How many members are looked at on the way to one, at most: such a file could name any number.
const MEMBERS: usize = 1 << 16;

/// The types of one kernel.
pub(crate) struct Btf<'a> {
    strings: &'a [u8],
    types: Vec<Type<'a>>,
}

/// One type: its name's offset, what it is, and the rest undecoded.
#[derive(Clone, Copy)]
struct Type<'a> {
    name: u32,
    info: u32,
    /// Size in bytes or another type's id, by kind.
    size_or_type: u32,
    rest: &'a [u8],
}

impl Type<'_> {
    const fn kind(&self) -> u32 {
        (self.info >> 24) & 0x1f
    }

    const fn len(&self) -> usize {
        (self.info & 0xffff) as usize
    }

    /// Whether member offsets carry the width of a bit field in their upper byte.
    const fn has_bitfields(&self) -> bool {
        self.info >> 31 == 1
    }
}

/// A member found by name: its type, and its offset in bits.
struct Member {
    type_id: u32,
    bits: u32,
}

impl<'a> Btf<'a> {
    /// Parses the contents of `/sys/kernel/btf/vmlinux`. Fails on anything that is not such a file.
    pub(crate) fn parse(data: &'a [u8]) -> Result<Self> {
        ensure!(
            data.len() >= HEADER && data[..2] == MAGIC.to_ne_bytes(),
            "not BTF of this machine's byte order"
        );
        let header = word(data, 4)? as usize;
        let section = |at: usize| -> Result<&'a [u8]> {
            let (offset, length) = (word(data, at)? as usize, word(data, at + 4)? as usize);
            data.get(header + offset..header + offset + length).context("BTF is cut short")
        };
        let (mut rest, strings) = (section(8)?, section(16)?);
        // Id 0 is `void`, which the file leaves out.
        let mut types = vec![Type { name: 0, info: 0, size_or_type: 0, rest: &[] }];
        while !rest.is_empty() {
            let (name, info, size_or_type) = (word(rest, 0)?, word(rest, 4)?, word(rest, 8)?);
            let mut found = Type { name, info, size_or_type, rest: &[] };
            let extra = match found.kind() {
                INT | VAR | DECL_TAG => 4,
                ARRAY => 12,
                STRUCT | UNION | DATASEC | ENUM64 => 12 * found.len(),
                ENUM | FUNC_PROTO => 8 * found.len(),
                0..=TYPE_TAG => 0,
                kind => bail!("BTF has a type of an unknown kind {kind}"),
            };
            found.rest = rest.get(12..12 + extra).context("BTF is cut short")?;
            types.push(found);
            rest = &rest[12 + extra..];
        }
        Ok(Self { strings, types })
    }

    /// Offset in bytes of a member, given as a path: `__sk_common.skc_num`. Anonymous structures and unions
    /// on the way need no naming. `None` if this kernel has no such structure or member.
    pub(crate) fn offset(&self, structure: &str, path: &str) -> Option<u32> {
        let mut at =
            self.types.iter().position(|t| t.kind() == STRUCT && self.is_named(t.name, structure))?;
        let mut bits = 0;
        for name in path.split('.') {
            let mut left = MEMBERS;
            let member = self.member(at, name, DEPTH, &mut left)?;
            bits = member.bits.checked_add(bits)?;
            at = self.resolve(member.type_id)?;
        }
        (bits % 8 == 0).then_some(bits / 8)
    }

    /// Whether each argument of a tracepoint's programs is a pointer, the first being the tracepoint's own
    /// data. `None` if this kernel has no such tracepoint.
    pub(crate) fn tracepoint_arguments(&self, name: &str) -> Option<Vec<bool>> {
        let name = format!("btf_trace_{name}");
        let typedef = self.types.iter().find(|t| t.kind() == TYPEDEF && self.is_named(t.name, &name))?;
        let pointer = self.types.get(typedef.size_or_type as usize)?;
        let prototype = self.types.get(pointer.size_or_type as usize).filter(|t| t.kind() == FUNC_PROTO)?;
        (0..prototype.len())
            .map(|n| {
                let argument = self.resolve(word(prototype.rest, 8 * n + 4).ok()?)?;
                Some(self.types[argument].kind() == PTR)
            })
            .collect()
    }

    /// Searches a structure, and what is anonymous in it down to this depth, for a member; `left` is how
    /// many more may be looked at.
    fn member(&self, structure: usize, name: &str, depth: usize, left: &mut usize) -> Option<Member> {
        let structure = self.types.get(structure).filter(|t| matches!(t.kind(), STRUCT | UNION))?;
        for n in 0..structure.len() {
            *left = left.checked_sub(1)?;
            let row = &structure.rest[12 * n..];
            let (member_name, type_id, offset) = (word(row, 0).ok()?, word(row, 4).ok()?, word(row, 8).ok()?);
            let bits = if structure.has_bitfields() { offset & 0x00ff_ffff } else { offset };
            if self.is_named(member_name, name) {
                return Some(Member { type_id, bits });
            }
            if member_name == 0
                && let Some(deeper) = depth.checked_sub(1)
                && let Some(inner) = self.member(self.resolve(type_id)?, name, deeper, left)
            {
                return Some(Member { bits: bits.checked_add(inner.bits)?, ..inner });
            }
        }
        None
    }

    /// Sees through typedefs and qualifiers.
    fn resolve(&self, type_id: u32) -> Option<usize> {
        let mut id = type_id as usize;
        // A chain longer than this is a cycle in a broken file.
        for _ in 0..32 {
            let found = self.types.get(id)?;
            match found.kind() {
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => id = found.size_or_type as usize,
                _ => return Some(id),
            }
        }
        None
    }

    fn is_named(&self, offset: u32, name: &str) -> bool {
        self.strings
            .get(offset as usize..)
            .is_some_and(|s| s.starts_with(name.as_bytes()) && s.get(name.len()) == Some(&0))
    }
}

fn word(data: &[u8], at: usize) -> Result<u32> {
    let bytes = data.get(at..at + 4).context("BTF is cut short")?;
    Ok(u32::from_ne_bytes(bytes.try_into()?))
}
