//! The packages tried on a Debian below target/kmod-package: installed by its dpkg, built, signed and installed by its DKMS, loaded in a parent VM, removed.
//!
//! [`run`] goes through the life of a module on a user's machine, refusals first. The [`Debian`] is unpacked, not installed: its dpkg is told that all of it
//! is, so that it checks what our packages depend on, but scripts of other packages never ran. docs/kernel-package.md has what was seen.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use miette::{IntoDiagnostic, Result, WrapErr, bail, ensure, miette};
use nitroxide_testkit::guest_program;
use nitroxide_testkit::parent_vm::{Driver, ParentVm};

use super::root::Root;
use super::{kernel_of_setup, package, toolchain};
use crate::context::{self, Context};
use crate::setup::apt::{Apt, output};
use crate::setup::{self, KEYRING};

/// What a user's system has, beside the kernel's headers and modules: DKMS, the compiler, and the base system that scripts use.
const TOOLS: [&str; 23] = [
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "dash",
    "diffutils",
    "dkms",
    "dpkg",
    "findutils",
    "grep",
    "gzip",
    "kmod",
    "libc-bin",
    "mawk",
    "openssl",
    "perl-base",
    "rustc",
    "sed",
    "systemd-standalone-sysusers",
    "tar",
    "udev",
    "util-linux",
    "xz-utils",
];

/// It only ends hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// Makes the packages and tries them.
pub fn run(context: &Context) -> Result<()> {
    let started = Instant::now();
    let report = |what: &str| eprintln!("kmod: {what}, after {:.0} s", started.elapsed().as_secs_f64());
    let packages = [package::dkms(context)?, super::kit(context)?];
    are_reproducible(context, &packages)?;
    report("both packages come out the same twice");
    let kernel = kernel_of_setup(context)?;
    let debian = Debian::unpack(context, &kernel)?;
    report("a Debian without the module is there");
    debian.give(&packages)?;

    debian.prefers_updates(&context.in_target("kmod/nitro_enclaves.ko"))?;
    debian.refuses_what_would_not_load()?;
    report("refusals say what to do");
    debian.installs()?;
    report("DKMS builds and installs when the kit arrives");
    let signed = debian.signs()?;
    report("DKMS signs with a key of one's own");
    loads(context, &signed)?;
    report("the stock kernel loads it, and refuses it where signatures are enforced");
    debian.removes()?;
    report("removed, the stock module is back");
    Ok(())
}

fn are_reproducible(context: &Context, packages: &[PathBuf; 2]) -> Result<()> {
    let read = || packages.iter().map(fs::read).collect::<std::io::Result<Vec<_>>>().into_diagnostic().wrap_err("Reading the packages");
    let first = read()?;
    package::dkms(context)?;
    super::kit(context)?;
    ensure!(first == read()?, "A package that is made twice from the same files must have the same bytes");
    Ok(())
}

/// The Debian below target/kmod-package, and the kernel that modules are for in it.
struct Debian {
    root: Root,
    logs: PathBuf,
    kernel: String,
}

impl Debian {
    /// Makes it anew: no run sees what an earlier one installed.
    fn unpack(context: &Context, kernel: &str) -> Result<Self> {
        setup::check_system()?;
        let logs = context.in_target("kmod-package");
        let debian = Self { root: Root::new(logs.join("root")), logs, kernel: kernel.to_owned() };
        debian.root.check()?;
        let archives = {
            let _alone_in_cache = setup::lock_cache(context)?;
            let apt = Apt::open(&context.cache.join("apt"), KEYRING)?;
            let release = apt.of_release()?;
            let of_kernel = ["headers", "modules"].map(|kind| format!("linux-{kind}-{kernel}"));
            let names: Vec<&str> = TOOLS.into_iter().chain(of_kernel.iter().map(String::as_str)).collect();
            let archives = release.fetch(&release.installation(&names)?, &context.cache.join("kmod/package"))?;
            apt.close();
            archives
        };
        let folder = debian.root.path("");
        if folder.exists() {
            fs::remove_dir_all(&folder).into_diagnostic().wrap_err_with(|| format!("Removing {}", folder.display()))?;
        }
        fs::create_dir_all(&folder).into_diagnostic().wrap_err_with(|| format!("Making the folder {}", folder.display()))?;
        eprintln!("kmod: unpacking {} packages", archives.len());
        let mut status = String::new();
        for archive in &archives {
            toolchain::unpack(archive, &folder, &[])?;
            let control = output(Command::new("dpkg-deb").arg("--field").arg(archive))?;
            let _ = write!(status, "{}\n\n", control.trim_end().replacen('\n', "\nStatus: install ok installed\n", 1));
        }
        for name in ["dev", "proc", "tmp", "var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dkms"] {
            fs::create_dir_all(debian.root.path(name)).into_diagnostic()?;
        }
        fs::write(debian.root.path("var/lib/dpkg/status"), status).into_diagnostic().wrap_err("Writing dpkg's list of packages")?;
        // What the packages' own scripts would have done.
        debian.succeeds(
            "configure",
            "ln -sf mawk /usr/bin/awk; for name in passwd group; do cp /usr/share/base-passwd/$name.master /etc/$name; done; depmod $KERNEL",
        )?;
        Ok(debian)
    }

