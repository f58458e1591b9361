//! The Intermediate Symbol Format of Volatility 3, schema 6.2.0 (`volatility3/schemas/schema-6.2.0.json`). BTF has types and no
//! addresses, kallsyms addresses and no types; the types of the symbols that plugins look into are given by name
//! (`known.tsv`).

use crate::{
    Error, Kernel, Symbol,
    btf::{Member, Type, Types},
};
use base64::Engine as _;
use serde::Serialize;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::{self, Write},
};

/// Types of symbols by name: symbol, tab, type.
const KNOWN: &str = include_str!("known.tsv");
/// Structures without which Volatility refuses a table (`framework/symbols/linux/__init__.py`, `network.py`).
const DEMANDED: [&str; 28] = [
    "file",
    "list_head",
    "hlist_head",
    "mm_struct",
    "super_block",
    "task_struct",
    "vm_area_struct",
    "qstr",
    "dentry",
    "fs_struct",
    "files_struct",
    "kobject",
    "cred",
    "inode",
    "idr",
    "address_space",
    "page",
    "vfsmount",
    "net",
    "socket",
    "sock",
    "inet_sock",
    "unix_sock",
    "net_device",
    "in_device",
    "in_ifaddr",
    "inet6_dev",
    "inet6_ifaddr",
];
/// What GCC calls the integers, which Volatility asks for; compilers differ.
const INTEGERS: [(&str, u64, bool); 10] = [
    ("char", 1, true),
    ("unsigned char", 1, false),
    ("short int", 2, true),
    ("short unsigned int", 2, false),
    ("int", 4, true),
    ("unsigned int", 4, false),
    ("long int", 8, true),
    ("long unsigned int", 8, false),
    ("long long int", 8, true),
    ("long long unsigned int", 8, false),
];
/// Pointers to pointers, arrays of arrays: deeper is no C.
const DEEP: u32 = 32;

#[derive(Serialize)]
struct Base {
    size: u64,
    signed: bool,
    kind: &'static str,
    endian: &'static str,
}

#[derive(Serialize)]
struct User {
    kind: &'static str,
    size: u64,
    fields: BTreeMap<String, Value>,
}

/// A table, ready to be written.
#[derive(Serialize)]
pub struct Isf {
    metadata: Value,
    base_types: BTreeMap<String, Base>,
    user_types: BTreeMap<String, User>,
    enums: BTreeMap<String, Value>,
    symbols: BTreeMap<String, Value>,
}

impl Isf {
    /// The table of a kernel, with types that may be its own or another file's of the same release.
    pub fn of(kernel: &Kernel, types: &Types) -> Result<Self, Error> {
        for needed in ["task_struct", "mm_struct", "list_head"] {
            if !types.has(needed) {
                return Err(Error::Btf("has no task_struct: not the types of a kernel"));
            }
        }
        let names = Names::of(types);
        let mut isf = Isf {
            metadata: json!({
                "format": "6.2.0",
                "producer": {"name": "stillframe-symbols", "version": env!("CARGO_PKG_VERSION")},
                "linux": {
                    "symbols": [{"kind": "system-map", "name": "kallsyms"}],
                    "types": [{"kind": "symtab", "name": "BTF"}],
                },
            }),
            base_types: BTreeMap::new(),
            user_types: BTreeMap::new(),
            enums: BTreeMap::new(),
            symbols: BTreeMap::new(),
        };
        isf.bases(types);
        isf.composites(types, &names);
        isf.variables(kernel, types, &names);
        Ok(isf)
    }

    fn bases(&mut self, types: &Types) {
        let base = |size, signed, kind| Base {
            size,
            signed,
            kind,
            endian: "little",
        };
        self.base_types
            .insert("pointer".to_owned(), base(8, false, "int"));
        self.base_types.insert("void".to_owned(), base(0, false, "void"));
        for (_, t) in types.iter() {
            match t {
                Type::Int {
                    name, size, encoding, ..
                } => {
                    let kind = match (encoding & 4, name.as_str()) {
                        (4, _) => "bool",
                        (_, "char" | "unsigned char" | "signed char") => "char",
                        _ => "int",
                    };
                    let signed = encoding & 1 == 1 || name == "char";
                    self.base_types
                        .entry(name.clone())
                        .or_insert(base(u64::from(*size), signed, kind));
                }
                Type::Float { name, size } => {
                    self.base_types
                        .entry(name.clone())
                        .or_insert(base(u64::from(*size), true, "float"));
                }
                _ => (),
            }
        }
        for (name, size, signed) in INTEGERS {
            let kind = if size == 1 { "char" } else { "int" };
            self.base_types
                .entry(name.to_owned())
                .or_insert(base(size, signed, kind));
        }
    }

