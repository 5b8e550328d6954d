//! The doors that a peer's bytes come in by, for the fuzzer.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use super::coordinator::{Coordinator, Event, Heard, Source};
use super::layout::{Class, Layout, TensorSpec};
use super::optimizer::Adam;
use super::parameter_server::{FromServer, Join, ParameterServer, ToServer};
use super::replica::Door;
use super::status::RunStatus;
use crate::protocol::failure::{Failure, FailureKind};
use crate::protocol::fuzzing::{Script, round_trip};
use crate::protocol::message::{Incarnation, Numbered, Position, Seat, SeatState, Speaker};
use crate::topology::{Address, JOIN, KEEP_RESULT, Mode, Placement, Rank, Replica, Topology};

/// One server, and workers that are all this peer.
fn placement(workers: u32) -> Placement {
    Placement {
        run: "fuzz".into(),
        replica: Replica::ps(0),
        topology: Topology::new(workers, 1),
        seed: 0,
        threads: 1,
        servers: vec![Address::Memory("ps-0".into())],
        data_dir: None,
        mode: Mode::Sync,
        rejoin: Duration::from_secs(1),
        join: JOIN,
        keep_result: KEEP_RESULT,
        first_stays: false,
    }
}

/// A new connection, from its hello on.
pub(crate) fn door(bytes: &[u8]) {
    let (placement, status) = (placement(2), Arc::new(RunStatus::default()));
    // So that no hello waits for the coordinator's word.
    status.fail(Failure {
        replica: Replica::worker(0),
        kind: FailureKind::Lost,
        message: "it is only a test".into(),
        round: None,
    });
    let server = ParameterServer::new(0, &placement, Position::default(), status);
    let (events, received) = sync_channel(1024);
    drop(received);
    Door::new(&placement, server, Some(events)).receive(Script::connection(bytes));
}

/// A worker that has joined, and what it says to its server.
pub(crate) fn session(bytes: &[u8]) {
    round_trip::<ToServer>(bytes);
    round_trip::<FromServer>(bytes);
    let (placement, status) = (placement(1), Arc::new(RunStatus::default()));
    let incarnation = Incarnation::fresh();
    status.set_roll(vec![Seat { incarnation: Some(incarnation), state: SeatState::Training }]);
    let server = ParameterServer::new(0, &placement, Position::default(), status);
    let tensor = |path: &str, len| TensorSpec {
        path: path.into(),
        shape: vec![len],
        dtype: "f32".into(),
        class: Class::Trained,
    };
    let layout = Layout::new(vec![tensor("a", 3), tensor("b", 5)]).expect("it can be trained");
    let join = Join { layout, optimizer: Adam::new().clip_global_norm(1.0).into() };
    let session = server.admit(Rank(0), incarnation, None).expect("it has the seat");
    let joined = session.join_here(join, |range| (vec![0.5; range.len()], vec![1, 2, 3]));
    assert!(joined.is_ok());
    server.serve(Rank(0), incarnation, Script::connection(bytes));
}

/// Two workers, and what the first one says to the coordinator.
pub(crate) fn coordinator(bytes: &[u8]) {
    let placement = placement(2);
    let mut coordinator = Coordinator::new(&placement, Arc::new(RunStatus::default()), Position::default());
    let source = |replica, connection| Source { speaker: Speaker::Replica(replica), connection };
    for (number, replica) in placement.topology.replicas().enumerate() {
        coordinator.handle(Event::Connected {
            source: source(replica, number as u64),
            incarnation: Incarnation::fresh(),
            connection: Script::connection(&[]),
            heard: Heard::now(),
        });
    }
    let mut rest = bytes;
    let mut number = 0;
    while let Ok(message) = ciborium::from_reader::<Numbered, _>(&mut rest) {
        number += 1;
        let message = Numbered { number, ..message };
        coordinator.handle(Event::Said {
            source: source(Replica::worker(0), 1),
            message: Box::new(message),
            files: None,
        });
        coordinator.check_waits();
    }
}
