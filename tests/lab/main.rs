//! `lab`: the loads and guests of the tests, by hand.

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::io::Read as _;
use stillframe_tests::{
    captured,
    cloud::{BUCKET, Cloud, INSTANCE, ORDERS, SESSION_ROLE},
    fill,
    load::{self, Load},
    programs,
};

/// Starts what the tests start, and keeps it until Enter is pressed.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Processes with open files and sockets
    Load {
        /// How many
        n: usize,
    },
    /// A guest whose memory was captured and fetched, to look at
    Guest {
        /// The kernel: 5.10, 6.1, …
        kernel: String,
        /// Five levels of page tables
        #[arg(long)]
        la57: bool,
    },
    /// The memory of a guest that has real files in it, as the benchmark reads it
    Image {
        /// Where to write it
        to: std::path::PathBuf,
    },
    /// AWS on loopback: a bucket under the project's policy, Systems Manager with the project's documents, this machine in namespaces of its own as its
    /// host; prints the variables by which the programs reach it
    Cloud,
    /// Nothing, until standard input ends
    Wait,
    /// Memory full of pages that carry their own identity
    Fill {
        /// How much
        mib: usize,
    },
}

fn main() -> Result<()> {
    load::serve();
    match Cli::parse().what {
        What::Guest { kernel, la57 } => {
            let captured = captured::small(&kernel, la57, "")?;
            println!(
                "{}\n{}; Enter deletes it",
                captured.told,
                captured.fetched.display()
            );
            let _ = std::io::stdin().read(&mut [0])?;
        }
        What::Cloud => {
            let (cloud, agent) = (Cloud::start()?, programs::agent()?);
            for (name, value) in &cloud.responder {
                println!("export {name}={value}");
            }
            println!(
                "export STORE=s3://{BUCKET} INSTANCE={INSTANCE} AGENT={}",
                agent.display()
            );
            println!("export ORDER_BUCKET={ORDERS} SESSION_ROLE={SESSION_ROLE}");
            println!("# Enter ends it");
            let _ = std::io::stdin().read(&mut [0])?;
        }
        What::Image { to } => captured::guest_image(&to)?,
        What::Wait => _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?,
        What::Fill { mib } => fill::fill(mib)?,
        What::Load { n } => {
            let load = Load::start(n)?;
            println!("{} processes; Enter ends them", load.pids().count());
            let _ = std::io::stdin().read(&mut [0])?;
        }
    }
    Ok(())
}
