//! QEMU's command line for one enclave VM.
//!
//! Everything the machine is made of arrives as inherited file descriptors, so the line holds numbers, our own words and one foreign string: the guest
//! kernel's command line, a separate argument that QEMU does not split at commas. A picture of the machine: docs/engine.md.

use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::accelerate::{Choice, Clock};
use crate::command_line;
use crate::spec::VirtioDiscovery;

/// The system call filter: no obsolete calls, no more privileges, no new processes, no priorities.
pub(crate) const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// One run of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub fd: RawFd,
    pub offset: u64,
    pub size: u64,
}

/// What the command line is made from; file descriptors are numbers in QEMU's process.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    /// Folders with firmware, searched before QEMU's own.
    pub firmware: &'a [PathBuf],
    pub sandbox: bool,
    pub choice: &'a Choice,
    pub discovery: VirtioDiscovery,
    pub memory: &'a [Run],
    pub vcpus: u32,
    pub kernel: RawFd,
    pub initrd: Option<RawFd>,
    /// The guest kernel's command line as [`kernel_command_line`] makes it.
    pub command_line: &'a [u8],
    pub console: RawFd,
    pub qmp: RawFd,
    pub vsock: Option<RawFd>,
    pub nsm: Option<RawFd>,
}

/// Where microvm's virtio-mmio transports lie without ACPI: 512 bytes each from 0xfeb00000, interrupt lines from 5 (hw/i386/microvm.c, `VIRTIO_MMIO_BASE`).
const MMIO_BASE: u64 = 0xfeb0_0000;
const MMIO_FIRST_LINE: u64 = 5;

/// The image's command line with what this VM's guest must be told: the clock, and its devices where it does not find them by ACPI.
pub(crate) fn kernel_command_line(line: &[u8], choice: &Choice, discovery: VirtioDiscovery, devices: u64) -> Vec<u8> {
    let mut extra = Vec::new();
    if let Clock::HostCounter { khz } = choice.clock {
        // An image's own value would be another machine's; the last one counts.
        extra.push(format!("tsc_early_khz={khz}"));
    }
    if discovery == VirtioDiscovery::Cmdline {
        extra.extend(
            (0..devices).map(|device| format!("virtio_mmio.device=512@{:#x}:{}", MMIO_BASE + 512 * device, MMIO_FIRST_LINE + device)),
        );
    }
    command_line::insert(line, &extra)
}

/// The arguments after the program's name. `Vec<u8>` each: a kernel's command line need not be UTF-8.
pub(crate) fn build(machine: &Machine<'_>) -> Vec<Vec<u8>> {
    let mut line = Line::default();
    for folder in machine.firmware {
        line.option("-L", folder.as_os_str().as_encoded_bytes());
    }
    line.flags(&["-nodefaults", "-no-user-config", "-no-reboot"]);
    line.option("-display", "none").option("-nic", "none").option("-monitor", "none");
    if machine.sandbox {
        line.option("-sandbox", SANDBOX);
    }
    accelerator(&mut line, machine.choice);
    memory(&mut line, machine);
    line.option("-smp", machine.vcpus.to_string());
    line.option("-chardev", format!("socket,id=qmp,fd={}", machine.qmp)).option("-qmp", "chardev:qmp");
    line.option("-chardev", format!("socket,id=console,fd={}", machine.console)).option("-serial", "chardev:console");
    devices(&mut line, machine);
    line.option("-kernel", inherited(machine.kernel));
    if let Some(initrd) = machine.initrd {
        line.option("-initrd", inherited(initrd));
    }
    line.option("-append", machine.command_line);
    line.0
}

fn accelerator(line: &mut Line, choice: &Choice) {
    match choice.clock {
        Clock::Kvm => line.option("-accel", "kvm").option("-cpu", "host"),
        Clock::HostCounter { .. } => line.option("-accel", "tcg,thread=multi").option("-cpu", "max"),
        // Counting instructions needs all vCPUs on one thread.
        Clock::Instructions => line.option("-accel", "tcg,thread=single").option("-icount", "shift=auto").option("-cpu", "max"),
    };
}

