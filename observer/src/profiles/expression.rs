//! Expressions of profiles: paths, which start in a register and follow pointers (`arg0+16->8->-56`), and tests of the
//! value at a path (`arg0->0 & 0x1f == 7`).

use std::str::FromStr;

use observer_common::deferred::register;
use serde::Deserialize;

/// Maximum number of pointers that a path follows.
const MAX_POINTERS: usize = 8;

/// The path to a value: the register, and the operations on its value.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Path {
    /// Number of the register, as in `observer_common::deferred::register`.
    pub(crate) register: u64,
    /// Operations, in order.
    pub(crate) hops: Vec<Hop>,
}

/// An operation of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hop {
    /// Adds an offset in bytes.
    Add(i32),
    /// Loads the word at an offset in bytes.
    Load(i32),
}

/// A comparison of the value at a path.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Test {
    /// The value.
    pub(crate) path: Path,
    /// Bits of the value that are compared.
    pub(crate) mask: u64,
    /// What they must be equal to.
    pub(crate) with: Operand,
}

/// The right side of a comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    /// A number.
    Number(u64),
    /// The address of a symbol, plus an offset in bytes.
    Symbol(String, u64),
}

impl FromStr for Path {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split("->").map(|part| match part.split_once('+') {
            Some((place, add)) => (place.trim(), Some(add.trim())),
            None => (part.trim(), None),
        });
        let (name, add) = parts.next().unwrap_or_default();
        let register = register_number(name)?;
        let added = |add: &str| Ok::<_, String>(Hop::Add(offset(add)?));
        let mut hops = Vec::from_iter(add.map(added).transpose()?);
        let mut pointers = 0;
        for (place, add) in parts {
            pointers += 1;
            hops.push(Hop::Load(offset(place)?));
            hops.extend(add.map(added).transpose()?);
        }
        if pointers > MAX_POINTERS {
            return Err(format!("`{text}` follows {pointers} pointers (at most {MAX_POINTERS})"));
        }
        Ok(Self { register, hops })
    }
}

impl FromStr for Test {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (left, right) =
            text.split_once("==").ok_or_else(|| format!("`{text}` is not a comparison: it has no =="))?;
        let (path, mask) = match left.split_once('&') {
            Some((path, mask)) => (path, number(mask.trim())?),
            None => (left, u64::MAX),
        };
        let right = right.trim();
        let with = if right.starts_with(|c: char| c.is_ascii_digit()) {
            Operand::Number(number(right)?)
        } else if right.is_empty() {
            return Err(format!("`{text}` has nothing after =="));
        } else {
            let (name, add) = match right.split_once('+') {
                Some((name, add)) => (name.trim(), number(add.trim())?),
                None => (right, 0),
            };
            Operand::Symbol(name.to_owned(), add)
        };
        Ok(Self { path: path.parse()?, mask, with })
    }
}

impl TryFrom<String> for Path {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl TryFrom<String> for Test {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

fn register_number(name: &str) -> Result<u64, String> {
    /// The registers of the integer arguments, in the order of the arguments.
    const ARGUMENTS: [&str; 6] = ["rdi", "rsi", "rdx", "rcx", "r8", "r9"];

    let argument = |n: usize| u64::try_from(n).expect("a small number");
    if name == "result" || name == "rax" {
        return Ok(register::RESULT);
    }
    let numbered = name.strip_prefix("arg").and_then(|n| n.parse().ok()).filter(|&n| n < ARGUMENTS.len());
    numbered
        .or_else(|| ARGUMENTS.iter().position(|register| *register == name))
        .map(argument)
        .or_else(|| {
            let other = register::NAMES.iter().position(|register| *register == name)?;
            Some(register::OTHERS + argument(other))
        })
        .ok_or_else(|| {
            format!(
                "`{name}` is not a register (known: arg0 to arg5, result, and registers by name, such as rbx)"
            )
        })
}

/// Parses an unsigned number, decimal or with `0x`.
fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("`{text}` is not a number"))
}

/// Parses a number that may be negative.
fn offset(text: &str) -> Result<i32, String> {
    let (is_negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let size = i32::try_from(number(digits)?).map_err(|_| format!("`{text}` does not fit into 32 bits"))?;
    Ok(if is_negative { -size } else { size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_start_in_registers() {
        let path = |text: &str| text.parse::<Path>();
        assert_eq!(path("arg1").unwrap(), Path { register: 1, hops: vec![] });
        let within = path("arg1+88->8 + 24").unwrap();
        assert_eq!(within, Path { register: 1, hops: vec![Hop::Add(88), Hop::Load(8), Hop::Add(24)] });
        assert_eq!(path("rsi").unwrap(), path("arg1").unwrap());
        assert_eq!(path("result->8").unwrap(), Path { register: register::RESULT, hops: vec![Hop::Load(8)] });
        let far = path("rbx -> 0x28 -> -56").unwrap();
        assert_eq!(far, Path { register: register::OTHERS, hops: vec![Hop::Load(0x28), Hop::Load(-56)] });
        for wrong in
            ["", "arg6", "arg", "8", "arg0->", "arg0->x", "arg0->99999999999", "arg0 8", "arg0+", "arg0->8+x"]
        {
            assert!(path(wrong).is_err(), "{wrong}");
        }
        assert!(path(&format!("arg0{}", "->0".repeat(9))).is_err());
    }

    #[test]
    fn tests_compare_with_numbers_and_symbols() {
        let test = |text: &str| text.parse::<Test>();
        let path: Path = "arg0->0".parse().unwrap();
        let flags = Test { path: path.clone(), mask: 0x1f, with: Operand::Number(7) };
        assert_eq!(test("arg0->0 & 0x1f == 7").unwrap(), flags);
        let kind = Test { path, mask: u64::MAX, with: Operand::Symbol("_ZTV6Parser".into(), 16) };
        assert_eq!(test("arg0->0 == _ZTV6Parser+16").unwrap(), kind);
        for wrong in ["arg0", "arg0 == ", "arg0 & == 1", "arg0 & x == 1", "arg0 == 1x"] {
            assert!(test(wrong).is_err(), "{wrong}");
        }
    }
}
