//! Latencies in buckets: 32 for each power of two, so that a percentile is right to 3 %.

use std::time::Duration;

const SUB_BITS: u32 = 5;
const SUB: usize = 1 << SUB_BITS;
const BUCKETS: usize = (64 - SUB_BITS as usize + 1) * SUB;

/// Counts of latencies in nanoseconds.
pub(crate) struct Histogram {
    counts: Box<[u64]>,
    total: u64,
    sum: u128,
    max: u64,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Histogram { counts: vec![0; BUCKETS].into(), total: 0, sum: 0, max: 0 }
    }

    pub(crate) fn record(&mut self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(ns)] += 1;
        self.total += 1;
        self.sum += u128::from(ns);
        self.max = self.max.max(ns);
    }

    pub(crate) fn merge(&mut self, other: &Histogram) {
        for (to, from) in self.counts.iter_mut().zip(&other.counts) {
            *to += from;
        }
        self.total += other.total;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    pub(crate) fn count(&self) -> u64 {
        self.total
    }

    /// Mean in microseconds; 0 when nothing was recorded.
    pub(crate) fn mean_us(&self) -> f64 {
        if self.total == 0 { 0.0 } else { self.sum as f64 / self.total as f64 / 1e3 }
    }

    pub(crate) fn max_us(&self) -> f64 {
        self.max as f64 / 1e3
    }

    /// The latency in microseconds that a share (0 to 1) of the requests did not exceed.
    pub(crate) fn percentile_us(&self, share: f64) -> f64 {
        let mut left = share * self.total as f64;
        for (index, &count) in self.counts.iter().enumerate() {
            left -= count as f64;
            if count > 0 && left <= 0.0 {
                return (lower_bound(index + 1).min(self.max)) as f64 / 1e3;
            }
        }
        self.max_us()
    }
}

fn bucket(ns: u64) -> usize {
    let low = |v: u64| usize::try_from(v).expect("below 2 * SUB");
    if ns < SUB as u64 {
        return low(ns);
    }
    let shift = ns.ilog2() - SUB_BITS;
    SUB * shift as usize + low(ns >> shift)
}

/// The smallest value of a bucket.
fn lower_bound(index: usize) -> u64 {
    if index < 2 * SUB {
        return index as u64;
    }
    let shift = index / SUB - 1;
    ((SUB + index % SUB) as u64).checked_shl(u32::try_from(shift).unwrap_or(64)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_hold_their_bounds() {
        for index in 0..BUCKETS {
            assert_eq!(bucket(lower_bound(index)), index, "bucket {index}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_close() {
        let mut histogram = Histogram::new();
        for us in 1..=1000 {
            histogram.record(Duration::from_micros(us));
        }
        assert_eq!(histogram.count(), 1000);
        assert!((histogram.mean_us() - 500.5).abs() < 0.01);
        assert!((histogram.percentile_us(0.5) / 500.0 - 1.0).abs() < 0.04);
        assert!((histogram.percentile_us(0.99) / 990.0 - 1.0).abs() < 0.04);
        assert_eq!(histogram.percentile_us(1.0), 1000.0);
    }

    #[test]
    fn merging_adds() {
        let (mut a, mut b) = (Histogram::new(), Histogram::new());
        a.record(Duration::from_micros(1));
        b.record(Duration::from_micros(9));
        a.merge(&b);
        assert_eq!((a.count(), a.max_us(), a.mean_us()), (2, 9.0, 5.0));
    }
}
