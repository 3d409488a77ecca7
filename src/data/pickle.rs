//! The part of Python's pickle format, protocol 2, in which NumPy arrays, lists and dictionaries of the CIFAR files are
//! written (opcodes: PEP 307 and the module `pickletools`; array states: `ndarray.__reduce__` of NumPy).
//!
//! Nothing is ever called: the six globals of an array are known by name and stand for themselves, every other global
//! and opcode is refused. The general reader in the crate `serde-pickle` cannot build arrays at all (their `REDUCE` and
//! `BUILD` are unknown to it), and it copies every string; here strings are ranges of the input, so that the pixels of a
//! mapped file stay where they are. Each opcode makes at most one value, and their number is limited.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

/// Most values in a pickle: CIFAR-100's training file has about 150,000.
const MAX_VALUES: usize = 400_000;

/// A defect: what is wrong, with the byte where it is.
pub type Result<T> = std::result::Result<T, String>;

/// A value of a pickle, by its place in the list of all values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id(u32);

/// The callables that may be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Global {
    Reconstruct,
    NdArray,
    Dtype,
    Encode,
}

/// The bytes of an array in the input.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Raw {
    /// As they are.
    Bytes(Range<u32>),
    /// UTF-8 text, one character per byte.
    Latin1(Range<u32>),
}

#[derive(Debug)]
enum Value {
    None,
    Bool(bool),
    Int(i32),
    /// A byte string.
    Bytes(Range<u32>),
    /// Unicode text, checked to be UTF-8.
    Text(Range<u32>),
    /// Text, all of it below U+0100, turned into bytes.
    Latin1(Range<u32>),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    /// Name of an element type, and its byte order once built.
    Dtype(Range<u32>, Option<Range<u32>>),
    /// An array, empty until built.
    Array(Option<Box<Built>>),
}

/// What an array's state says.
#[derive(Debug)]
struct Built {
    shape: Vec<i32>,
    dtype: Id,
    fortran: bool,
    raw: Raw,
}

/// An array in a pickle.
#[derive(Debug)]
pub struct Array<'a> {
    /// Length along each axis.
    pub shape: Vec<usize>,
    /// Byte order and type as NumPy writes them, for instance `<i8` or `|u1`.
    pub dtype: String,
    /// Whether the first axis runs fastest in memory.
    pub fortran: bool,
    /// The elements.
    pub bytes: Cow<'a, [u8]>,
    /// Where in the input they start, if they stand there as they are.
    pub start: Option<usize>,
}

/// A pickle that was read.
#[derive(Debug)]
pub struct Pickle<'a> {
    input: &'a [u8],
    values: Vec<Value>,
    root: Id,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle at the start of `input`.
    ///
    /// # Errors
    /// A text with the byte at which something else than the known part of protocol 2 stands, or the input ends.
    pub fn read(input: &'a [u8]) -> Result<Self> {
        if u32::try_from(input.len()).is_err() {
            return Err(format!("{} bytes are too many for a pickle of labels or images", input.len()));
        }
        let machine =
            Machine { input, at: 0, values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
        machine.run()
    }

    /// The whole pickle.
    pub fn root(&self) -> Id {
        self.root
    }

    /// The entries of a dictionary whose keys are byte strings or texts.
    ///
    /// # Errors
    /// If `id` is no such dictionary.
    pub fn dict(&self, id: Id) -> Result<Vec<(&'a str, Id)>> {
        let Value::Dict(entries) = self.value(id) else { return Err("not a dictionary".into()) };
        let key = |id| self.text(id).ok_or_else(|| "a dictionary with keys that are not text".to_string());
        entries.iter().map(|&(k, v)| Ok((key(k)?, v))).collect()
    }

    /// The items of a list.
    ///
    /// # Errors
    /// If `id` is no list.
    pub fn list(&self, id: Id) -> Result<&[Id]> {
        match self.value(id) {
            Value::List(items) => Ok(items),
            _ => Err("not a list".into()),
        }
    }

    /// A whole number.
    pub fn int(&self, id: Id) -> Option<i32> {
        match self.value(id) {
            Value::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// A text, or a byte string that is UTF-8.
    pub fn text(&self, id: Id) -> Option<&'a str> {
        match self.value(id) {
            Value::Bytes(range) | Value::Text(range) => std::str::from_utf8(bytes(self.input, range)).ok(),
            _ => None,
        }
    }

    /// An array whose shape fits its bytes.
    ///
    /// # Errors
    /// If `id` is no array, or shape, element size and bytes disagree.
    pub fn array(&self, id: Id) -> Result<Array<'a>> {
        let Value::Array(Some(built)) = self.value(id) else { return Err("not an array".into()) };
        let Value::Dtype(name, Some(order)) = self.value(built.dtype) else {
            return Err("an array without element type".into());
        };
        let part = |range| String::from_utf8_lossy(bytes(self.input, range));
        let dtype = format!("{}{}", part(order), part(name));
        let size: usize = dtype.get(2..).and_then(|size| size.parse().ok()).unwrap_or(0);
        let shape: Vec<usize> = built.shape.iter().map(|&n| usize::try_from(n).unwrap_or(0)).collect();
        let wanted = shape.iter().try_fold(size, |product, &n| product.checked_mul(n));
        let (content, start) = match &built.raw {
            Raw::Bytes(range) => (Cow::Borrowed(bytes(self.input, range)), Some(range.start as usize)),
            Raw::Latin1(range) => {
                let text = std::str::from_utf8(bytes(self.input, range)).unwrap_or_default();
                // Every character was checked to be below U+0100.
                (Cow::Owned(text.chars().map(|c| c as u8).collect()), None)
            }
        };
        if wanted != Some(content.len()) || content.is_empty() {
            return Err(format!("{} bytes for an array {shape:?} of type `{dtype}`", content.len()));
        }
        Ok(Array { shape, dtype, fortran: built.fortran, bytes: content, start })
    }

    fn value(&self, id: Id) -> &Value {
        &self.values[id.0 as usize]
    }
}

