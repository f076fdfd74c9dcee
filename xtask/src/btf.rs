//! Types of the kernel programs, for people: bpftool prints bytes as text if their type says that they are characters.
//! Rust has no such type. `i8`, which nothing else in the maps is made of, is given that meaning here.

use anyhow::{Context, Result, ensure};
use object::{Object, ObjectSection};

/// `struct btf_header`: magic, version, flags, then length of the header, offset and length of types and of strings.
const HEADER: usize = 24;
const MAGIC: u16 = 0xeb9f;
const KIND_INT: u32 = 1;
/// `BTF_INT_CHAR` in the word behind an integer type.
const CHAR: u32 = 2 << 24;
const ENCODING: u32 = 0xf << 24;

/// Makes characters of the type `i8` in the BTF of an ELF object; fine if there is none.
pub(crate) fn characters(object: &mut [u8]) -> Result<()> {
    let file = object::File::parse(&*object).context("the kernel programs are no object")?;
    let section = file.section_by_name(".BTF").context("the kernel programs have no BTF")?;
    let (start, len) = section.file_range().context("their BTF is not in the file")?;
    let (start, len) = (usize::try_from(start)?, usize::try_from(len)?);
    let btf = object.get_mut(start..start + len).context("their BTF ends outside the file")?;
    if let Some(place) = find_int(btf, "i8")? {
        let encoding = (word(btf, place)? & !ENCODING) | CHAR;
        btf[place..place + 4].copy_from_slice(&encoding.to_ne_bytes());
    }
    Ok(())
}

/// Where the encoding of the integer type `name` stands.
fn find_int(btf: &[u8], name: &str) -> Result<Option<usize>> {
    ensure!(btf.len() >= HEADER && btf[..2] == MAGIC.to_ne_bytes(), "their BTF has no header");
    let offset = |at| Ok::<_, anyhow::Error>(usize::try_from(word(btf, at)?)?);
    let header = offset(4)?;
    let (types, end) = (header + offset(8)?, header + offset(8)? + offset(12)?);
    let strings = header + offset(16)?;
    let mut at = types;
    while at < end {
        let info = word(btf, at + 4)?;
        let (kind, members) = ((info >> 24) & 0x1f, info as usize & 0xffff);
        let text = btf.get(strings + offset(at)?..).context("a name outside their BTF")?;
        if kind == KIND_INT && text.starts_with(name.as_bytes()) && text.get(name.len()) == Some(&0) {
            return Ok(Some(at + 12));
        }
        // What follows the common part: include/uapi/linux/btf.h.
        at += 12
            + match kind {
                KIND_INT | 14 | 17 => 4,
                3 => 12,
                4 | 5 | 15 | 19 => 12 * members,
                6 | 13 => 8 * members,
                _ => 0,
            };
    }
    Ok(None)
}

fn word(btf: &[u8], at: usize) -> Result<u32> {
    let bytes = btf.get(at..at + 4).context("their BTF is cut off")?;
    Ok(u32::from_ne_bytes(bytes.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_integer_is_found_behind_other_types() {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        let types = words(&[
            1,
            4 << 24 | 1,
            4,
            1,
            2,
            0, // a struct with one member
            1,
            1 << 24,
            1,
            8, // u8
            4,
            1 << 24,
            1,
            1 << 24 | 8, // i8, signed
        ]);
        let mut btf = MAGIC.to_ne_bytes().to_vec();
        btf.extend([1, 0]);
        btf.extend(words(&[
            24,
            0,
            u32::try_from(types.len()).unwrap(),
            u32::try_from(types.len()).unwrap(),
            7,
        ]));
        btf.extend(types);
        btf.extend(b"\0u8\0i8\0");
        assert_eq!(find_int(&btf, "i8").unwrap(), Some(24 + 24 + 16 + 12));
        assert_eq!(find_int(&btf, "u8").unwrap(), Some(24 + 24 + 12));
        assert_eq!(find_int(&btf, "i").unwrap(), None);
        assert!(find_int(&btf[..40], "i8").is_err() && find_int(b"\x7fELF", "i8").is_err());
    }
}
