//! The points of a curve: taken from the metrics, and as many as a picture can show.

use crate::observe::events::Metric;

/// One point: round and value. A value that cannot be drawn is NaN, which interrupts the line.
pub(super) type Point = (f64, f64);

/// Beyond this, differences of values overflow; no picture shows it.
const LARGEST: f64 = 1e150;

/// The value as it can be drawn.
pub(super) fn drawable(value: f64) -> f64 {
    if value.abs() <= LARGEST { value } else { f64::NAN }
}

/// At most `most` of the points, in their order, so that the picture stays the same: first, last, and the least and greatest
/// of each stretch are among them. A stretch without any value interrupts the line.
pub(super) fn decimate(points: &[Point], most: usize) -> Vec<Point> {
    let most = most.max(4);
    let ([first, inner @ .., last], true) = (points, points.len() > most) else { return points.to_vec() };
    let stretches = (most - 2) / 2;
    let mut kept = vec![*first];
    for stretch in 0..stretches {
        let bound = |stretch: usize| stretch * inner.len() / stretches;
        let part = &inner[bound(stretch)..bound(stretch + 1)];
        let values = || part.iter().enumerate().filter(|(_, (_, value))| !value.is_nan());
        let by_value = |a: &(usize, &Point), b: &(usize, &Point)| a.1.1.total_cmp(&b.1.1);
        match (values().min_by(by_value), values().max_by(by_value)) {
            (Some((least, _)), Some((greatest, _))) if least == greatest => kept.push(part[least]),
            (Some((least, _)), Some((greatest, _))) => {
                kept.push(part[least.min(greatest)]);
                kept.push(part[least.max(greatest)]);
            }
            _ => kept.push((part[0].0, f64::NAN)),
        }
    }
    kept.push(*last);
    kept
}

/// The mean of each epoch, at the middle of its rounds; empty unless there are at least two epochs of at least eight values.
pub(super) fn epoch_means(metrics: &[&Metric]) -> Vec<Point> {
    const FEWEST: usize = 8;
    let epochs: Vec<&[&Metric]> = metrics.chunk_by(|a, b| a.epoch == b.epoch).collect();
    if epochs.len() < 2 || epochs.iter().any(|epoch| epoch.len() < FEWEST) {
        return Vec::new();
    }
    let mean = |epoch: &&[&Metric]| {
        let values: Vec<f64> =
            epoch.iter().map(|metric| drawable(metric.value)).filter(|value| !value.is_nan()).collect();
        let (first, last) = (epoch[0].round as f64, epoch[epoch.len() - 1].round as f64);
        (first.midpoint(last), values.iter().sum::<f64>() / values.len() as f64)
    };
    epochs.iter().map(mean).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn decimation_keeps_what_can_be_seen(
            values in prop::collection::vec(prop_oneof![8 => -1e3..1e3_f64, 1 => Just(f64::NAN)], 0..3_000),
            most in 4_usize..400,
        ) {
            let points: Vec<Point> = (0..).map(f64::from).zip(values).collect();
            let kept = decimate(&points, most);
            prop_assert!(kept.len() <= most.max(points.len().min(most)));
            prop_assert!(kept.windows(2).all(|pair| pair[0].0 < pair[1].0), "in their order");
            let same = |a: &Point, b: &Point| a.0 == b.0 && (a.1 == b.1 || b.1.is_nan());
            prop_assert!(kept.iter().all(|point| same(&points[point.0 as usize], point)), "nothing is made up");
            let extremes = |points: &[Point]| {
                let values = || points.iter().map(|point| point.1);
                (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max))
            };
            prop_assert_eq!(extremes(&kept), extremes(&points));
            prop_assert_eq!(kept.first().map(|point| point.0), points.first().map(|point| point.0));
            prop_assert_eq!(kept.last().map(|point| point.0), points.last().map(|point| point.0));
        }
    }

    #[test]
    fn few_points_stay_as_they_are() {
        let points = [(0.0, 1.0), (1.0, 2.0), (5.0, 0.5)];
        assert_eq!(decimate(&points, 10), points);
    }

    #[test]
    fn a_long_gap_stays_a_gap() {
        let points: Vec<Point> =
            (0..1_000).map(|i| (f64::from(i), if (400..600).contains(&i) { f64::NAN } else { 1.0 })).collect();
        assert!(decimate(&points, 100).iter().any(|point| point.1.is_nan()));
    }

    #[test]
    fn epochs_have_means_where_their_values_are_many() {
        let metric =
            |round: u64, epoch| Metric { name: "loss".into(), epoch, round, value: round as f64, ranks: vec![] };
        let metrics: Vec<Metric> = (0..20).map(|round| metric(round, round / 10)).collect();
        let all: Vec<&Metric> = metrics.iter().collect();
        assert_eq!(epoch_means(&all), [(4.5, 4.5), (14.5, 14.5)]);
        assert_eq!(epoch_means(&all[..10]), []);
        assert_eq!(epoch_means(&all[..12]), []);
    }
}
