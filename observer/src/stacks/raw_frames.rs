//! Consistent reads of an interpreter's call stack, which may change while it is read.

use anyhow::{Result, bail};

/// Maximum number of reads of a stack.
const ATTEMPTS: usize = 6;

/// A frame of an interpreter's call stack, as addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawFrame {
    /// Address of the frame itself.
    pub(super) address: u64,
    /// Address of the code that it executes.
    pub(super) code: u64,
    /// Address of the current instruction.
    pub(super) instruction: u64,
}

/// Reads a call stack until two consecutive reads agree, and returns it, innermost frame first. If the thread calls and
/// returns between all reads, returns the longest run of outermost frames that two consecutive reads had in common: these
/// are the callers of the frames that were missed.
pub(super) fn read_consistent(mut read: impl FnMut() -> Result<Vec<RawFrame>>) -> Result<Vec<RawFrame>> {
    let mut before = read();
    let mut longest = Vec::new();
    for _ in 1..ATTEMPTS {
        let now = read();
        if let (Ok(before), Ok(now)) = (&before, &now) {
            let common = common_outermost(before, now);
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
        bail!("its frames change faster than they can be read");
    }
    Ok(longest)
}

/// Number of outermost frames that two stacks share, on whatever instruction each frame is.
fn common_outermost(one: &[RawFrame], other: &[RawFrame]) -> usize {
    let same = |(one, other): &(&RawFrame, &RawFrame)| one.address == other.address && one.code == other.code;
    one.iter().rev().zip(other.iter().rev()).take_while(same).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stack(addresses: &[u64]) -> Vec<RawFrame> {
        addresses.iter().map(|&address| RawFrame { address, code: 1, instruction: 0 }).collect()
    }

    /// The result if these stacks are read in turn.
    fn result_of(reads: &[&[u64]]) -> Result<Vec<u64>> {
        let mut reads = reads.iter().cycle();
        let frames = read_consistent(|| Ok(stack(reads.next().unwrap())))?;
        Ok(frames.iter().map(|frame| frame.address).collect())
    }

    #[test]
    fn frames_that_two_reads_share_are_returned() {
        assert_eq!(result_of(&[&[3, 2, 1]]).unwrap(), [3, 2, 1]);
        assert_eq!(result_of(&[&[2, 1], &[3, 2, 1], &[3, 2, 1]]).unwrap(), [3, 2, 1]);
        assert_eq!(result_of(&[&[3, 2, 1], &[2, 1]]).unwrap(), [2, 1]);
        assert!(result_of(&[&[], &[]]).unwrap().is_empty());
    }

    #[test]
    fn reads_that_never_agree_are_an_error() {
        assert!(result_of(&[&[2], &[3]]).unwrap_err().to_string().contains("change faster"));
        let failed = read_consistent(|| bail!("no frame")).unwrap_err();
        assert_eq!(failed.to_string(), "no frame");
    }
}