    fn composites(&mut self, types: &Types, names: &Names) {
        for (id, t) in types.iter() {
            match t {
                Type::Composite {
                    union, size, members, ..
                } => {
                    let fields = fields(types, names, members);
                    let kind = if *union { "union" } else { "struct" };
                    let size = u64::from(*size);
                    self.user_types
                        .insert(names.composite(id), User { kind, size, fields });
                }
                Type::Enum {
                    size,
                    signed,
                    constants,
                    ..
                } => {
                    let base = match (size, signed) {
                        (1, true) => "char",
                        (1, false) => "unsigned char",
                        (2, true) => "short int",
                        (2, false) => "short unsigned int",
                        (8, true) => "long int",
                        (8, false) => "long unsigned int",
                        (_, true) => "int",
                        (_, false) => "unsigned int",
                    };
                    // A number that JSON cannot hold as an integer is none of a kernel.
                    let number = |v: i128| {
                        i64::try_from(v)
                            .map(Value::from)
                            .or_else(|_| u64::try_from(v).map(Value::from))
                    };
                    let constants: BTreeMap<&str, Value> = constants
                        .iter()
                        .filter_map(|(name, v)| Some((name.as_str(), number(*v).ok()?)))
                        .collect();
                    self.enums.insert(
                        names.enumeration(id),
                        json!({"size": size, "base": base, "constants": constants}),
                    );
                }
                _ => (),
            }
        }
        let empty = |kind| User {
            kind,
            size: 0,
            fields: BTreeMap::new(),
        };
        for (_, t) in types.iter() {
            if let Type::Forward { name, union } = t {
                let kind = if *union { "union" } else { "struct" };
                self.user_types.entry(name.clone()).or_insert(empty(kind));
            }
        }
        for name in DEMANDED {
            self.user_types.entry(name.to_owned()).or_insert(empty("struct"));
        }
        // Renamed in 6.16; what reads files out of the page cache asks for the old name.
        if let Some(page) = self.user_types.get_mut("page")
            && !page.fields.contains_key("index")
            && let Some(index) = page.fields.get("__folio_index").cloned()
        {
            page.fields.insert("index".to_owned(), index);
        }
    }

    fn variables(&mut self, kernel: &Kernel, types: &Types, names: &Names) {
        let known: HashMap<&str, &str> = KNOWN.lines().filter_map(|line| line.split_once('\t')).collect();
        let per_cpu: HashMap<&str, u32> = types
            .iter()
            .filter_map(|(_, t)| match t {
                Type::Variable { name, target } => Some((name.as_str(), *target)),
                _ => None,
            })
            .collect();
        // Of several of one name, data goes before text and global before local.
        let mut chosen: HashMap<&str, &Symbol> = HashMap::new();
        let rank = |s: &Symbol| {
            (
                !matches!(s.kind, b't' | b'T' | b'w' | b'W'),
                s.kind.is_ascii_uppercase(),
            )
        };
        for symbol in &kernel.symbols {
            let best = chosen.entry(&symbol.name).or_insert(symbol);
            if rank(symbol) > rank(best) {
                *best = symbol;
            }
        }
        let flags = self.user_types.get("taint_flag");
        // Volatility 2.28 looks for this member, and has a table of its own where the symbol is missing.
        let taint_flags = flags.filter(|t| t.fields.contains_key("module")).map(|t| t.size);
        for (name, symbol) in &chosen {
            let address = kernel.linked(symbol.address);
            let typed = match (known.get(name), per_cpu.get(name)) {
                _ if *name == "taint_flags" => match taint_flags {
                    Some(size) if size > 0 => {
                        let room = self.room(kernel, symbol) / size;
                        json!({"kind": "array", "count": room.min(32), "subtype": {"kind": "struct", "name": "taint_flag"}})
                    }
                    _ => continue,
                },
                (Some(text), _) => self.expression(text).unwrap_or_else(void),
                (None, Some(id)) => describe(types, names, *id, 0),
                (None, None) => void(),
            };
            self.symbols
                .insert((*name).to_owned(), json!({"type": typed, "address": address}));
        }
        for (name, address) in &kernel.tables {
            let typed = match name.as_str() {
                "kallsyms_num_syms" => json!({"kind": "base", "name": "unsigned int"}),
                _ => void(),
            };
            self.symbols.insert(
                name.clone(),
                json!({"type": typed, "address": kernel.linked(*address)}),
            );
        }
        self.timekeeper(kernel, types, names);
        if let Some(address) = kernel.address("linux_banner") {
            let text = [&kernel.banner[..], b"\0"].concat();
            let banner = json!({
                "type": {"kind": "array", "count": text.len(), "subtype": {"kind": "base", "name": "char"}},
                "address": kernel.linked(address),
                "constant_data": base64::engine::general_purpose::STANDARD.encode(text),
            });
            self.symbols.insert("linux_banner".to_owned(), banner);
        }
    }

