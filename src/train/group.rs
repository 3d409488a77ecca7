//! How many branches a step works on at a time.

use crate::error;
use crate::plan::{MOST_STAGES, Machine, Plan, PlanOptions, StageGroups};
use crate::tape::Tape;
use serde::{Deserialize, Serialize};

/// How many branches a step works on at a time: `auto`, or `all` or a number, and behind a colon the same for each stage within such a
/// group, that of the largest images first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "NumberOrText", into = "String")]
pub enum Group {
    /// As the device likes it: by its memory and its second-level cache; all of them on the processor.
    Auto,
    /// As is said.
    Of {
        /// At most this many; `None` for all.
        size: Option<usize>,
        /// Fewer within a group where images are large.
        stages: StageGroups,
    },
}

impl Group {
    /// All branches at a time.
    pub const ALL: Self = Group::Of { size: None, stages: StageGroups::WHOLE };

    /// The plan of a step that takes its branches so; `machine`: what the device's default goes by.
    ///
    /// # Errors
    /// As [`Plan::build`].
    pub fn plan(self, tape: &Tape, options: &PlanOptions, machine: Option<Machine>) -> error::Result<Plan> {
        match (self, machine) {
            (Group::Auto, Some(machine)) => machine.fit(tape, options),
            (Group::Auto, None) => Plan::build(tape, options),
            (Group::Of { size, stages }, _) => Plan::build(tape, &PlanOptions { group: size, stages, ..*options }),
        }
    }
}

fn size(text: &str) -> Option<Option<usize>> {
    match (text, text.parse()) {
        ("all", _) => Some(None),
        (_, Ok(size)) if size > 0 => Some(Some(size)),
        _ => None,
    }
}

impl std::str::FromStr for Group {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            let stages = "behind a colon the same for each stage, as in 5:2,3 or all:4";
            format!("takes auto, all or a number of branches from 1 on; {stages}")
        };
        if text == "auto" {
            return Ok(Group::Auto);
        }
        let (group, by_stage) = text.split_once(':').map_or((text, None), |(group, stages)| (group, Some(stages)));
        let mut stages = StageGroups::WHOLE;
        for (stage, text) in by_stage.into_iter().flat_map(|text| text.split(',')).enumerate() {
            if stage == MOST_STAGES {
                return Err(format!("takes the sizes of at most {MOST_STAGES} stages"));
            }
            stages = stages.with(stage, size(text).ok_or_else(wrong)?);
        }
        Ok(Group::Of { size: size(group).ok_or_else(wrong)?, stages })
    }
}

/// A setting as a TOML file may have it.
#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(i64),
    Text(String),
}

impl TryFrom<NumberOrText> for Group {
    type Error = String;
    fn try_from(value: NumberOrText) -> Result<Self, String> {
        match value {
            NumberOrText::Number(n) => n.to_string().parse(),
            NumberOrText::Text(text) => text.parse(),
        }
    }
}

impl From<Group> for String {
    fn from(group: Group) -> String {
        group.to_string()
    }
}

impl std::fmt::Display for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Group::Of { size, stages } = self else { return f.write_str("auto") };
        let text = |size: Option<usize>| size.map_or("all".to_string(), |size| size.to_string());
        f.write_str(&text(*size))?;
        if !stages.is_whole() {
            write!(f, ":{stages}")?;
        }
        Ok(())
    }
}
