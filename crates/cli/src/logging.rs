//! Log lines of the libraries, on standard error: errors only (what a command itself must say is in its failure), warnings too for a
//! command that stays, or what `NITROXIDE_LOG` asks for (e.g. `debug`, `nitroxide_vsock=trace`).

use tracing_subscriber::EnvFilter;

const VARIABLE: &str = "NITROXIDE_LOG";

/// Sets it up for this process; `level` is what is shown where the user asks for nothing else.
pub fn begin(level: &str) {
    let filter = EnvFilter::try_from_env(VARIABLE).unwrap_or_else(|_| EnvFilter::new(level));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).without_time();
    // Fails only if somebody did it before, which is as good.
    let _ = subscriber.try_init();
}
