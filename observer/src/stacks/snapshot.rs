//! A chain of frames that may change while it is read: it counts as far as two looks agree.

use anyhow::{Result, bail};

/// How often a chain is looked at for two equal looks in a row.
const LOOKS: usize = 6;

/// A frame on an interpreter's stack.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    /// Where it is.
    pub(super) address: u64,
    /// What it executes.
    pub(super) code: u64,
    /// How far it is.
    pub(super) instruction: u64,
}

/// A chain, innermost first, as two looks in a row have seen it. A thread that runs calls and returns between two
/// looks; then the outer frames, which both have seen, are given: it was they that called whatever was missed.
pub(super) fn stable(mut look: impl FnMut() -> Result<Vec<Link>>) -> Result<Vec<Link>> {
    let mut before = look();
    let mut longest = Vec::new();
    for _ in 1..LOOKS {
        let now = look();
        if let (Ok(before), Ok(now)) = (&before, &now) {
            let common = common(before, now);
            if common == before.len() && common == now.len() {
                return Ok(now.clone());
            }
            if common > longest.len() {
                longest = now[now.len() - common..].to_vec();
            }
        }
        before = now;
    }
    if longest.is_empty() {
        before?;
        bail!("its frames change too fast to be read");
    }
    Ok(longest)
}

/// How many of the outermost frames are the same.
fn common(one: &[Link], other: &[Link]) -> usize {
    let same = |(one, other): &(&Link, &Link)| one.address == other.address && one.code == other.code;
    one.iter().rev().zip(other.iter().rev()).take_while(same).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(addresses: &[u64]) -> Vec<Link> {
        addresses.iter().map(|&address| Link { address, code: 1, instruction: 0 }).collect()
    }

    fn seen(looks: &[&[u64]]) -> Result<Vec<u64>> {
        let mut looks = looks.iter().cycle();
        let links = stable(|| Ok(chain(looks.next().unwrap())))?;
        Ok(links.iter().map(|link| link.address).collect())
    }

    #[test]
    fn what_two_looks_agree_on_counts() {
        assert_eq!(seen(&[&[3, 2, 1]]).unwrap(), [3, 2, 1]);
        assert_eq!(seen(&[&[2, 1], &[3, 2, 1], &[3, 2, 1]]).unwrap(), [3, 2, 1]);
        assert_eq!(seen(&[&[3, 2, 1], &[2, 1]]).unwrap(), [2, 1]);
        assert!(seen(&[&[], &[]]).unwrap().is_empty());
    }

    #[test]
    fn what_no_two_looks_agree_on_is_an_error() {
        assert!(seen(&[&[2], &[3]]).unwrap_err().to_string().contains("too fast"));
        let failed = stable(|| bail!("no frame")).unwrap_err();
        assert_eq!(failed.to_string(), "no frame");
    }
}
