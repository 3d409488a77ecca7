//! What a method remembers of every training sample: the network's last predictions.

use super::choice::Method;
use super::config::Config;

/// For every training sample the last few class distributions that were kept of it, in single precision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    classes: usize,
    slots: usize,
    values: Vec<f32>,
    visits: Vec<i64>,
}

impl Memory {
    /// The empty memory of `n` samples that the method of `config` needs; of no samples where it needs none.
    pub fn new(config: &Config, n: usize, classes: usize) -> Self {
        match config.method {
            Method::Elr => Memory::of(n, 1, classes),
            Method::JointOpt => Memory::of(n, config.joint_memory, classes),
            _ => Memory::default(),
        }
    }

    fn of(n: usize, slots: usize, classes: usize) -> Self {
        Memory { classes, slots, values: vec![0.0; n * slots * classes], visits: vec![0; n] }
    }

    /// The distributions `[n, slots, classes]`, a sample's in a ring: its visit number `v` is in slot `v mod slots`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// How often a distribution was kept of each sample.
    pub fn visits(&self) -> &[i64] {
        &self.visits
    }

    /// The same memory with other content, as a checkpoint has kept it; as many values and visits as there are now.
    pub fn set(&mut self, values: Vec<f32>, visits: Vec<i64>) {
        (self.values, self.visits) = (values, visits);
    }

    /// Extents of [`Memory::values`]; `None` where nothing is remembered.
    pub fn shape(&self) -> Option<[usize; 3]> {
        (self.slots > 0).then_some([self.visits.len(), self.slots, self.classes])
    }

    /// Number of times that something was kept of a sample.
    fn seen(&self, id: usize) -> usize {
        usize::try_from(self.visits[id]).unwrap_or(0)
    }

    fn row(&self, id: usize, slot: usize) -> std::ops::Range<usize> {
        let from = (id * self.slots + slot) * self.classes;
        from..from + self.classes
    }

    /// Mean of the distributions that are kept of sample `id`; `None` where there is none.
    pub fn mean(&self, id: usize) -> Option<Vec<f64>> {
        let filled = self.seen(id).min(self.slots);
        let column = |j: usize| (0..filled).map(|slot| f64::from(self.values[self.row(id, slot)][j])).sum::<f64>();
        (filled > 0).then(|| (0..self.classes).map(|j| column(j) / filled as f64).collect())
    }

    /// Keeps a distribution of sample `id`, in the place of the oldest one if all are taken. One that is no distribution, because
    /// a forward pass has overflowed, is not kept.
    pub fn push(&mut self, id: usize, distribution: &[f64]) {
        if !distribution.iter().all(|p| p.is_finite()) {
            return;
        }
        let row = self.row(id, self.seen(id) % self.slots);
        self.values[row].iter_mut().zip(distribution).for_each(|(kept, p)| *kept = *p as f32);
        self.visits[id] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::Memory;
    use crate::train::choice::Method;
    use crate::train::config::Config;
    use crate::train::preset::Preset;

    #[test]
    fn the_mean_is_over_the_last_predictions_of_a_sample() {
        let config = Config { method: Method::JointOpt, joint_memory: 2, ..Preset::Small.config() };
        let mut memory = Memory::new(&config, 3, 2);
        assert_eq!(memory.shape(), Some([3, 2, 2]));
        assert_eq!(memory.mean(1), None);
        memory.push(1, &[1.0, 0.0]);
        assert_eq!(memory.mean(1), Some(vec![1.0, 0.0]));
        memory.push(1, &[0.5, 0.5]);
        assert_eq!(memory.mean(1), Some(vec![0.75, 0.25]));
        memory.push(1, &[0.0, 1.0]);
        assert_eq!(memory.mean(1), Some(vec![0.25, 0.75]), "the first one is forgotten");
        assert_eq!((memory.mean(0), memory.mean(2)), (None, None));
        let mut copy = Memory::new(&config, 3, 2);
        copy.set(memory.values().to_vec(), memory.visits().to_vec());
        assert_eq!(copy, memory);
        assert_eq!(Memory::new(&Preset::Small.config(), 3, 2).shape(), None);
    }
}
