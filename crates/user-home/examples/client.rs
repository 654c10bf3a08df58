//! `client IMAGE MIB`: a client of `/dev/nitro_enclaves` like others, written with `crates/client`: starts an enclave on the device file, prints what
//! it got, waits for its end. `client hold MIB`: the same with no image, until standard input ends.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use nitroxide_client::{Device, DeviceChoice};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1);
    let image = words.next().ok_or("an image is missing")?;
    let bytes = words.next().ok_or("MiB are missing")?.parse::<u64>()? << 20;
    let device = Device::open(DeviceChoice::Host(Path::new("/dev/nitro_enclaves").to_owned()))?;
    let mut memory = device.allocate_memory(bytes)?;
    if image == "hold" {
        memory.write_image(&mut &b"no image"[..], 8)?;
    } else {
        let mut file = File::open(&image)?;
        let length = file.metadata()?.len();
        memory.write_image(&mut file, length)?;
    }
    let mut enclave = device.create_enclave()?;
    enclave.add_memory(memory)?;
    let cpus = [enclave.add_vcpu(None)?, enclave.add_vcpu(None)?];
    let cid = enclave.start(None, false)?;
    println!("slot {} CID {cid} CPUs {} {} ended {}", u8::from(enclave.slot_uid().0 != 0), cpus[0], cpus[1], enclave.has_ended()?);
    if image == "hold" {
        std::io::stdin().read_to_end(&mut Vec::new())?;
    } else {
        enclave.wait()?;
        println!("ended");
    }
    Ok(())
}
