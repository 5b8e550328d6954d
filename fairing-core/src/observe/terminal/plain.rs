//! Lines for files, pipes and terminals that can do no more.

use std::time::{Duration, Instant};

use super::super::events::{Event, Stream};
use super::super::words;
use super::board::{Board, Worker};
use super::{Note, Sink, View, replica_lines};
use crate::topology::{Replica, Topology};

/// Progress of one worker is told at most this often: enough to see that it lives, few enough for a log to be read.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Shows a run as lines without escape codes.
pub(super) struct Plain {
    board: Board,
    out: Sink,
    err: Sink,
    /// When each worker's progress was last told.
    told: Vec<Option<Instant>>,
}

impl Plain {
    pub(super) fn new(topology: Topology, out: Sink, err: Sink) -> Self {
        Self { board: Board::new(topology), out, err, told: vec![None; topology.worker_count()] }
    }

    fn note(&mut self, notes: &[Note]) {
        for note in notes {
            let text = note.rendered(self.err.colour);
            self.err.write(&text);
        }
    }
}

impl View for Plain {
    fn show(&mut self, event: &Event, now: Instant) {
        let notes = self.board.apply(event, now);
        self.note(&notes);
        match event {
            Event::Line { replica, stream, text } => {
                let sink = if *stream == Stream::Stdout { &mut self.out } else { &mut self.err };
                let lines = replica_lines(self.board.topology(), *replica, *stream, text, sink);
                sink.write(&lines);
            }
            Event::Progress(progress) => {
                let Some(told) = self.told.get_mut(progress.rank.index()) else { return };
                if told.is_none_or(|told| now.saturating_duration_since(told) >= PROGRESS_INTERVAL) {
                    *told = Some(now);
                    let replica = Replica::worker(progress.rank.0);
                    let text = progress_text(&self.board.workers()[progress.rank.index()], now);
                    let line = replica_lines(self.board.topology(), replica, Stream::Stderr, &text, &self.err);
                    self.err.write(&line);
                }
            }
            _ => {}
        }
    }

    fn tick(&mut self, now: Instant) {
        let notes = self.board.tick(now);
        self.note(&notes);
    }

    fn say(&mut self, text: &str) {
        self.err.write(&format!("{}\n", text.trim_end_matches('\n')));
    }

    fn finish(&mut self, _now: Instant) {
        let notes = self.board.finish();
        self.note(&notes);
    }
}

fn progress_text(worker: &Worker, now: Instant) -> String {
    let Some(progress) = worker.progress else { return String::new() };
    let mut text = format!("epoch {}/{}  {:.0} %", progress.epoch + 1, progress.epochs, worker.share() * 100.0);
    for (name, value) in &worker.metrics {
        text.push_str(&format!("  {name} {}", words::number(*value)));
    }
    if let Some(rate) = worker.rate(now) {
        text.push_str(&format!("  {} examples/s", words::short(rate)));
    }
    text
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::super::testing::{Broken, Script, Shared};
    use super::*;

    #[track_caller]
    fn check(script: &Script, out: Expect, err: Expect) {
        let (shown_out, shown_err) = (Shared::default(), Shared::default());
        let sink = |shared: &Shared| Sink::new(Box::new(shared.clone()), false, false);
        let mut view = Plain::new(Topology::new(2, 1), sink(&shown_out), sink(&shown_err));
        script.play(&mut view);
        assert!(!shown_out.text().contains('\x1b') && !shown_err.text().contains('\x1b'));
        out.assert_eq(&shown_out.text());
        err.assert_eq(&shown_err.text());
    }

    #[test]
    fn whole_run_as_lines() {
        check(
            &Script::whole_run(),
            expect![[r#"
            worker 0 | 60000 images
        "#]],
            expect![[r#"
            2 workers + 1 parameter server joined
            worker 0 | epoch 1/2  1 %
            worker 1 | epoch 1/2  1 %
            worker 1 | a hint
            epoch 1/2  loss 1.3333  norm 0.5000  2,105 examples/s
            warning: the disk is nearly full
            worker 0 | epoch 2/2  100 %  loss 0.5000  norm 0.5000  1.1k examples/s
            worker 1 | epoch 2/2  100 %  loss 0.5000  norm 0.5000  1.1k examples/s
            epoch 2/2  loss 0.2500  accuracy 0.8500  2,065 examples/s
        "#]],
        );
    }

    #[test]
    fn progress_is_told_at_once_and_then_every_few_seconds() {
        let mut script = Script::default();
        for tenth in 0..121 {
            script.progress(0, 0, tenth, 1000, tenth * 32).wait(100);
        }
        check(
            &script,
            expect![[""]],
            expect![[r#"
            worker 0 | epoch 1/2  0 %
            worker 0 | epoch 1/2  5 %  320 examples/s
            worker 0 | epoch 1/2  10 %  320 examples/s
        "#]],
        );
    }

    #[test]
    fn failure_names_the_replica() {
        check(
            &Script::failure(),
            expect![[""]],
            expect![[r#"
            2 workers + 1 parameter server joined
            worker 0 | epoch 1/2  1 %
            worker 1 | thread 'main' panicked
            worker 1 | here
            worker 1 was ended by signal 9 (SIGKILL)
            ps 0 exited with code 3
            stopping after this round, then evaluating and saving (Ctrl-C again kills)
        "#]],
        );
    }

    #[test]
    fn epochs_do_not_wait_for_a_worker_that_is_lost() {
        let lost = |rejoins| {
            let mut script = Script::default();
            script.progress(0, 0, 100, 100, 3200).progress(1, 0, 50, 100, 1600).wait(1000);
            script.event(Event::Lost { replica: Replica::worker(1), reason: "it is frozen".into(), rejoins });
            script.wait(1000).progress(0, 1, 100, 100, 6400).wait(1000).event(Event::Stopping);
            script
        };
        check(
            &lost(false),
            expect![""],
            expect![[r#"
                worker 0 | epoch 1/2  100 %
                worker 1 | epoch 1/2  50 %
                warning: worker 1 was lost: it is frozen
                epoch 1/2  1,600 examples/s
                epoch 2/2
                stopping after this round, then evaluating and saving (Ctrl-C again kills)
            "#]],
        );
        check(
            &lost(true),
            expect![""],
            expect![[r#"
                worker 0 | epoch 1/2  100 %
                worker 1 | epoch 1/2  50 %
                warning: worker 1 was lost: it is frozen
                stopping after this round, then evaluating and saving (Ctrl-C again kills)
            "#]],
        );
    }

    #[test]
    fn reader_that_has_gone_is_no_failure() {
        let sink = || Sink::new(Box::new(Broken), false, false);
        let mut view = Plain::new(Topology::new(2, 1), sink(), sink());
        Script::whole_run().play(&mut view);
        view.say("still here");
        assert!(view.out.to.is_none() && view.err.to.is_none());
    }
}
