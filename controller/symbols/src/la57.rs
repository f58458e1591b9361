//! Five levels of page tables. Volatility 3 to 2.28 knows four, and finds nothing in an image of a kernel that uses five: it says
//! so by an empty list. A file given by `vol -p` tells its layers of the fifth.

/// The name of the file.
pub const FILE: &str = "la57.py";

/// The file. It is for such images only.
pub const PLUGIN: &str = r#"# For Volatility 3, by `vol -p DIR`: walk five levels of page tables (LA57; Intel SDM 3A, 4.5).
# Only for images of kernels that use them.
from volatility3.framework.layers import intel

for layer in (intel.Intel32e, intel.LinuxIntel32e):
    layer._maxvirtaddr = 57
    layer._structure = [
        ("page map layer 5", 9, False),
        ("page map layer 4", 9, False),
        ("page directory pointer", 9, True),
        ("page directory", 9, True),
        ("page table", 9, False),
    ]
intel.LinuxIntel32e._maxphyaddr = 52
"#;
