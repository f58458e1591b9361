# What the tests need and the distribution does not install: other kernels, LiME's module, AVML, Volatility, drgn. Sourced by tests/run, which
# sets target (an absolute path), as_root, errexit and a PATH with sbin. Each is fetched once.

# The distribution's mirror: read from apt's own configuration, never written down.
mirror_of_apt() {
    apt-get indextargets --format '$(COMPONENT) $(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "main" && $2 !~ /-security$/ && !found { print $3; found = 1 }'
}

# open_suite SUITE: a sources list, lists and a cache of another suite's own. What verifies it is the distribution's keyring
# and nothing else; an unsigned or unverifiable suite fails.
open_suite() {
    if [ "$1" = own ]; then
        [ -n "$(apt-cache policy linux-image-cloud-amd64 2>/dev/null)" ] || as_root apt-get -qq update
        return
    fi
    local home=$target/lab/apt/$1 keyring=/usr/share/keyrings/debian-archive-keyring.gpg mirror
    mirror=$(mirror_of_apt)
    [ -n "$mirror" ] || { echo "tests/run: apt has no Debian mirror" >&2; return 1; }
    mkdir -p "$home"/{lists,cache/archives,state}/partial "$home/empty"
    : >"$home/state/status"
    echo "deb [arch=amd64 signed-by=$keyring] $mirror $1 main" >"$home/sources.list"
    cat >"$home/apt.conf" <<CONF
Dir::Etc::SourceList "$home/sources.list";
Dir::Etc::SourceParts "-";
Dir::Etc::Trusted "/dev/null";
Dir::Etc::TrustedParts "$home/empty";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "$home/empty";
Dir::State "$home/state";
Dir::State::Lists "$home/lists";
Dir::State::Status "$home/state/status";
Dir::Cache "$home/cache";
APT::Sandbox::User "";
APT::Get::AllowUnauthenticated "false";
APT::Update::Error-Mode "any";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
CONF
    suite_apt "$1" get -qq update
}

# suite_apt SUITE get|cache ARGUMENT...: apt-get or apt-cache of a suite that open_suite opened; "own" is the machine's own.
suite_apt() {
    local suite=$1 program=apt-$2
    shift 2
    if [ "$suite" = own ]; then "$program" -o APT::Sandbox::User= "$@"; else "$program" -c "$target/lab/apt/$suite/apt.conf" "$@"; fi
}

# What a guest may load. Some kernels have some of them built in, or not at all.
guest_modules=(virtio_pci virtio_blk virtio_net virtio_console virtio_rng virtio_balloon virtio_mem loop dummy)

