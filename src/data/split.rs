//! Which samples of the training set are trained on: a validation part, and balanced subsets.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::rng::{Purpose, permutation, stream};

/// Which labels the validation part is scored against. The split itself is the same for both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ValidationLabels {
    /// The given, noisy ones: nothing clean is needed.
    #[default]
    Noisy,
    /// The true ones.
    Clean,
}

/// Two parts of a training set: indices in ascending order, each sample in exactly one part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// Samples to train on.
    pub train: Vec<u32>,
    /// Samples to validate on; empty for fraction 0.
    pub validation: Vec<u32>,
}

/// The samples of each class, in random order.
fn shuffled_classes(labels: &[u16], classes: usize, seed: u64, purpose: Purpose) -> Result<Vec<Vec<u32>>> {
    let mut members = vec![Vec::new(); classes];
    for i in permutation(labels.len(), &mut stream(seed, purpose, 0, 0)) {
        let label = labels[i as usize];
        let class = members.get_mut(usize::from(label));
        class
            .ok_or_else(|| Error::usage(format!("label {label} is not below the number of classes, {classes}")))?
            .push(i);
    }
    Ok(members)
}

/// Puts `round(fraction·n)` of the samples aside for validation, of each given label in proportion.
///
/// A class gets its proportional share rounded down, and the samples still missing go to the classes with the largest
/// remainders (lower class first). The choice depends on `seed`, the labels and the fraction only.
///
/// # Errors
/// [`Error::Usage`] if `fraction` is not in `[0, 1)`, a label is not below `classes`, or a part would have fewer
/// samples than there are classes (the validation part may be empty, for fraction 0).
pub fn validation_split(given: &[u16], classes: usize, fraction: f64, seed: u64) -> Result<Split> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(Error::usage(format!("validation fraction {fraction} is not at least 0 and below 1")));
    }
    let n = given.len();
    let wanted = (fraction * n as f64).round() as usize;
    if n - wanted < classes || (fraction > 0.0 && wanted < classes) {
        return Err(Error::usage(format!(
            "validation fraction {fraction} of {n} samples leaves {} for training and {wanted} for validation; each \
             needs at least one per class, {classes}",
            n - wanted
        )));
    }
    let members = shuffled_classes(given, classes, seed, Purpose::Split)?;
    // Share of a class: wanted·size/n, in whole numbers so that no rounding depends on the platform.
    let share = |class: usize| wanted as u128 * members[class].len() as u128;
    let mut counts: Vec<usize> = (0..classes).map(|class| (share(class) / n.max(1) as u128) as usize).collect();
    let mut by_remainder: Vec<usize> = (0..classes).collect();
    by_remainder.sort_by_key(|&class| std::cmp::Reverse(share(class) % n.max(1) as u128));
    let missing = wanted - counts.iter().sum::<usize>();
    for &class in &by_remainder[..missing] {
        counts[class] += 1;
    }
    let mut split = Split { train: Vec::with_capacity(n - wanted), validation: Vec::with_capacity(wanted) };
    for (class, count) in members.iter().zip(counts) {
        split.validation.extend(&class[..count]);
        split.train.extend(&class[count..]);
    }
    split.train.sort_unstable();
    split.validation.sort_unstable();
    Ok(split)
}

/// A random subset of `n` samples with equally many of each true label, indices in ascending order. If `classes` does
/// not divide `n`, the first `n mod classes` classes get one more.
///
/// # Errors
/// [`Error::Usage`] if `n` is below the number of classes, a class has too few samples, or a label is out of range.
pub fn balanced_subset(true_labels: &[u16], classes: usize, n: usize, seed: u64) -> Result<Vec<u32>> {
    if n < classes || classes == 0 {
        return Err(Error::usage(format!("a training set of {n} samples has none for some of the {classes} classes")));
    }
    let members = shuffled_classes(true_labels, classes, seed, Purpose::Subset)?;
    let mut subset = Vec::new();
    for (class, members) in members.iter().enumerate() {
        let share = n / classes + usize::from(class < n % classes);
        let Some(taken) = members.get(..share) else {
            return Err(Error::usage(format!(
                "a balanced training set of {n} samples needs {share} of class {class}, the data has {}",
                members.len()
            )));
        };
        subset.extend(taken);
    }
    subset.sort_unstable();
    Ok(subset)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Labels of 5 classes with 100, 200, … 500 samples, mixed.
    fn labels() -> Vec<u16> {
        let sorted: Vec<u16> = (0..5u16).flat_map(|class| vec![class; 100 * (usize::from(class) + 1)]).collect();
        (0..sorted.len()).map(|i| sorted[i * 7 % sorted.len()]).collect()
    }

    fn per_class(indices: &[u32]) -> Vec<usize> {
        let labels = labels();
        (0..5).map(|class| indices.iter().filter(|&&i| labels[i as usize] == class).count()).collect()
    }

    #[test]
    fn validation_is_stratified_and_disjoint() {
        let split = validation_split(&labels(), 5, 0.1, 1).unwrap();
        assert_eq!(per_class(&split.validation), [10, 20, 30, 40, 50]);
        let mut all = [split.train.clone(), split.validation.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..1500).collect::<Vec<u32>>());
        assert_eq!(split, validation_split(&labels(), 5, 0.1, 1).unwrap());
        assert_ne!(split, validation_split(&labels(), 5, 0.1, 2).unwrap());
        // 0.101·1500 rounds to 152: shares 10.13 20.27 30.4 40.53 50.67, two remainders to the last two classes.
        assert_eq!(per_class(&validation_split(&labels(), 5, 0.101, 1).unwrap().validation), [10, 20, 30, 41, 51]);
        assert!(validation_split(&labels(), 5, 0.0, 1).unwrap().validation.is_empty());
    }

    #[test]
    fn subset_is_balanced() {
        let subset = balanced_subset(&labels(), 5, 252, 1).unwrap();
        assert_eq!(per_class(&subset), [51, 51, 50, 50, 50]);
        assert!(subset.is_sorted_by(|a, b| a < b));
        assert_ne!(subset, balanced_subset(&labels(), 5, 252, 2).unwrap());
    }

    #[test]
    fn too_few_is_refused() {
        let split = |fraction| validation_split(&labels(), 5, fraction, 1).unwrap_err().to_string();
        assert!(split(1.0).contains("not at least 0 and below 1"));
        assert!(split(f64::NAN).contains("not at least 0 and below 1"));
        assert!(split(0.999).contains("leaves 1 for training and 1499 for validation"), "{}", split(0.999));
        assert!(split(0.001).contains("leaves 1498 for training and 2 for validation"), "{}", split(0.001));
        let subset = |n| balanced_subset(&labels(), 5, n, 1).unwrap_err().to_string();
        assert!(subset(4).contains("none for some of the 5 classes"));
        assert_eq!(subset(1000), "a balanced training set of 1000 samples needs 200 of class 0, the data has 100");
        assert!(validation_split(&[0, 1, 7], 3, 0.5, 1).is_err());
        assert!(balanced_subset(&[0, 1, 7], 3, 3, 1).unwrap_err().to_string().contains("label 7"));
    }
}