    /// Puts the packages into /root.
    fn give(&self, packages: &[PathBuf]) -> Result<()> {
        for package in packages {
            let place = self.root.path("root").join(package.file_name().unwrap_or_default());
            fs::copy(package, &place).into_diagnostic().wrap_err_with(|| format!("Copying {}", package.display()))?;
        }
        Ok(())
    }

    /// Runs shell lines there with `$KERNEL` and `$SOURCE`; returns what they print and their exit status.
    fn tries(&self, name: &str, script: &str) -> Result<(String, i32)> {
        let log = self.logs.join(format!("{name}.log"));
        let source = format!("/usr/src/{}-{}", package::NAME, package::VERSION);
        // Errors end a script unless it takes their status itself; the shell's own status comes last, so that a refusal is no failure of `Root::run`.
        let script =
            format!("KERNEL='{}' SOURCE='{source}' sh -e <<'END_OF_SCRIPT'\n{script}\nEND_OF_SCRIPT\necho \"status $?\"", self.kernel);
        self.root.run(&log, &["sh", "-c", &script])?;
        let text = fs::read_to_string(&log).into_diagnostic().wrap_err_with(|| format!("Reading {}", log.display()))?;
        let (text, status) = text.trim_end().rsplit_once("status ").ok_or_else(|| miette!("{name} ended without a status:\n{text}"))?;
        Ok((text.to_owned(), status.parse().into_diagnostic()?))
    }

    fn succeeds(&self, name: &str, script: &str) -> Result<String> {
        match self.tries(name, script)? {
            (text, 0) => Ok(text),
            (text, status) => bail!("`{script}` ended with {status}:\n{text}"),
        }
    }

    /// The file of the module that modprobe would load, and what else is in it.
    fn module(&self, field: &str) -> Result<String> {
        Ok(self.succeeds("modinfo", &format!("modinfo -k $KERNEL -F {field} nitro_enclaves"))?.trim().to_owned())
    }

    fn resolves_to(&self, part: &str) -> Result<()> {
        let place = self.module("filename")?;
        ensure!(place.contains(part), "modprobe would load {place}, which is not below {part}");
        Ok(())
    }

    /// The commands that docs/kernel-package.md gives for a module without DKMS.
    fn prefers_updates(&self, module: &Path) -> Result<()> {
        self.resolves_to("/kernel/drivers/virt/nitro_enclaves/")?;
        fs::copy(module, self.root.path("root/nitro_enclaves.ko")).into_diagnostic().wrap_err("Copying the module")?;
        self.succeeds(
            "by-hand",
            "install -D -m 644 /root/nitro_enclaves.ko /lib/modules/$KERNEL/updates/nitro_enclaves.ko; depmod $KERNEL",
        )?;
        self.resolves_to("/updates/nitro_enclaves.ko")?;
        self.succeeds("by-hand-removed", "rm /lib/modules/$KERNEL/updates/nitro_enclaves.ko; depmod $KERNEL")?;
        self.resolves_to("/kernel/drivers/virt/nitro_enclaves/")
    }