# fetch_kernel SUITE PATTERN: the suite's newest signed cloud kernel whose release fits PATTERN (an extended regular
# expression for the whole of it), as lab/kernels/MAJOR.MINOR/{boot/vmlinuz-RELEASE,lib/modules/RELEASE,suite}.
fetch_kernel() {
    local suite=$1 pattern=$2 release folder partial part names=()
    if grep -qsxF "$suite $pattern" "$target"/lab/kernels/*/suite; then return; fi
    open_suite "$suite"
    release=$(suite_apt "$suite" cache pkgnames linux-image- |
        sed -nE "s/^linux-image-($pattern)-cloud-amd64\$/\1/p" | sort -V | tail -n 1)
    [ -n "$release" ] || { echo "tests/run: $suite has no cloud kernel that fits $pattern" >&2; return 1; }
    folder=$target/lab/kernels/$(cut -d. -f1,2 <<<"$release") release=$release-cloud-amd64 partial=$folder.partial
    echo "tests/run: fetching $release from $suite"
    # Up to 6.x one package holds everything; from 7.x on it is empty, and three others hold it.
    for part in base binary modules; do
        [ -z "$(suite_apt "$suite" cache pkgnames "linux-$part-$release")" ] || names+=("linux-$part-$release")
    done
    [ ${#names[@]} -gt 0 ] || names=("linux-image-$release")
    rm -rf "$partial" && mkdir -p "$partial/debs" "$partial/all"
    (cd "$partial/debs" && suite_apt "$suite" get -qq download "${names[@]}")
    for part in "$partial"/debs/*.deb; do dpkg -x "$part" "$partial/all"; done
    slim_kernel "$partial/all" "$partial" "$release"
    rm -rf "$partial/all" "$partial/debs"
    echo "$suite $pattern" >"$partial/suite"
    rm -rf "$folder" && mv "$partial" "$folder"
}

# slim_kernel FROM TO RELEASE: the kernel, its configuration, and unpacked the modules of the guest and what they depend on.
slim_kernel() {
    local from=$1 to=$2 release=$3 modules=lib/modules/$3 module kind path rest
    # The newest lie below /usr/lib alone; depmod and modprobe look below /lib.
    [ -e "$from/lib" ] || ln -s usr/lib "$from/lib"
    mkdir -p "$to/boot" "$to/$modules"
    if [ -e "$from/boot/vmlinuz-$release" ]; then
        cp "$from/boot/vmlinuz-$release" "$from/boot/config-$release" "$to/boot/"
    else
        cp "$from/$modules/vmlinuz" "$to/boot/vmlinuz-$release"
        cp "$from/$modules/config" "$to/boot/config-$release"
    fi
    depmod -b "$from" "$release"
    for module in "${guest_modules[@]}"; do
        modprobe -d "$from" -S "$release" --show-depends "$module" 2>/dev/null || true
    done | sort -u | while read -r kind path rest; do
        [ "$kind" = insmod ] || continue
        rest=$to/$modules/${path#*"/$modules/"}
        mkdir -p "${rest%/*}"
        cp "$path" "$rest"
        if [ "${rest%.xz}" != "$rest" ]; then xz -d "$rest"; fi
    done
    cp "$from/$modules"/modules.{builtin,builtin.modinfo,order} "$to/$modules/"
    # modules.order names modules that are gone, and says so for each.
    depmod -b "$to" "$release" 2>&1 | { grep -v 'modules.order' >&2 || true; }
}

# fetch_symbols SUITE RELEASE FOLDER [vmlinux]: the real System.map of RELEASE (and the kernel with DWARF, 350 to 630 MB), as
# FOLDER/boot/{System.map,vmlinux}-RELEASE. The image's own packages ship a stub; the package of the debug symbols (260 to
# 350 MB, kept nowhere) has it as its first file.
fetch_symbols() {
    local suite=$1 release=$2 folder=$3 name names=(System.map ${4:+"$4"}) partial=$3/symbols.partial
    name=$folder/boot/${names[-1]}-$release
    if [ -e "$name" ] && [ "$(stat -c %s "$name")" -gt 65536 ]; then return; fi
    open_suite "$suite"
    echo "tests/run: fetching the symbols of $release"
    rm -rf "$partial" && mkdir -p "$partial"
    (cd "$partial" && suite_apt "$suite" get -qq download "linux-image-$release-dbg")
    # tar stops reading at the last of them: dpkg's broken pipe is no failure.
    (
        set +o pipefail
        dpkg --fsys-tarfile "$partial"/*.deb 2>/dev/null |
            tar -x -C "$partial" --no-anchored --wildcards --occurrence=1 --transform 's|.*/||' "${names[@]/%/*}"
    )
    for name in "${names[@]}"; do
        if [ -e "$partial/$name" ]; then mv "$partial/$name" "$partial/$name-$release"; fi
        mv "$partial/$name-$release" "$folder/boot/$name-$release"
    done
    rm -rf "$partial"
}
# fetch_lime RELEASE: LiME's module for the guest's kernel of the machine's own suite, as lab/lime/RELEASE/lime.ko. Nothing is installed:
# headers, kbuild and source are unpacked below lab/lime, and the links between them are made to hold there.
fetch_lime() {
    local release=$1 lime=$target/lab/lime partial=$target/lab/lime.partial root=$target/lab/lime.partial/root file names
    [ ! -e "$lime/$release/lime.ko" ] || return 0
    echo "tests/run: building LiME for $release"
    rm -rf "$partial" && mkdir -p "$root" "$partial/debs"
    # The headers name their common part and their kbuild; nothing else of theirs is needed but a compiler.
    names=$(apt-cache depends "linux-headers-$release" | awk '/Depends: linux-(headers-.*-common|kbuild-)/ {print $2}')
    # shellcheck disable=SC2086
    (cd "$partial/debs" && apt-get -qq -o APT::Sandbox::User= download lime-forensics-dkms "linux-headers-$release" $names)
    for file in "$partial"/debs/*.deb; do dpkg -x "$file" "$root"; done
    # Makefiles and links name /usr/src and /usr/lib.
    grep -rlE '/usr/(src|lib)/linux-' "$root/usr/src/linux-headers-$release" --include=Makefile --include='.kernel*' |
        xargs -r sed -i "s|/usr/src/linux-|$root/usr/src/linux-|g; s|/usr/lib/linux-|$root/usr/lib/linux-|g"
    find "$root/usr/src" -type l | while read -r file; do
        case $(readlink "$file") in /usr/*) ln -sfn "$root$(readlink "$file")" "$file" ;; esac
    done
    make -s -C "$root/usr/src/linux-headers-$release" M="$(echo "$root"/usr/src/lime-*)" modules >"$partial/log" 2>&1 ||
        { cat "$partial/log" >&2; return 1; }
    mkdir -p "$lime/$release"
    strip --strip-debug -o "$lime/$release/lime.ko" "$root"/usr/src/lime-*/lime.ko
    rm -rf "$partial"
}

