//! What it costs to be a client: system calls natively and below the supervisor, in turns, and a compilation. Not a criterion benchmark: what is timed are other
//! processes. Method and results: docs/benchmarks.md.
#![expect(clippy::unwrap_used, reason = "a benchmark that fails is a panic")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Turns of each; `NITROXIDE_BENCH_TURNS` says otherwise.
const TURNS: usize = 5;

fn main() {
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let turns = std::env::var("NITROXIDE_BENCH_TURNS").ok().and_then(|text| text.parse().ok()).unwrap_or(TURNS);
    let folder = tempfile::tempdir().unwrap();
    let examples = examples();
    let supervised = |program: &Path| {
        let mut command = Command::new(examples.join("supervise"));
        command.arg(folder.path().join("world")).arg(program);
        command
    };

    let calls = examples.join("calls");
    let mut figures: BTreeMap<String, [Vec<f64>; 2]> = BTreeMap::new();
    let mut order = Vec::new();
    for _ in 0..turns {
        for (place, mut command) in [Command::new(&calls), supervised(&calls)].into_iter().enumerate() {
            let output = command.stderr(Stdio::inherit()).output().unwrap();
            for line in String::from_utf8(output.stdout).unwrap().lines() {
                let (name, value) = line.rsplit_once(' ').unwrap();
                if !figures.contains_key(name) {
                    order.push(name.to_owned());
                }
                figures.entry(name.to_owned()).or_default()[place].push(value.parse().unwrap());
            }
        }
    }
    println!("{turns} turns, nanoseconds if not said otherwise; medians of the turns' medians");
    println!("{:<32}{:>12}{:>14}{:>12}", "", "native", "supervised", "more");
    for name in order {
        let [native, supervised] = figures[&name].clone().map(median);
        let more = native.zip(supervised).map(|(native, supervised)| supervised - native);
        let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.0}"));
        println!("{name:<32}{:>12}{:>14}{:>12}", shown(native), shown(supervised), shown(more));
    }

    // The driver core and what it needs, into an empty folder.
    let mut times: [Vec<f64>; 2] = Default::default();
    for _ in 0..turns {
        for (place, mut command) in [Command::new(env!("CARGO")), supervised(Path::new(env!("CARGO")))].into_iter().enumerate() {
            let target = tempfile::tempdir().unwrap();
            command.args(["build", "--quiet", "--offline", "--package", "nitroxide-driver", "--target-dir"]).arg(target.path());
            let begin = Instant::now();
            assert!(command.status().unwrap().success());
            times[place].push(begin.elapsed().as_secs_f64());
        }
    }
    let [native, supervised] = times.map(|times| median(times).unwrap());
    println!("a compilation: {native:.2} s natively, {supervised:.2} s supervised: {:+.1} %", (supervised / native - 1.0) * 100.0);
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// The examples of this build.
fn examples() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let folder = program.ancestors().nth(2).unwrap().join("examples");
    assert!(folder.join("calls").exists(), "`cargo build --release -p nitroxide-user-home --examples` makes {}", folder.display());
    folder
}
