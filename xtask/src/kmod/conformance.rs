//! The module's answers beside the C driver's: one boot with each driver, the same cases and random sequences, and the comparison.

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

/// Boots both, keeps the transcripts in target/kmod, and compares.
pub fn run(context: &Context, module: &Path) -> Result<()> {
    setup::extras(context, setup::Extras::ParentVm)?;
    guest::run(context)?;
    context::run(&mut context.cargo(["build", "--quiet", "--package", "nitroxide-conformance", "--examples", "--bins"]))?;
    let folder = context.in_target("kmod");
    for (driver, name) in [(Driver::C, "c"), (Driver::Rust(module.to_owned()), "rust")] {
        let started = Instant::now();
        let vm = ParentVm::builder()
            .memory_mib(1024)
            .cpus(6)
            .qemu_arguments(["-smp", "6,sockets=1,cores=3,threads=2"])
            .hugepages(140)
            .pool("2-5")
            .driver(driver)
            .device_program(context.in_target("debug/examples/null_device"))
            .program(guest_program("nitroxide-conformance"))
            .boot();
        for (kind, arguments) in RUNS {
            let asked = vm.try_run(&format!("nitroxide-conformance {arguments} 2>&1"), PATIENCE);
            let output = asked.map_err(|error| miette!("{kind} on the driver `{name}`: {error}\n{}", vm.everything()))?;
            let place = folder.join(format!("{name}-{kind}.txt"));
            std::fs::write(&place, &output.stdout).into_diagnostic().wrap_err_with(|| format!("Writing {}", place.display()))?;
            if output.status != 0 {
                bail!("{kind} on the driver `{name}` failed; its transcript is {}\n{}", place.display(), vm.everything());
            }
        }
        std::fs::write(folder.join(format!("{name}-console.txt")), vm.console()).into_diagnostic()?;
        eprintln!("kmod: conformance on the driver `{name}`: {:.0} s", started.elapsed().as_secs_f64());
    }
    let mut good = true;
    for (kind, _) in RUNS {
        let [c, rust] = ["c", "rust"].map(|name| folder.join(format!("{name}-{kind}.txt")));
        let mut compare = std::process::Command::new(context.in_target("debug/nitroxide-conformance"));
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