/// The bytes of a range that the machine took from the input.
fn bytes<'a>(input: &'a [u8], range: &Range<u32>) -> &'a [u8] {
    &input[range.start as usize..range.end as usize]
}

/// The stack machine that a pickle is a program for.
struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack at the open marks.
    marks: Vec<u32>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn run(mut self) -> Result<Pickle<'a>> {
        loop {
            let start = self.at;
            match self.step() {
                Ok(None) => {}
                Ok(Some(root)) => return Ok(Pickle { input: self.input, values: self.values, root }),
                Err(what) => return Err(format!("byte {start}: {what}")),
            }
        }
    }

    /// Does one opcode; returns the result at the last one.
    fn step(&mut self) -> Result<Option<Id>> {
        let opcode = self.take(1)?[0];
        if self.at == 1 && opcode != 0x80 {
            return Err("no pickle of protocol 2".into());
        }
        match opcode {
            0x80 => match self.take(1)?[0] {
                2 if self.at == 2 => {}
                protocol => return Err(format!("pickle protocol {protocol} here; only protocol 2 is read")),
            },
            b'.' => {
                let root = self.pop()?;
                let rest = self.input.len() - self.at;
                return if self.stack.is_empty() && self.marks.is_empty() && rest == 0 {
                    Ok(Some(root))
                } else {
                    Err(format!("the pickle ends with {} open values and {rest} bytes left", self.stack.len()))
                };
            }
            b'}' => self.push(Value::Dict(Vec::new()))?,
            b']' => self.push(Value::List(Vec::new()))?,
            b'(' => {
                self.limit(self.marks.len())?;
                self.marks.push(self.stack.len() as u32);
            }
            b'N' => self.push(Value::None)?,
            0x88 => self.push(Value::Bool(true))?,
            0x89 => self.push(Value::Bool(false))?,
            b'K' | b'M' | b'J' => {
                let number = self.number(match opcode {
                    b'K' => 1,
                    b'M' => 2,
                    _ => 4,
                })?;
                self.push(Value::Int(number as i32))?;
            }
            b'U' | b'T' => {
                let range = self.counted(if opcode == b'U' { 1 } else { 4 })?;
                self.push(Value::Bytes(range))?;
            }
            b'X' => {
                let range = self.counted(4)?;
                std::str::from_utf8(bytes(self.input, &range)).map_err(|_| "text that is not UTF-8")?;
                self.push(Value::Text(range))?;
            }
            b'q' | b'r' => {
                let key = self.number(if opcode == b'q' { 1 } else { 4 })?;
                let top = *self.stack.last().ok_or("nothing on the stack")?;
                self.limit(self.memo.len())?;
                self.memo.insert(key, top);
            }
            b'h' | b'j' => {
                let key = self.number(if opcode == b'h' { 1 } else { 4 })?;
                let id = *self.memo.get(&key).ok_or_else(|| format!("memo {key} was never written"))?;
                self.limit(self.stack.len())?;
                self.stack.push(id);
            }
            b')' => self.tuple(0)?,
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b't' => {
                let items = self.popped_to_mark()?;
                self.push(Value::Tuple(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            b'e' => {
                let items = self.popped_to_mark()?;
                self.append(&items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(&[key, value])?;
            }
            b'u' => {
                let items = self.popped_to_mark()?;
                self.set(&items)?;
            }
            b'c' => {
                let global = self.global()?;
                self.push(Value::Global(global))?;
            }
            b'R' => self.reduce()?,
            b'b' => self.build()?,
            b'Q' => return Err("a torch tensor; only NumPy arrays are read".into()),
            other => return Err(format!("opcode {:?}, which these files do not have", char::from(other))),
        }
        Ok(None)
    }

    /// The next `n` bytes.
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let rest = &self.input[self.at..];
        let taken = rest.get(..n).ok_or_else(|| format!("truncated: {n} bytes wanted, {} left", rest.len()))?;
        self.at += n;
        Ok(taken)
    }

    /// A little-endian number of `n` ≤ 4 bytes.
    fn number(&mut self, n: usize) -> Result<u32> {
        Ok(self.take(n)?.iter().rev().fold(0, |number, &byte| number << 8 | u32::from(byte)))
    }

    /// The range of a string behind its length of `n` bytes.
    fn counted(&mut self, n: usize) -> Result<Range<u32>> {
        let length = self.number(n)?;
        let start = self.at as u32;
        self.take(length as usize)?;
        // The input is shorter than 2³².
        Ok(start..self.at as u32)
    }

    /// An error when something has `count` values and no more are allowed.
    fn limit(&self, count: usize) -> Result<()> {
        if count < MAX_VALUES { Ok(()) } else { Err(format!("more than {MAX_VALUES} values")) }
    }

    fn push(&mut self, value: Value) -> Result<()> {
        self.limit(self.values.len())?;
        self.limit(self.stack.len())?;
        self.stack.push(Id(self.values.len() as u32));
        self.values.push(value);
        Ok(())
    }

    /// Height of the stack below which values belong to the part before the last mark.
    fn floor(&self) -> usize {
        self.marks.last().map_or(0, |&mark| mark as usize)
    }

    fn pop(&mut self) -> Result<Id> {
        if self.stack.len() <= self.floor() {
            return Err("nothing on the stack".into());
        }
        self.stack.pop().ok_or_else(|| "nothing on the stack".into())
    }

    fn popped_to_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().ok_or("no mark on the stack")?;
        Ok(self.stack.split_off(mark as usize))
    }

    fn tuple(&mut self, n: usize) -> Result<()> {
        let floor = self.floor();
        let from = self.stack.len().checked_sub(n).filter(|&from| from >= floor).ok_or("nothing on the stack")?;
        let items = self.stack.split_off(from);
        self.push(Value::Tuple(items))
    }

    /// The value under the top of the stack that an opcode is about to change.
    fn target(&mut self) -> Result<&mut Value> {
        let top = self.stack.last().ok_or("nothing on the stack")?;
        Ok(&mut self.values[top.0 as usize])
    }

    fn append(&mut self, new: &[Id]) -> Result<()> {
        match self.target()? {
            Value::List(items) => items.extend(new),
            _ => return Err("items for something that is no list".into()),
        }
        Ok(())
    }

    fn set(&mut self, new: &[Id]) -> Result<()> {
        let (pairs, rest) = new.as_chunks::<2>();
        match self.target()? {
            Value::Dict(entries) if rest.is_empty() => entries.extend(pairs.iter().map(|&[k, v]| (k, v))),
            _ => return Err("entries for something that is no dictionary, or a key without value".into()),
        }
        Ok(())
    }

    /// One of the known globals, written as two lines.
    fn global(&mut self) -> Result<Global> {
        let mut line = || {
            let rest = &self.input[self.at..];
            let end = rest.iter().take(200).position(|&byte| byte == b'\n').ok_or("a global without end of line")?;
            self.at += end + 1;
            std::str::from_utf8(&rest[..end]).map_err(|_| "a global that is not text".to_string())
        };
        let (module, name) = (line()?, line()?);
        match (module, name) {
            ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Ok(Global::Reconstruct),
            ("numpy", "ndarray") => Ok(Global::NdArray),
            ("numpy", "dtype") => Ok(Global::Dtype),
            ("_codecs", "encode") => Ok(Global::Encode),
            _ => Err(format!("global `{}.{}` is refused", module.escape_debug(), name.escape_debug())),
        }
    }

    fn value(&self, id: Id) -> &Value {
        &self.values[id.0 as usize]
    }

    /// The values of a tuple.
    fn items(&self, id: Id) -> Result<Vec<&Value>> {
        match self.value(id) {
            Value::Tuple(items) => Ok(items.iter().map(|&id| self.value(id)).collect()),
            _ => Err("no tuple".into()),
        }
    }

    fn is(&self, range: &Range<u32>, text: &str) -> bool {
        bytes(self.input, range) == text.as_bytes()
    }

    /// A known callable with its known arguments.
    fn reduce(&mut self) -> Result<()> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let Value::Global(global) = *self.value(callable) else { return Err("a call of something unknown".into()) };
        let made = match (global, self.items(arguments)?.as_slice()) {
            (Global::Encode, [Value::Text(text), Value::Text(codec)]) if self.is(codec, "latin1") => {
                let utf8 = bytes(self.input, text);
                // UTF-8 of U+0080 to U+00FF starts with C2 or C3; greater ones with more.
                if utf8.iter().any(|&byte| byte > 0xc3) {
                    return Err("text for latin-1 with a character above U+00FF".into());
                }
                Value::Latin1(text.clone())
            }
            (
                Global::Reconstruct,
                [Value::Global(Global::NdArray), Value::Tuple(shape), Value::Bytes(kind) | Value::Latin1(kind)],
            ) if self.is(kind, "b") && matches!(shape[..], [zero] if matches!(self.value(zero), Value::Int(0))) => {
                Value::Array(None)
            }
            (
                Global::Dtype,
                [
                    Value::Bytes(name) | Value::Text(name),
                    Value::Bool(false) | Value::Int(0),
                    Value::Bool(true) | Value::Int(1),
                ],
            ) if ["i8", "u1"].iter().any(|known| self.is(name, known)) => Value::Dtype(name.clone(), None),
            _ => return Err(format!("a call of {global:?} with other arguments than NumPy's for int64 and uint8")),
        };
        self.push(made)
    }

    /// The state of an element type or an array.
    fn build(&mut self) -> Result<()> {
        let (state, object) = (self.pop()?, self.pop()?);
        let built = match (self.value(object), self.items(state)?.as_slice()) {
            (
                Value::Dtype(name, None),
                [
                    Value::Int(3),
                    Value::Bytes(order) | Value::Text(order),
                    Value::None,
                    Value::None,
                    Value::None,
                    Value::Int(-1),
                    Value::Int(-1),
                    Value::Int(0),
                ],
            ) if self.is(order, if self.is(name, "u1") { "|" } else { "<" }) => {
                Value::Dtype(name.clone(), Some(order.clone()))
            }
            (
                Value::Array(None),
                [
                    Value::Int(1),
                    Value::Tuple(shape),
                    Value::Dtype(_, Some(_)),
                    fortran @ (Value::Bool(_) | Value::Int(0 | 1)),
                    raw @ (Value::Bytes(_) | Value::Latin1(_)),
                ],
            ) => {
                let axis = |&id: &Id| match self.value(id) {
                    Value::Int(n) if *n >= 0 => Ok(*n),
                    _ => Err("an array shape that is no row of numbers".to_string()),
                };
                let raw = match raw {
                    Value::Bytes(range) => Raw::Bytes(range.clone()),
                    Value::Latin1(range) => Raw::Latin1(range.clone()),
                    _ => return Err("an array without bytes".into()),
                };
                let Value::Tuple(parts) = self.value(state) else { return Err("no tuple".into()) };
                let fortran = matches!(fortran, Value::Bool(true) | Value::Int(1));
                let shape = shape.iter().map(axis).collect::<Result<_>>()?;
                Value::Array(Some(Box::new(Built { shape, dtype: parts[2], fortran, raw })))
            }
            _ => return Err("a state that is neither that of a NumPy array nor of its element type".into()),
        };
        self.values[object.0 as usize] = built;
        self.stack.push(object);
        Ok(())
    }
}
