//! The points of a curve: as many as a picture can show, and their trend.

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

/// Values that are averaged to one point of a trend, at least.
const FEWEST: usize = 4;

/// A curve needs a trend if, from one value to the next, it goes up or down by more than this part of its extent.
const NOISY: f64 = 0.01;

/// The means of equally many values in a row, about `stretches` of them, each at the middle of its rounds; empty where there
/// are not enough values, or the curve is smooth by itself.
pub(super) fn trend(points: &[Point], stretches: usize) -> Vec<Point> {
    let length = points.len().div_ceil(stretches.max(1));
    if length < FEWEST || !is_noisy(points) {
        return Vec::new();
    }
    let mean = |stretch: &[Point]| {
        let values = || stretch.iter().map(|point| point.1).filter(|value| !value.is_nan());
        // Without any value it is 0 / 0: a gap.
        let mean = values().sum::<f64>() / values().count() as f64;
        (stretch[0].0.midpoint(stretch[stretch.len() - 1].0), mean)
    };
    // A short rest at the end would be noisier than everything before it.
    let whole = points.len() / length * length;
    points[..whole].chunks(length).map(mean).collect()
}

fn is_noisy(points: &[Point]) -> bool {
    let values = || points.iter().map(|point| point.1).filter(|value| !value.is_nan());
    let (least, greatest) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
    let way: f64 = values().zip(values().skip(1)).map(|(one, next)| (next - one).abs()).sum();
    way > NOISY * (greatest - least) * values().count() as f64
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
    fn a_trend_is_the_mean_of_equally_many_values() {
        let points: Vec<Point> = (0..23).map(|i| (f64::from(i), f64::from(i % 5))).collect();
        assert_eq!(trend(&points, 5), [(2.0, 2.0), (7.0, 2.0), (12.0, 2.0), (17.0, 2.0)]);
        assert_eq!(trend(&points, 20), [], "two values are no trend");
        let gap: Vec<Point> =
            (0..16).map(|i| (f64::from(i), if i < 8 { f64::NAN } else { f64::from(i % 2) })).collect();
        assert!(trend(&gap, 4)[0].1.is_nan());
        let smooth: Vec<Point> = (0..1_000).map(|i| (f64::from(i), f64::from(i))).collect();
        assert_eq!(trend(&smooth, 5), []);
        assert_eq!(trend(&[], 5), []);
    }
}