    fn refuses_what_would_not_load(&self) -> Result<()> {
        // Without the kit the package installs all the same, and says what is missing.
        let text = self.succeeds("install", "dpkg -i /root/nitro-enclaves-nitroxide-dkms_*.deb")?;
        let kit = format!("linux-headers-{}-rust", self.kernel);
        says(&text, &["lack the kernel's compiled Rust crates", &kit])?;
        self.refuses("without-kit", &["lack the kernel's compiled Rust crates", &kit])?;
        // What a new kernel's installation runs must not fail because of it.
        self.succeeds("autoinstall-without-kit", "dkms autoinstall -k $KERNEL")?;
        self.resolves_to("/kernel/drivers/virt/nitro_enclaves/")?;
        self.succeeds("group-and-rule", "getent group ne; udevadm verify /usr/lib/udev/rules.d/60-nitro-enclaves-nitroxide.rules")?;

        let (text, status) = self.tries(
            "kit-of-other-headers",
            "cd /var/lib/dpkg; cp status own; sed -i '/^Package: linux-headers-.*-amd64$/,/^$/ s/^Version: .*/Version: 7.3.0-1/' status\n\
             if dpkg -i /root/linux-headers-*-rust_*.deb; then exit 1; fi; mv own status",
        )?;
        ensure!(status == 0, "The kit must not be installed on other headers, but this ended with {status}:\n{text}");
        says(&text, &["depends on linux-headers-", "is 7.3.0-1"])?;

        let wrong = "#!/bin/sh\\necho \"rustc 1.96.1 (0123456789 2026-01-01)\"\\n";
        self.succeeds(
            "other-compiler",
            &format!("mv /usr/bin/rustc /usr/bin/rustc.own; printf '{wrong}' > /usr/bin/rustc; chmod +x /usr/bin/rustc"),
        )?;
        self.refuses("with-other-compiler", &["was built by \"rustc 1.85", "rustc 1.96.1", "apt install rustc"])?;
        self.succeeds("own-compiler", "mv /usr/bin/rustc.own /usr/bin/rustc")?;

        let configurations = "/usr/src/linux-headers-$KERNEL/include/config/auto.conf /usr/src/linux-headers-$KERNEL/.config";
        self.succeeds(
            "other-kernel",
            &format!("for file in {configurations}; do sed -i.own 's/^CONFIG_RUST=y/# CONFIG_RUST is not set/' $file; done"),
        )?;
        // DKMS itself passes it over, in general words; the package's own are those of `prepare`.
        let (text, status) = self.tries("on-other-kernel", &format!("dkms build -k $KERNEL {}", of_dkms()))?;
        ensure!(status == 77, "DKMS must pass over a kernel without CONFIG_RUST, but it ended with {status}:\n{text}");
        says(&text, &["BUILD_EXCLUSIVE"])?;
        let (text, status) = self.tries("prepare-on-other-kernel", "$SOURCE/prepare $KERNEL")?;
        ensure!(status == 77, "`prepare` must refuse a kernel without CONFIG_RUST, but it ended with {status}:\n{text}");
        says(&text, &["cannot take modules in Rust", "user-space home"])?;
        self.succeeds("own-kernel", &format!("for file in {configurations}; do mv $file.own $file; done"))?;
        Ok(())
    }

    /// DKMS passes this kernel over, and its log says why.
    fn refuses(&self, name: &str, words: &[&str]) -> Result<()> {
        let (text, status) = self.tries(name, &format!("dkms build -k $KERNEL {}", of_dkms()))?;
        ensure!(status == 77, "{name}: DKMS must pass this kernel over, but it ended with {status}:\n{text}");
        let log = self.root.path("var/lib/dkms").join(of_dkms()).join("build/make.log");
        says(&fs::read_to_string(&log).into_diagnostic().wrap_err_with(|| format!("Reading {}", log.display()))?, words)
    }

    fn installs(&self) -> Result<()> {
        let stock = self.module("vermagic")?;
        self.succeeds("install-kit", "dpkg -i /root/linux-headers-*-rust_*.deb")?;
        self.is_installed(&stock)?;
        // And in the other order.
        self.succeeds("reinstall", "dpkg --remove nitro-enclaves-nitroxide-dkms; dpkg -i /root/nitro-enclaves-nitroxide-dkms_*.deb")?;
        self.is_installed(&stock)
    }

    fn is_installed(&self, stock_vermagic: &str) -> Result<()> {
        self.resolves_to("/updates/dkms/nitro_enclaves.ko")?;
        let (vermagic, version) = (self.module("vermagic")?, self.module("version")?);
        ensure!(vermagic == stock_vermagic, "The module's vermagic `{vermagic}` is not the stock module's `{stock_vermagic}`");
        ensure!(version.starts_with("nitroxide"), "The module's version is `{version}`: that is not ours");
        Ok(())
    }

