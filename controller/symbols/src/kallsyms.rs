//! Symbols, and `/proc/kallsyms` as text: `address type name [module]`.

/// A symbol of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Its address while the kernel ran.
    pub address: u64,
    /// Its type letter, as nm(1) has it.
    pub kind: u8,
    /// Its name.
    pub name: String,
}

/// The symbols of the kernel itself. Those of modules, of BPF programs and of ftrace come behind a `[name]` and are left out.
pub fn parse(text: &[u8]) -> Vec<Symbol> {
    text.split(|b| *b == b'\n').filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Symbol> {
    let text = std::str::from_utf8(line).ok()?;
    if text.contains('\t') || text.contains('[') {
        return None;
    }
    let mut fields = text.splitn(3, ' ');
    let address = u64::from_str_radix(fields.next()?, 16).ok()?;
    let kind = match fields.next()?.as_bytes() {
        [kind] => *kind,
        _ => return None,
    };
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    Some(Symbol { address, kind, name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_left_out() {
        let text = b"0000000000000000 A fixed_percpu_data\nffffffff81000000 T _text\nffffffffc0000000 t init\t[virtio]\n";
        let names: Vec<String> = parse(text).into_iter().map(|s| s.name).collect();
        assert_eq!(names, ["fixed_percpu_data", "_text"]);
    }
}
