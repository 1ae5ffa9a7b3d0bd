//! Parses BTF, the kernel's type information, as far as field offsets and argument lists need it. aya uses BTF for
//! relocations but does not expose the members of structures.

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

/// Maximum nesting of anonymous structures: a malformed file could nest a structure in itself.
const MAX_DEPTH: usize = 8;

/// Maximum number of members visited in a search: a malformed file could contain any number.
const MAX_MEMBERS: usize = 1 << 16;

/// The types of a kernel.
pub(crate) struct Btf<'a> {
    strings: &'a [u8],
    types: Vec<Type<'a>>,
}

/// A type: name, kind, and the undecoded data behind them.
#[derive(Clone, Copy)]
struct Type<'a> {
    /// Offset of the name in the strings.
    name: u32,
    info: u32,
    /// Size in bytes or the id of another type, depending on the kind.
    size_or_type: u32,
    /// Data that depends on the kind, such as members.
    rest: &'a [u8],
}

impl Type<'_> {
    const fn kind(&self) -> u32 {
        (self.info >> 24) & 0x1f
    }

    const fn len(&self) -> usize {
        (self.info & 0xffff) as usize
    }

    /// Whether member offsets have the width of a bit field in their upper byte.
    const fn has_bitfields(&self) -> bool {
        self.info >> 31 == 1
    }
}

/// A member of a structure: its type, and its offset in bits.
struct Member {
    type_id: u32,
    bits: u32,
}

impl<'a> Btf<'a> {
    /// Parses the contents of `/sys/kernel/btf/vmlinux`. Fails if they are malformed or in another byte order.
    pub(crate) fn parse(data: &'a [u8]) -> Result<Self> {
        ensure!(
            data.len() >= HEADER && data[..2] == MAGIC.to_ne_bytes(),
            "not BTF in this machine's byte order"
        );
        let header = word(data, 4)? as usize;
        let section = |at: usize| -> Result<&'a [u8]> {
            let (offset, length) = (word(data, at)? as usize, word(data, at + 4)? as usize);
            data.get(header + offset..header + offset + length).context("BTF is truncated")
        };
        let (mut rest, strings) = (section(8)?, section(16)?);
        // Id 0 is `void`, which the file omits.
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
                kind => bail!("BTF has a type of unknown kind {kind}"),
            };
            found.rest = rest.get(12..12 + extra).context("BTF is truncated")?;
            types.push(found);
            rest = &rest[12 + extra..];
        }
        Ok(Self { strings, types })
    }

    /// Offset in bytes of a member, given as a path such as `__sk_common.skc_num`. Anonymous structures and unions are
    /// searched implicitly. `None` if this kernel has no such structure or member.
    pub(crate) fn offset(&self, structure: &str, path: &str) -> Option<u32> {
        let mut at =
            self.types.iter().position(|t| t.kind() == STRUCT && self.is_named(t.name, structure))?;
        let mut bits = 0;
        for name in path.split('.') {
            let mut left = MAX_MEMBERS;
            let member = self.member(at, name, MAX_DEPTH, &mut left)?;
            bits = member.bits.checked_add(bits)?;
            at = self.resolve(member.type_id)?;
        }
        (bits % 8 == 0).then_some(bits / 8)
    }

    /// Whether each argument of a BTF tracepoint is a pointer; the first one is the tracepoint's private data. `None`
    /// if this kernel has no such tracepoint.
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

    /// Finds a member of a structure, or of anonymous structures in it up to `depth`. `left` is the number of members
    /// that may still be visited.
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

    /// Resolves typedefs and qualifiers.
    fn resolve(&self, type_id: u32) -> Option<usize> {
        let mut id = type_id as usize;
        // A longer chain is a cycle in a malformed file.
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
    let bytes = data.get(at..at + 4).context("BTF is truncated")?;
    Ok(u32::from_ne_bytes(bytes.try_into()?))
}