    /// The commands of docs/kernel-package.md for a key of one's own; returns the signed module, on this machine.
    fn signs(&self) -> Result<PathBuf> {
        let signer = self.module("signer")?;
        ensure!(signer == "DKMS module signing key", "DKMS signs with a key that it makes, but the signer is `{signer}`");
        let module = of_dkms();
        self.succeeds(
            "key",
            "umask 077; cd /root\n\
             openssl req -new -x509 -newkey rsa:2048 -nodes -days 3650 -subj '/CN=My modules/' -addext extendedKeyUsage=codeSigning \
             -outform DER -keyout mok.key -out mok.der\n\
             printf 'mok_signing_key=/root/mok.key\\nmok_certificate=/root/mok.der\\n' > /etc/dkms/framework.conf.d/mok.conf",
        )?;
        self.succeeds(
            "sign",
            &format!("dkms unbuild -k $KERNEL {module}; dkms build -k $KERNEL {module}; dkms install -k $KERNEL {module}"),
        )?;
        self.resolves_to("/updates/dkms/nitro_enclaves.ko")?;
        ensure!(self.module("signer")? == "My modules", "DKMS must sign with the key that it was given");
        let by_hand = self.succeeds(
            "sign-by-hand",
            "cd /root; /lib/modules/$KERNEL/build/scripts/sign-file sha256 mok.key mok.der nitro_enclaves.ko; modinfo -F signer ./nitro_enclaves.ko\n\
             cp $(modinfo -k $KERNEL -n nitro_enclaves) signed.ko.xz; xz --decompress --force signed.ko.xz",
        )?;
        ensure!(by_hand.trim() == "My modules", "sign-file must sign with the key that it was given, but the signer is `{by_hand}`");
        Ok(self.root.path("root/signed.ko"))
    }

    fn removes(&self) -> Result<()> {
        self.succeeds(
            "dpkg-remove",
            "dpkg --remove nitro-enclaves-nitroxide-dkms linux-headers-$KERNEL-rust\n\
             for left in $SOURCE /lib/modules/$KERNEL/updates/dkms/nitro_enclaves.ko.xz /usr/src/linux-headers-$KERNEL/rust; do test ! -e $left; done",
        )?;
        self.resolves_to("/kernel/drivers/virt/nitro_enclaves/")
    }
}

/// Module and version as DKMS's commands take them.
fn of_dkms() -> String {
    format!("{}/{}", package::NAME, package::VERSION)
}

fn says(text: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(text.contains(word), "This must say `{word}`:\n{text}");
    }
    Ok(())
}

/// The very file that DKMS built, in a parent VM: it serves enclaves, taints the kernel, and is refused where signatures are enforced.
fn loads(context: &Context, module: &Path) -> Result<()> {
    setup::extras(context, setup::Extras::ParentVm)?;
    context::run(&mut context.cargo(["build", "--quiet", "--package", "nitroxide-conformance", "--examples"]))?;
    let vm = ParentVm::builder()
        .memory_mib(1024)
        .cpus(6)
        .threads_per_core(2)
        .hugepages(140)
        .pool("2-5")
        .driver(Driver::Rust(module.to_owned()))
        .device_program(context.in_target("debug/examples/null_device"))
        .program(guest_program("nitroxide-conformance"))
        .boot();
    says(&vm.check("cat /sys/module/nitro_enclaves/version"), &["nitroxide-"])?;
    let output = vm
        .try_run("nitroxide-conformance run --control pci --filter commands 2>&1", PATIENCE)
        .map_err(|error| miette!("The module of the package in a parent VM: {error}\n{}", vm.everything()))?;
    says(&output.stdout, &["START cid 0 flags 0 -> 0 cid "])?;
    ensure!(output.status == 0 && !output.stdout.contains("left out"), "The calls on the module failed:\n{}", output.stdout);
    // Signed by a key that the kernel does not know: TAINT_OOT_MODULE and TAINT_UNSIGNED_MODULE.
    says(
        &vm.check("cat /sys/module/nitro_enclaves/taint; dmesg"),
        &["OE\n", "nitro_enclaves: module verification failed: signature and/or required key missing"],
    )?;
    drop(vm);

    let enforcing =
        ParentVm::builder().driver(Driver::None).file(module, "modules/nitroxide.ko").kernel_parameters("module.sig_enforce=1").boot();
    let refused = enforcing.run("insmod /modules/nitroxide.ko 2>&1");
    ensure!(refused.status != 0, "With module.sig_enforce=1 a module signed by an unknown key must be refused");
    says(&refused.stdout, &["Key was rejected by service"])?;
    says(&enforcing.check("dmesg"), &["Loading of module with unavailable key is rejected"])
}
