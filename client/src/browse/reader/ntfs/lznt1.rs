//! LZNT1, by which NTFS compresses: chunks of up to 4096 bytes, each with a header of two bytes ([MS-XCA] 2.5).

const CHUNK_BYTES: usize = 4096;

/// Unpacks into `plain`, whose rest becomes zeros. `None`: it makes no sense.
pub(super) fn unpack(mut packed: &[u8], plain: &mut [u8]) -> Option<()> {
    plain.fill(0);
    for chunk in plain.chunks_mut(CHUNK_BYTES) {
        let Some((header, rest)) = packed.split_first_chunk() else { break };
        let header = u16::from_le_bytes(*header);
        if header == 0 {
            break;
        }
        let (body, rest) = rest.split_at_checked(usize::from(header & 0xFFF) + 1)?;
        match header & 0x8000 {
            0 => chunk.get_mut(..body.len())?.copy_from_slice(body),
            _ => unpack_chunk(body, chunk)?,
        }
        packed = rest;
    }
    Some(())
}

/// Groups of a byte of flags and eight tokens: a byte, or two that say how far back to copy how much from.
fn unpack_chunk(mut body: &[u8], chunk: &mut [u8]) -> Option<()> {
    let mut done = 0;
    while let Some((flags, rest)) = body.split_first() {
        body = rest;
        for bit in 0..8 {
            if body.is_empty() {
                return Some(());
            }
            if flags >> bit & 1 == 0 {
                let (byte, rest) = body.split_first()?;
                *chunk.get_mut(done)? = *byte;
                (done, body) = (done + 1, rest);
                continue;
            }
            let (token, rest) = body.split_first_chunk()?;
            let (back, len) = split(u16::from_le_bytes(*token), done)?;
            for _ in 0..len {
                *chunk.get_mut(done)? = chunk[done.checked_sub(back)?];
                done += 1;
            }
            body = rest;
        }
    }
    Some(())
}

/// How far back and how much: the further into the chunk, the more bits has the distance.
fn split(token: u16, done: usize) -> Option<(usize, usize)> {
    let last = done.checked_sub(1)?;
    let far = (usize::BITS - last.leading_zeros()).max(4);
    let len_bits = 16u32.checked_sub(far)?;
    let len = usize::from(token & ((1u32 << len_bits) - 1) as u16) + 3;
    Some((usize::from(token >> len_bits) + 1, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_specification_unpacks() {
        // [MS-XCA] 3.3.
        let packed = [
            0x38, 0xb0, 0x88, 0x46, 0x23, 0x20, 0x00, 0x20, 0x47, 0x20, 0x41, 0x00, 0x10, 0xa2,
            0x47, 0x01, 0xa0, 0x45, 0x20, 0x44, 0x00, 0x08, 0x45, 0x01, 0x50, 0x79, 0x00, 0xc0,
            0x45, 0x20, 0x05, 0x24, 0x13, 0x88, 0x05, 0xb4, 0x02, 0x4a, 0x44, 0xef, 0x03, 0x58,
            0x02, 0x8c, 0x09, 0x16, 0x01, 0x48, 0x45, 0x00, 0xbe, 0x00, 0x9e, 0x00, 0x04, 0x01,
            0x18, 0x90, 0x00,
        ];
        let expected = "F# F# G A A G F# E D D E F# F# E E F# F# G A A G F# E D D E F# E D D E \
                        E F# D E F# G F# D E F# G F# E D E A F# F# G A A G F# E D D E F# E D D\0";
        let mut plain = vec![1; CHUNK_BYTES];
        unpack(&packed, &mut plain).unwrap();
        assert_eq!(&plain[..expected.len()], expected.as_bytes());
        assert!(plain[expected.len()..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_leads_out_of_a_chunk_is_refused() {
        let mut plain = vec![0; CHUNK_BYTES];
        // A copy before anything is there, one from before the chunk, a body that ends early.
        assert!(unpack(&[0x02, 0xb0, 0x01, 0x00, 0x00], &mut plain).is_none());
        assert!(unpack(&[0x03, 0xb0, 0x02, b'a', 0x00, 0xF0], &mut plain).is_none());
        assert!(unpack(&[0xff, 0xbf, 0x00], &mut plain).is_none());
        assert!(unpack(&[0x02, 0xb0, 0x00, b'a', b'b'], &mut [0; 1]).is_none());
        assert!(unpack(&[0, 0], &mut plain).is_some());
    }
}
