//! The module's answers beside the C driver's: one boot, one driver after the other, the same cases and random sequences, and the comparison.

use std::path::Path;
use std::time::{Duration, Instant};

use miette::{IntoDiagnostic, Result, WrapErr, bail, miette};
use nitroxide_testkit::guest_program;
use nitroxide_testkit::parent_vm::{Driver, ParentVm};

use crate::context::{self, Context};
use crate::{guest, setup};

/// What is asked in each VM: a name, and the program's arguments.
const RUNS: [(&str, &str); 2] = [("directed", "run --control pci"), ("random", "random --control pci --seed 1 --sequences 2000")];

/// It only ends hangs.
const PATIENCE: Duration = Duration::from_secs(900);

/// Boots, asks both, keeps the transcripts in target/kmod, and compares.
pub fn run(context: &Context, module: &Path) -> Result<()> {
    setup::extras(context, setup::Extras::ParentVm)?;
    guest::run(context)?;
    context::run(&mut context.cargo(["build", "--quiet", "--package", "nitroxide-conformance", "--examples"]))?;
    let folder = context.in_target("kmod");
    // One program for both drivers and the comparison, whatever is built meanwhile.
    let program = folder.join("nitroxide-conformance");
    std::fs::copy(guest_program("nitroxide-conformance"), &program).into_diagnostic().wrap_err("Copying the conformance program")?;
    // One boot for both: answers depend on which huge pages are neighbours in physical memory, and that is another at every boot.
    let vm = ParentVm::builder()
        .memory_mib(1024)
        .cpus(6)
        .qemu_arguments(["-smp", "6,sockets=1,cores=3,threads=2"])
        .hugepages(140)
        .pool("2-5")
        .driver(Driver::C)
        .device_program(context.in_target("debug/examples/null_device"))
        .program(&program)
        .file(module, "modules/nitroxide.ko")
        .boot();
    for name in ["c", "rust"] {
        let started = Instant::now();
        if name == "rust" {
            vm.check("rmmod nitro_enclaves && insmod /modules/nitroxide.ko ne_cpus=2-5");
        }
        for (kind, arguments) in RUNS {
            let asked = vm.try_run(&format!("nitroxide-conformance {arguments} 2>&1"), PATIENCE);
            let output = asked.map_err(|error| miette!("{kind} on the driver `{name}`: {error}\n{}", vm.everything()))?;
            let place = folder.join(format!("{name}-{kind}.txt"));
            std::fs::write(&place, &output.stdout).into_diagnostic().wrap_err_with(|| format!("Writing {}", place.display()))?;
            if output.status != 0 {
                bail!("{kind} on the driver `{name}` failed; its transcript is {}\n{}", place.display(), vm.everything());
            }
        }
        eprintln!("kmod: conformance on the driver `{name}`: {:.0} s", started.elapsed().as_secs_f64());
    }
    std::fs::write(folder.join("console.txt"), vm.console()).into_diagnostic()?;
    drop(vm);
    let mut good = true;
    for (kind, _) in RUNS {
        let [c, rust] = ["c", "rust"].map(|name| folder.join(format!("{name}-{kind}.txt")));
        let mut compare = std::process::Command::new(&program);
        compare.arg("compare").args([&c, &rust]);
        eprintln!("kmod: {kind}: the C driver and the module");
        good &= context::run(&mut compare).is_ok();
    }
    if good {
        Ok(())
    } else {
        Err(miette!("The module answers otherwise than it should: see above, and the transcripts in {}", folder.display()))
    }
}