/// One run is the machine's memory; several are stitched together as NUMA nodes, which microvm lays out one after the other.
fn memory(line: &mut Line, machine: &Machine<'_>) {
    let acpi = match machine.discovery {
        VirtioDiscovery::Acpi => "acpi=on",
        // Our own parameters stand in the right place, QEMU's would come last, behind ` -- `.
        VirtioDiscovery::Cmdline => "acpi=off,auto-kernel-cmdline=off",
    };
    let only = machine.memory.len() == 1;
    line.option("-machine", format!("microvm,{acpi},dump-guest-core=off{}", if only { ",memory-backend=m0" } else { "" }));
    let mut total_bytes = 0;
    for (index, Run { fd, offset, size }) in machine.memory.iter().enumerate() {
        total_bytes += size;
        let path = inherited(*fd);
        line.option(
            "-object",
            format!("memory-backend-file,id=m{index},mem-path={path},offset={offset},size={size},share=on,prealloc=off"),
        );
        if !only {
            let cpus = if index == 0 { format!(",cpus=0-{}", machine.vcpus - 1) } else { String::new() };
            line.option("-numa", format!("node,memdev=m{index}{cpus}"));
        }
    }
    line.option("-m", format!("{}M", total_bytes >> 20));
}

/// The virtio devices, on transports of known places where the guest is told these on its command line.
fn devices(line: &mut Line, machine: &Machine<'_>) {
    if machine.discovery == VirtioDiscovery::Acpi {
        // A kernel with its driver tells a panic from a reboot; found by ACPI only.
        line.option("-device", "pvpanic");
    }
    let wanted =
        [("vsock", machine.vsock, "vhost-user-vsock-device"), ("nsm", machine.nsm, "vhost-user-test-device,virtio-id=33,num_vqs=1")];
    let present = wanted.into_iter().filter_map(|(name, socket, device)| Some((name, socket?, device)));
    for (index, (name, socket, device)) in present.enumerate() {
        line.option("-chardev", format!("socket,id={name},fd={socket}"));
        let bus = match machine.discovery {
            VirtioDiscovery::Acpi => String::new(),
            VirtioDiscovery::Cmdline => format!(",bus=virtio-mmio-bus.{index}"),
        };
        let (driver, properties) = device.split_once(',').map_or((device, String::new()), |(driver, rest)| (driver, format!(",{rest}")));
        line.option("-device", format!("{driver},chardev={name}{properties}{bus}"));
    }
}

