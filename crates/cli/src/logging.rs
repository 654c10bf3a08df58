//! Log lines of the libraries, on standard error: warnings and errors, or what `NITROXIDE_LOG` asks for (e.g. `debug`, `nitroxide_vsock=trace`).

use tracing_subscriber::EnvFilter;

const VARIABLE: &str = "NITROXIDE_LOG";

/// Sets it up for this process.
pub fn begin(quiet: bool) {
    let filter = EnvFilter::try_from_env(VARIABLE).unwrap_or_else(|_| EnvFilter::new(if quiet { "error" } else { "warn" }));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).without_time();
    // Fails only if somebody did it before, which is as good.
    let _ = subscriber.try_init();
}