    /// Bytes to the next symbol.
    fn room(&self, kernel: &Kernel, symbol: &Symbol) -> u64 {
        let next = kernel
            .symbols
            .iter()
            .map(|s| s.address)
            .filter(|a| *a > symbol.address)
            .min();
        next.map_or(0, |next| next - symbol.address)
    }

    /// `tk_core` is an anonymous struct of a seqcount and a timekeeper, `struct tk_data` since 6.13, and since 6.17 no symbol
    /// of its own but the first of `timekeeper_data`.
    fn timekeeper(&mut self, kernel: &Kernel, types: &Types, names: &Names) {
        let is_it = |members: &[Member]| {
            members.iter().any(|m| m.name == "timekeeper") && members.iter().any(|m| m.name == "seq")
        };
        let typed = types.iter().find_map(|(id, t)| match t {
            Type::Composite { members, .. } if is_it(members) => {
                Some(json!({"kind": "struct", "name": names.composite(id)}))
            }
            _ => None,
        });
        let address = kernel
            .address("tk_core")
            .or_else(|| kernel.address("timekeeper_data"));
        if let (Some(typed), Some(address)) = (typed, address) {
            self.symbols.insert(
                "tk_core".to_owned(),
                json!({"type": typed, "address": kernel.linked(address)}),
            );
        }
    }

    /// A type as `known.tsv` has it. Nothing when the kernel has no such structure.
    fn expression(&self, text: &str) -> Option<Value> {
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        match word {
            "pointer" => Some(json!({"kind": "pointer", "subtype": self.expression(rest)?})),
            "array" => {
                let (count, of) = rest.split_once(' ')?;
                Some(
                    json!({"kind": "array", "count": count.parse::<u32>().ok()?, "subtype": self.expression(of)?}),
                )
            }
            "struct" => self
                .user_types
                .get(rest)
                .map(|t| json!({"kind": t.kind, "name": rest})),
            _ if text == "unsigned long" => Some(json!({"kind": "base", "name": "long unsigned int"})),
            _ if self.base_types.contains_key(text) => Some(json!({"kind": "base", "name": text})),
            _ => self
                .user_types
                .get(text)
                .map(|t| json!({"kind": t.kind, "name": text})),
        }
    }

    /// Symbols and their addresses.
    pub fn addresses(&self) -> BTreeMap<&str, u64> {
        let address = |value: &Value| value.get("address").and_then(Value::as_u64);
        self.symbols
            .iter()
            .filter_map(|(name, value)| Some((name.as_str(), address(value)?)))
            .collect()
    }

    /// Writes it as JSON.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut out, self)?;
        out.flush()
    }

    /// Writes it as JSON in xz, which Volatility reads.
    pub fn write_xz(&self, out: impl Write) -> io::Result<()> {
        let mut xz = liblzma::write::XzEncoder::new(out, 1);
        self.write(io::BufWriter::with_capacity(256 << 10, &mut xz))?;
        xz.finish().map(|_| ())
    }
}

fn void() -> Value {
    json!({"kind": "base", "name": "void"})
}

/// What composites and enumerations are called: their tag, or the typedef of one without a tag, or a number.
struct Names {
    composites: HashMap<u32, String>,
    enumerations: HashMap<u32, String>,
}

impl Names {
    fn of(types: &Types) -> Self {
        let (mut composites, mut enumerations) = (HashMap::new(), HashMap::new());
        let (mut taken, mut taken_enums) = (HashSet::new(), HashSet::new());
        for (id, t) in types.iter() {
            match t {
                Type::Composite { name, .. } if !name.is_empty() && taken.insert(name.clone()) => {
                    composites.insert(id, name.clone());
                }
                Type::Enum { name, .. } if !name.is_empty() && taken_enums.insert(name.clone()) => {
                    enumerations.insert(id, name.clone());
                }
                _ => (),
            }
        }
        for (_, t) in types.iter() {
            let Type::Typedef { name, target } = t else {
                continue;
            };
            let untagged = |tag: &String| tag.is_empty();
            match types.get(*target) {
                Some(Type::Composite { name: tag, .. })
                    if untagged(tag) && !composites.contains_key(target) && taken.insert(name.clone()) =>
                {
                    composites.insert(*target, name.clone());
                }
                Some(Type::Enum { name: tag, .. })
                    if untagged(tag)
                        && !enumerations.contains_key(target)
                        && taken_enums.insert(name.clone()) =>
                {
                    enumerations.insert(*target, name.clone());
                }
                _ => (),
            }
        }
        Names {
            composites,
            enumerations,
        }
    }