# fetch_avml: the static collector to compare with, as lab/avml/bin/avml. Without its uploads it needs no OpenSSL and compiles in
# 15 seconds instead of six minutes.
fetch_avml() {
    [ ! -e "$target/lab/avml/bin/avml" ] || return 0
    echo "tests/run: compiling AVML"
    CARGO_TARGET_DIR=$target/lab/avml.build CC_x86_64_unknown_linux_musl=musl-gcc cargo install -q --locked \
        --root "$target/lab/avml" --target x86_64-unknown-linux-musl --no-default-features --features convert avml@0.21.0
    rm -rf "$target/lab/avml.build"
}

# fetch_drgn: the debugger that reads vmcores, in lab/drgn/bin.
fetch_drgn() {
    [ ! -e "$target/lab/drgn/bin/drgn" ] || return 0
    echo "tests/run: fetching drgn"
    rm -rf "$target/lab/drgn" && python3 -m venv "$target/lab/drgn"
    "$target/lab/drgn/bin/pip" install -q --disable-pip-version-check --only-binary :all: drgn==0.3.0
}

# fetch_volatility: the analysis framework, in lab/volatility/bin.
fetch_volatility() {
    [ ! -e "$target/lab/volatility/bin/vol" ] || return 0
    echo "tests/run: fetching Volatility"
    rm -rf "$target/lab/volatility" && python3 -m venv "$target/lab/volatility"
    "$target/lab/volatility/bin/pip" install -q --disable-pip-version-check volatility3==2.28.2
}

# fetch_jsonschema: what checks a symbol table against Volatility's own schema, in lab/jsonschema/bin. Where Volatility itself finds it, it does so
# for half a minute at every new table.
fetch_jsonschema() {
    [ ! -e "$target/lab/jsonschema/bin/jsonschema" ] || return 0
    rm -rf "$target/lab/jsonschema" && python3 -m venv "$target/lab/jsonschema"
    "$target/lab/jsonschema/bin/pip" install -q --disable-pip-version-check jsonschema==4.25.1
}

# fetch_localstack: a real S3 API server, in lab/localstack/bin. The versions beside it are those with which that release starts.
fetch_localstack() {
    [ ! -e "$target/lab/localstack/ready" ] || return 0
    echo "tests/run: fetching LocalStack"
    rm -rf "$target/lab/localstack" && python3 -m venv "$target/lab/localstack"
    "$target/lab/localstack/bin/pip" install -q --disable-pip-version-check 'localstack-core[runtime]==4.4.0' 'cbor2<5.8' cryptography==44.0.3 \
        pyOpenSSL==25.0.0 'service_identity<25' 'joserfc<1.1'
    touch "$target/lab/localstack/ready"
}

# fetch_awscli: what else uploads a stream to S3, for the benchmark, in lab/awscli/bin.
fetch_awscli() {
    [ ! -e "$target/lab/awscli/ready" ] || return 0
    echo "tests/run: fetching the AWS command line"
    rm -rf "$target/lab/awscli" && python3 -m venv "$target/lab/awscli"
    "$target/lab/awscli/bin/pip" install -q --disable-pip-version-check awscli==1.42.0
    touch "$target/lab/awscli/ready"
}

# The suite that a kernel's folder came from, and its release.
fetch_symbols_of() {
    local folder=$target/lab/kernels/$1 suite release
    suite=$(cut -d ' ' -f 1 "$folder/suite")
    release=$(basename "$folder"/boot/vmlinuz-*)
    fetch_symbols "$suite" "${release#vmlinuz-}" "$folder"
}

fetch_all() {
    local folder release
    fetch_kernel own '6\.1\..*'
    fetch_kernel bullseye '5\.10\..*'
    fetch_kernel trixie '6\.12\..*'
    fetch_kernel sid '.*'
    for folder in "$target"/lab/kernels/*/; do
        fetch_symbols_of "$(basename "$folder")"
    done
    release=$(basename "$target"/lab/kernels/6.1/boot/vmlinuz-*)
    fetch_lime "${release#vmlinuz-}"
    fetch_avml
    fetch_localstack
    fetch_awscli
    fetch_volatility
    fetch_jsonschema
    fetch_drgn
}
