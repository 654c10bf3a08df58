//! `asynchronous`: a server and many clients on AF_VSOCK at once, with crates `tokio` and `tokio-vsock`, as parent applications are written: sockets that do not block,
//! registered before they are connected, and two threads.

use std::error::Error;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, split};
use tokio_vsock::{VsockAddr, VsockListener, VsockStream};

const ANY: u32 = u32::MAX;
const PARENT: u32 = 3;
const PORT: u32 = 7100;
/// Nobody is there.
const NOWHERE: u32 = 7199;
const CLIENTS: usize = 100;
/// A listener's queue may be full; then one tries again.
const MOST_REFUSALS: usize = 1000;

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = VsockListener::bind(VsockAddr::new(ANY, PORT))?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = split(stream);
                let _ = copy(&mut from, &mut to).await;
                let _ = to.shutdown().await;
            });
        }
    });
    let clients: Vec<_> = (0..CLIENTS).map(|number| tokio::spawn(talk(number))).collect();
    let mut bytes = 0;
    for client in clients {
        bytes += client.await?.map_err(|error| error.to_string())?;
    }
    println!("{CLIENTS} clients had {bytes} bytes back");
    let refused = VsockStream::connect(VsockAddr::new(PARENT, NOWHERE)).await.map(drop);
    println!("nobody there: {:?}", refused.map_err(|error| error.kind()));
    Ok(())
}

/// Sends something longer than a socket takes at once, and reads it back meanwhile.
async fn talk(number: usize) -> Result<usize, Box<dyn Error + Send + Sync>> {
    let mut refusals = 0;
    let stream = loop {
        match VsockStream::connect(VsockAddr::new(PARENT, PORT)).await {
            Ok(stream) => break stream,
            Err(error) if refusals == MOST_REFUSALS => return Err(error.into()),
            Err(_) => {
                refusals += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    if stream.peer_addr()? != VsockAddr::new(PARENT, PORT) {
        return Err("connected to somebody else".into());
    }
    let said = format!("client {number}\n").repeat(50_000);
    let (mut from, mut to) = split(stream);
    let mut heard = String::new();
    let send = async {
        to.write_all(said.as_bytes()).await?;
        to.shutdown().await
    };
    let (sent, received) = tokio::join!(send, from.read_to_string(&mut heard));
    sent?;
    received?;
    if heard == said { Ok(heard.len()) } else { Err("something else came back".into()) }
}