/// The path by which QEMU opens an inherited file anew.
fn inherited(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

#[derive(Default)]
struct Line(Vec<Vec<u8>>);

impl Line {
    fn flags(&mut self, flags: &[&str]) {
        self.0.extend(flags.iter().map(|flag| flag.as_bytes().to_vec()));
    }

    fn option(&mut self, name: &str, value: impl AsRef<[u8]>) -> &mut Self {
        self.0.push(name.as_bytes().to_vec());
        self.0.push(value.as_ref().to_vec());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(clock: Clock) -> Choice {
        Choice { kvm: clock == Clock::Kvm, clock, reason: String::new() }
    }

    const COUNTER: Clock = Clock::HostCounter { khz: 2_600_000 };

    fn text(machine: &Machine<'_>) -> String {
        build(machine).iter().map(|argument| String::from_utf8_lossy(argument).into_owned()).collect::<Vec<_>>().join(" ")
    }

    fn machine<'a>(choice: &'a Choice, memory: &'a [Run], command_line: &'a [u8]) -> Machine<'a> {
        Machine {
            firmware: &[],
            sandbox: true,
            choice,
            discovery: VirtioDiscovery::Acpi,
            memory,
            vcpus: 2,
            kernel: 10,
            initrd: Some(11),
            command_line,
            console: 12,
            qmp: 13,
            vsock: Some(14),
            nsm: Some(15),
        }
    }

    const ONE: [Run; 1] = [Run { fd: 20, offset: 0, size: 256 << 20 }];

    #[test]
    fn one_run_under_tcg() {
        let choice = choice(COUNTER);
        let mut machine = machine(&choice, &ONE, b"quiet");
        let firmware = [PathBuf::from("/r/usr/share/qemu")];
        machine.firmware = &firmware;
        assert_eq!(
            text(&machine),
            "-L /r/usr/share/qemu -nodefaults -no-user-config -no-reboot -display none -nic none -monitor none \
             -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -accel tcg,thread=multi -cpu max \
             -machine microvm,acpi=on,dump-guest-core=off,memory-backend=m0 \
             -object memory-backend-file,id=m0,mem-path=/proc/self/fd/20,offset=0,size=268435456,share=on,prealloc=off -m 256M -smp 2 \
             -chardev socket,id=qmp,fd=13 -qmp chardev:qmp -chardev socket,id=console,fd=12 -serial chardev:console -device pvpanic \
             -chardev socket,id=vsock,fd=14 -device vhost-user-vsock-device,chardev=vsock \
             -chardev socket,id=nsm,fd=15 -device vhost-user-test-device,chardev=nsm,virtio-id=33,num_vqs=1 \
             -kernel /proc/self/fd/10 -initrd /proc/self/fd/11 -append quiet"
        );
    }

    #[test]
    fn several_runs_become_numa_nodes_with_all_cpus_in_the_first() {
        let choice = choice(Clock::Kvm);
        let runs = [Run { fd: 20, offset: 4 << 20, size: 2 << 20 }, Run { fd: 21, offset: 0, size: 126 << 20 }];
        let text = text(&machine(&choice, &runs, b""));
        assert!(text.contains("-machine microvm,acpi=on,dump-guest-core=off -object"), "{text}");
        assert!(
            text.contains("mem-path=/proc/self/fd/20,offset=4194304,size=2097152,share=on,prealloc=off -numa node,memdev=m0,cpus=0-1 ")
        );
        assert!(text.contains("-numa node,memdev=m1 -m 128M"));
        assert!(text.contains("-accel kvm -cpu host"));
    }

    #[test]
    fn counting_instructions_takes_one_thread() {
        let choice = choice(Clock::Instructions);
        assert!(text(&machine(&choice, &ONE, b"")).contains("-accel tcg,thread=single -icount shift=auto -cpu max"));
    }

    #[test]
    fn devices_of_the_command_line_have_fixed_places_and_no_acpi() {
        let choice = choice(COUNTER);
        let mut machine = machine(&choice, &ONE, b"");
        machine.discovery = VirtioDiscovery::Cmdline;
        let text = text(&machine);
        assert!(text.contains("-machine microvm,acpi=off,auto-kernel-cmdline=off,"));
        assert!(text.contains("vhost-user-vsock-device,chardev=vsock,bus=virtio-mmio-bus.0"));
        assert!(text.contains("vhost-user-test-device,chardev=nsm,virtio-id=33,num_vqs=1,bus=virtio-mmio-bus.1"));
        assert_eq!(
            kernel_command_line(b"quiet -- app", &choice, VirtioDiscovery::Cmdline, 2),
            b"quiet tsc_early_khz=2600000 virtio_mmio.device=512@0xfeb00000:5 virtio_mmio.device=512@0xfeb00200:6 -- app"
        );
    }

    #[test]
    fn the_guest_is_told_the_clock_only_where_it_uses_it() {
        let line = |clock| kernel_command_line(b"quiet", &choice(clock), VirtioDiscovery::Acpi, 2);
        assert_eq!(line(COUNTER), b"quiet tsc_early_khz=2600000");
        assert_eq!(line(Clock::Kvm), b"quiet");
        assert_eq!(line(Clock::Instructions), b"quiet");
    }

    #[test]
    fn a_hostile_kernel_command_line_stays_one_argument() {
        let choice = choice(COUNTER);
        for hostile in [&b"quiet,id=x,mem-path=/etc/shadow"[..], b"-device isa-debug-exit", b"a\" -kernel /x", b"\xff\xfe,,", b"@file", b""]
        {
            let arguments = build(&machine(&choice, &ONE, hostile));
            assert_eq!(arguments.last().unwrap(), hostile);
            assert_eq!(arguments[arguments.len() - 2], b"-append");
            assert_eq!(arguments.len(), build(&machine(&choice, &ONE, b"quiet")).len());
        }
    }
}