    fn composite(&self, id: u32) -> String {
        self.composites
            .get(&id)
            .cloned()
            .unwrap_or_else(|| format!("unnamed_{id}"))
    }

    fn enumeration(&self, id: u32) -> String {
        self.enumerations
            .get(&id)
            .cloned()
            .unwrap_or_else(|| format!("unnamed_enum_{id}"))
    }
}

/// A type as ISF has it.
fn describe(types: &Types, names: &Names, id: u32, depth: u32) -> Value {
    let Some(t) = types.get(id).filter(|_| depth < DEEP) else {
        return void();
    };
    let inner = |id| describe(types, names, id, depth + 1);
    match t {
        Type::Int { name, .. } | Type::Float { name, .. } => json!({"kind": "base", "name": name}),
        Type::Pointer(to) => json!({"kind": "pointer", "subtype": inner(*to)}),
        Type::Array { element, count } => {
            json!({"kind": "array", "count": count, "subtype": inner(*element)})
        }
        Type::Composite { union, .. } => {
            json!({"kind": if *union { "union" } else { "struct" }, "name": names.composite(id)})
        }
        Type::Enum { .. } => json!({"kind": "enum", "name": names.enumeration(id)}),
        Type::Forward { name, union } => {
            json!({"kind": if *union { "union" } else { "struct" }, "name": name})
        }
        Type::Typedef { target, .. } | Type::Qualified(target) => inner(*target),
        Type::Function => json!({"kind": "function"}),
        Type::Variable { .. } | Type::Other => void(),
    }
}

fn fields(types: &Types, names: &Names, members: &[Member]) -> BTreeMap<String, Value> {
    let mut fields = BTreeMap::new();
    for (n, member) in members.iter().enumerate() {
        let (offset, typed) = place(types, names, member);
        // Only what has fields can lend them to the struct around it.
        let has_fields = matches!(
            typed.get("kind").and_then(Value::as_str),
            Some("struct" | "union")
        );
        let (name, field) = match (member.name.as_str(), has_fields) {
            ("", true) => (
                format!("unnamed_field_{n}"),
                json!({"type": typed, "offset": offset, "anonymous": true}),
            ),
            ("", false) => (
                format!("unnamed_field_{n}"),
                json!({"type": typed, "offset": offset}),
            ),
            (name, _) => (name.to_owned(), json!({"type": typed, "offset": offset})),
        };
        fields.insert(name, field);
    }
    fields
}

/// Offset in bytes and type of a member; a bitfield is a part of the integer that holds it.
fn place(types: &Types, names: &Names, member: &Member) -> (u32, Value) {
    let typed = describe(types, names, member.target, 0);
    let (bits, extra) = match (member.bits, integer(types, member.target)) {
        // Before kernels said which members are bitfields, the integer itself did.
        (0, Some((size, bits, bit_offset))) if u64::from(bits) < size * 8 && bits > 0 => {
            (u32::from(bits), u32::from(bit_offset))
        }
        (bits, _) => (bits, 0),
    };
    if bits == 0 {
        return (member.bit_offset / 8, typed);
    }
    let size = integer(types, member.target)
        .map_or(4, |(size, ..)| size)
        .clamp(1, 8);
    let unit = u32::try_from(size * 8).unwrap_or(32);
    let start = member.bit_offset.saturating_add(extra);
    let (byte, position, typed) = match (start / unit * (unit / 8), start % unit) {
        (byte, position) if position + bits <= unit => (byte, position, typed),
        // One that spans two of its units is taken out of a wider one.
        _ => (
            start / 8,
            start % 8,
            json!({"kind": "base", "name": "long unsigned int"}),
        ),
    };
    (
        byte,
        json!({"kind": "bitfield", "bit_position": position, "bit_length": bits, "type": typed}),
    )
}

/// Bytes, bits and first bit of the integer behind a type, or bytes of an enumeration.
fn integer(types: &Types, mut id: u32) -> Option<(u64, u8, u8)> {
    for _ in 0..DEEP {
        match types.get(id)? {
            Type::Int {
                size,
                bits,
                bit_offset,
                ..
            } => return Some((u64::from(*size), *bits, *bit_offset)),
            Type::Enum { size, .. } => return Some((u64::from(*size), 0, 0)),
            Type::Typedef { target, .. } | Type::Qualified(target) => id = *target,
            _ => return None,
        }
    }
    None
}
